from __future__ import annotations

import csv
import gc
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
from omegaconf import OmegaConf

from configuration import hasten_configuration
from helpers import ROOT
from interpreted import hasten_interpreter
from ranks import Ranks

if not torch.cuda.is_available():  # then Triton's kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tests run side by side, a process on each core
settings.register_profile("untimed", deadline=None)  # how long a test takes is the machine's affair
settings.load_profile("untimed")
# Importing torch takes a process seconds: those forked from one that has done so begin at once.
multiprocessing.set_forkserver_preload(["torch._dynamo", "sce_pipeline.training.fit"])
hasten_configuration()
hasten_interpreter()


def pytest_collection_finish():
    """Let collections of garbage pass over all that is there by now, which takes most of them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let go of it all at the end."""
    gc.unfreeze()


def pytest_addoption(parser):
    parser.addoption(
        "--on-spark", action="store_true", help="run the tests of interactions on Spark"
    )


class Project:
    """A copy of the project's configuration in an empty folder, to run pipelines in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "conf", folder / "conf", copy_function=shutil.copyfile)
        for name in ("pyproject.toml", ".telemetry"):
            shutil.copy(ROOT / name, folder)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("data", *parts)

    def write_log(self, dataset: str, rows, header=("userid", "itemid", "timestamp")) -> Path:
        file = self.path("01_raw", dataset, "interactions.csv")
        file.parent.mkdir(parents=True)
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return file

    def run(self, env: str | None = None, pipelines: list[str] | None = None, **parameters):
        with KedroSession.create(self.folder, env=env, runtime_params=parameters) as session:
            return session.run(pipeline_names=pipelines or ["__default__"])

    def versions(self, *parts: str) -> list[Path]:
        """All versions of a versioned file, oldest first."""
        return sorted(self.path(*parts).glob(f"*/{parts[-1]}"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    configure_project("sce_pipeline")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


@pytest.fixture(scope="session")
def make_project():
    """Make projects in folders of one's own."""
    configure_project("sce_pipeline")
    return Project


@pytest.fixture(scope="session")
def three_ranks(tmp_path_factory):
    """A process group of three processes."""
    ranks = Ranks(3, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def spark():
    """Spark in this process, with the project's options and others that suit small data."""
    pytest.importorskip("pyspark", reason="the extra spark is not installed")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java")
    from pyspark.sql import SparkSession  # noqa: PLC0415

    options = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/spark/spark.yml"))
    quick = {
        "spark.driver.memory": "1g",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.timestampType": "TIMESTAMP_NTZ",  # what times of frames from here become
        "spark.ui.enabled": "false",
    }
    session = SparkSession.builder.master("local[2]").config(map=options | quick).getOrCreate()
    yield session
    session.stop()
