from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import Distribution

import pytest

from helpers import ROOT, SMALL_RUN, make_log

LOG = make_log(n_users=30, n_items=20, length=12)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which the project's wheel is unpacked, as installing it does."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = wheels.iterdir()
    shutil.unpack_archive(wheel, site, "zip")
    return site


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """The archive of the configuration, as ``kedro package`` makes it."""
    archive = tmp_path_factory.mktemp("conf") / "conf-sce_pipeline.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(ROOT / "conf", "conf")
    return archive


@pytest.fixture
def call(installed):
    """Call Python with the wheel in front of all that is installed, and return what it says."""

    def call(folder, *arguments, status=0):
        run = subprocess.run(
            [sys.executable, *map(str, arguments)],
            check=False,
            cwd=folder,
            env={
                "HOME": str(folder),
                "PATH": os.environ["PATH"],
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(installed),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert run.returncode == status, run.stdout
        return run.stdout

    return call


def write_log(folder):
    folder.mkdir(parents=True)
    with (folder / "interactions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("userid", "itemid", "timestamp"), *LOG])


def flatten(values, prefix=""):
    """Write parameters as ``--params`` has them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def test_the_wheel_holds_the_package_and_its_command(installed):
    sources = {file.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("sce_pipeline/**/*")}
    packed = {file.relative_to(installed) for file in installed.rglob("sce_pipeline/**/*")}
    assert packed == {file for file in sources if "__pycache__" not in file.parts}
    (metadata,) = installed.glob("*.dist-info")
    (command,) = Distribution.at(metadata).entry_points
    assert (command.group, command.name) == ("console_scripts", "sce-pipeline")
    assert command.value == "sce_pipeline.__main__:main"


def test_the_wheel_without_a_configuration_asks_for_it_in_one_line(call, tmp_path):
    said = call(tmp_path, "-m", "sce_pipeline", "--pipelines", "download", status=1)
    last = said.splitlines()[-1]
    assert f"{tmp_path}/conf/base. Say with --conf-source where the configuration is" in last
    assert "conf-sce_pipeline.tar.gz" in last
    assert "Traceback" not in said
    assert "Warning" not in said


def test_the_wheel_runs_and_serves_without_the_repository(call, conf, tmp_path):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    write_log(work / "data" / "01_raw" / "walk")
    elsewhere.mkdir()
    parameters = ",".join(flatten({**SMALL_RUN, "loss": "ce"}))
    said = call(
        *(work, "-m", "sce_pipeline", "--conf-source", conf),
        *("--pipelines", "data_processing,training,export", "--params", parameters),
    )
    assert "DO_NOT_TRACK" not in said, "a run from a wheel reports to Kedro's makers"

    (folder,) = (work / "data/07_model_output/walk/ce/recommender").iterdir()
    shutil.move(folder, elsewhere / "model")
    code = """
import json, sce_pipeline
found = sce_pipeline.load_recommender("model").recommend(["i1", "i2", "rare"], k=20)
print(json.dumps([sce_pipeline.__file__, found.items, found.unknown]))
"""
    file, items, unknown = json.loads(call(elsewhere, "-c", code))
    assert not file.startswith(str(ROOT))
    assert set(items) == {item for _, item, _ in LOG} - {"i1", "i2"}
    assert unknown == ["rare"]
