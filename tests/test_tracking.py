from __future__ import annotations

import importlib.util
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import SMALL_RUN, make_log
from sce_pipeline.tracking import TrackingHooks


class FakeClient:
    """A client of MLflow that remembers what it is told."""

    made: list[FakeClient]
    failure: Exception | None = None

    def __init__(self, tracking_uri):
        self.uri = tracking_uri
        self.params, self.metrics, self.texts, self.calls = {}, {}, {}, []
        self.made.append(self)

    def get_experiment_by_name(self, name):
        self.experiment = name

    def create_experiment(self, name, artifact_location):
        self.artifacts = artifact_location
        return "7"

    def create_run(self, experiment_id, start_time, tags, run_name):
        if self.failure:
            raise self.failure
        self.tags = tags
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run"))

    def log_batch(self, run_id, params=(), metrics=()):
        assert len(params) <= 100
        self.params |= dict(params)
        self.metrics |= {(name, step): value for name, value, _, step in metrics}

    def log_text(self, run_id, text, artifact_file):
        self.texts[artifact_file] = text

    def set_terminated(self, run_id, status):
        self.status = status


@pytest.fixture
def fake(monkeypatch):
    """MLflow, but for what it would do."""
    client = type("Client", (FakeClient,), {"made": []})
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.MlflowClient = client
    mlflow.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    entities.Param = lambda name, value: (name, value)
    entities.Metric = lambda name, value, timestamp, step: (name, value, timestamp, step)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return client


@pytest.fixture
def log(project):
    return project.write_log("walk", make_log(n_users=40, n_items=12, length=8))


def test_a_run_is_tracked_whole(project, log, fake):
    project.run(loss="ce", **SMALL_RUN)
    (client,) = fake.made
    assert client.uri == f"sqlite:///{project.folder}/data/mlflow.db"
    assert client.experiment == "walk"
    assert client.artifacts == (project.folder / "data/mlflow").as_uri()
    (version,) = project.versions("08_reporting", "walk", "ce", "metrics.json")
    assert client.tags["version"] == version.parent.name
    assert (client.tags["dataset"], client.tags["loss"], client.tags["model"]) == (
        "walk",
        "ce",
        "sasrec",
    )
    assert client.params["training.model.hidden_size"] == "8"
    assert client.params["data_processing.split.name"] == "leave_one_out"
    assert {step for name, step in client.metrics if name == "epoch.ndcg_at_10"} == {1, 2}
    assert any(name == "test.model.ndcg_at_10.value" for name, _ in client.metrics)
    assert not any("@" in name for name, _ in client.metrics)
    assert set(client.texts) == {
        "report.txt",
        "training_curve_figure.html",
        "training_time_figure.html",
        "metrics_figure.html",
    }
    assert client.status == "FINISHED"


def test_runs_that_end_together_make_one_experiment(tmp_path, fake, monkeypatch):
    created = []

    def get(client, name):
        found = list(created)
        time.sleep(0.05)  # in which the others would look too
        return types.SimpleNamespace(experiment_id=found[0]) if found else None

    def create(client, name, artifact_location):
        created.append(str(len(created)))
        return created[-1]

    monkeypatch.setattr(fake, "get_experiment_by_name", get)
    monkeypatch.setattr(fake, "create_experiment", create)
    hooks = TrackingHooks()
    hooks._project = tmp_path
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: hooks._open("sqlite:", "walk"), range(4)))
    assert [number for _, number in opened] == ["0"] * 4
    assert created == ["0"]


def test_tracking_that_fails_is_a_warning(project, log, fake, caplog):
    fake.failure = ConnectionError("nobody there")
    project.run(loss="ce", **SMALL_RUN)
    assert "the run is not in MLflow: ConnectionError: nobody there" in caplog.text
    assert project.versions("08_reporting", "walk", "ce", "report.txt")


def test_nothing_is_tracked_where_it_is_switched_off_or_nothing_was_measured(project, log, fake):
    project.run(pipelines=["data_processing"], loss="ce", **SMALL_RUN)
    project.run(pipelines=["training"], mlflow={"enabled": False}, loss="ce", **SMALL_RUN)
    assert not fake.made


def test_without_mlflow_nothing_is_tracked_or_said(project, log, monkeypatch, caplog):
    monkeypatch.setattr("sce_pipeline.tracking._is_installed", lambda: False)
    monkeypatch.setattr(TrackingHooks, "_track", lambda *_: pytest.fail("it was tracked"))
    project.run(pipelines=["data_processing", "training"], loss="ce", **SMALL_RUN)
    assert "MLflow" not in caplog.text


def test_mlflow_itself_takes_a_run(project, log):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is an optional extra")
    project.run(loss="ce", **SMALL_RUN)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{project.folder}/data/mlflow.db")
    experiment = client.get_experiment_by_name("walk")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.loss.name"] == "ce"
    assert len(client.get_metric_history(run.info.run_id, "epoch.loss")) == 2
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} >= {"report.txt"}
