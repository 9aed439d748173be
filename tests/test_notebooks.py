from __future__ import annotations

import os
import shutil
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import ROOT, SMALL_RUN

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOG, COMPARISON, MASS = NOTEBOOKS
FIGURE = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def with_sample(make_project, tmp_path_factory):
    """Makes projects that have the sample, and an empty ``src``, which Kedro looks for."""

    def make():
        project = make_project(tmp_path_factory.mktemp("project"))
        raw = project.path("01_raw", "movielens_small")
        shutil.copytree(ROOT / "data/01_raw/movielens_small", raw)
        for name in ("src", "notebooks"):
            (project.folder / name).mkdir()
        return project

    return make


@pytest.fixture(scope="module")
def runs(with_sample):
    """A project with a short run of each of two losses."""
    project = with_sample()
    values = {
        "data_processing": {"stride": None},  # a window a user
        "training": {**SMALL_RUN["training"], "batch_size": 128, "max_epochs": 1},
        "evaluation": SMALL_RUN["evaluation"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        project.run(**values, loss="sce")
        project.run(**values, loss="cce", pipelines=["training", "evaluation", "reporting"])
    return project


def execute(file, project):
    """Run a notebook in the project's folder of notebooks, and return it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    folder = project.folder / "notebooks"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "IPYTHONDIR": str(project.folder),
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook):
    """The HTML of every table, and what was printed."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/html", "")
        for output in outputs(notebook)
    )


def figures(notebook):
    return [output.data[FIGURE] for output in outputs(notebook) if FIGURE in output.get("data", {})]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_notebook_is_stored_with_what_a_run_left_in_it(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_the_log_is_explored_in_a_project_where_nothing_has_run(with_sample):
    project = with_sample()
    notebook = execute(LOG, project)
    assert project.path("08_reporting", "movielens_small", "data_summary.json").exists()
    text = texts(notebook)
    for number in ("100004", "89833", "3496", "item with fewer than 5 users", "502 users"):
        assert number in text
    popularity, months, lengths = figures(notebook)
    before, after = (trace["y"] for trace in popularity["data"])
    assert {trace["name"] for trace in popularity["data"]} == {
        "interactions",
        "filtered_interactions",
    }
    assert months["data"]
    assert lengths["data"]
    assert len(before) == 9066
    assert len(after) == 3496


def test_losses_are_compared_from_saved_runs(runs):
    notebook = execute(COMPARISON, runs)
    assert "2 complete runs; incomplete: none" in texts(notebook)
    assert texts(notebook).count("<td>&quot;sasrec&quot;</td>") == 4  # of results and of costs
    for loss in ("sce", "cce"):
        (metrics,) = runs.versions("08_reporting", "movielens_small", loss, "metrics.json")
        assert metrics.parent.name in texts(notebook)
    curves, times = figures(notebook)
    assert [trace["name"] for trace in curves["data"]] == ["cce", "sce"]
    assert len(times["data"]) == 2


def test_the_gradient_mass_is_looked_into_on_saved_weights(runs):
    notebook = execute(MASS, runs)
    buckets, rounds = figures(notebook)
    masses = {trace["name"]: trace["y"] for trace in buckets["data"]}
    assert len(masses) == 8
    for name, kept in masses.items():
        assert all(0 < mass < 1 for mass in kept)
        if not name.endswith("pooled mass"):
            pooled = masses[name.removesuffix("mass") + "pooled mass"]
            assert all(mass <= more for mass, more in zip(kept, pooled, strict=True))
    near, random = (trace["y"] for trace in rounds["data"])
    assert near == sorted(near)
    assert random == sorted(random)


@pytest.mark.parametrize("file", [COMPARISON, MASS], ids=lambda file: file.stem)
def test_a_notebook_that_needs_runs_says_how_to_make_one(file, with_sample, monkeypatch):
    project = with_sample()
    monkeypatch.chdir(project.folder / "notebooks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # to which Kedro adds
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = nbformat.read(file, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    with pytest.raises(RuntimeError) as caught:
        exec(code, {})  # noqa: S102
    message = str(caught.value)
    assert str(project.folder) in message
    assert "\n    kedro run --params dataset=movielens_small,loss=sce\n" in message
