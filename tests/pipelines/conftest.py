from __future__ import annotations

import shutil

import pytest
from trained_projects import train


@pytest.fixture(scope="session")
def _trained(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        train(project)
    return project


@pytest.fixture
def trained_project(_trained, project):
    """A project in which a model has been trained, for this test alone."""
    shutil.copytree(_trained.path(), project.path())
    return project
