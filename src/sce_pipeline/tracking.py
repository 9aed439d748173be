"""Runs in MLflow, where it is installed: parameters, metrics, report and figures of each.

A run is written once, after all is done, so tracking neither slows a run nor can it break one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl

from sce_pipeline.parameters import MLflowParameters
from sce_pipeline.provenance import flatten

logger = logging.getLogger(__name__)

TRACKED = ("dataset", "loss", "model", "seed", "split", "data_processing", "training", "evaluation")
"""Parameters that are tracked."""

FIGURES = ("training_curve_figure", "training_time_figure", "metrics_figure")

MOST_PARAMETERS, MOST_METRICS = 100, 1000
"""How many MLflow's servers take at once."""

LONGEST = 500
"""Characters of a parameter's value that all of MLflow's stores take."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""How long a server that does not answer is waited for, unless the environment says."""

TURN = 120.0
"""Seconds that a run waits for others that look for the experiment at the same time."""


class TrackingHooks:
    """Track every run that trains or measures, if MLflow is installed and ``mlflow.enabled``."""

    def __init__(self) -> None:
        self._parameters: dict[str, Any] = {}
        self._project = Path()
        self._outputs: dict[str, Any] = {}
        self._started = 0.0

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Note down the parameters, before Kedro makes objects of them."""
        if _is_installed():
            self._parameters = context.config_loader["parameters"]
        self._project = Path(context.project_path)

    @hook_impl
    def before_pipeline_run(self) -> None:
        """Start afresh."""
        self._outputs = {}
        self._started = time.time()

    @hook_impl
    def after_node_run(self, outputs: dict[str, Any]) -> None:
        """Keep what will be tracked."""
        kept = ("training_history", "metrics", "run_report", *FIGURES)
        self._outputs |= {name: outputs[name] for name in kept if name in outputs}

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Track the run; whatever goes wrong is a warning."""
        measured = {"training_history", "metrics"} & self._outputs.keys()
        if not measured or not _is_installed():
            return
        settings = MLflowParameters.model_validate(self._parameters["mlflow"])
        if not settings.enabled:
            return
        try:
            self._track(settings, run_params)
        except Exception as error:  # a server, a disk or a version of MLflow can fail in any way
            logger.warning("the run is not in MLflow: %s: %s", type(error).__name__, error)

    def _track(self, settings: MLflowParameters, run_params: Mapping[str, Any]) -> None:
        """Write the run and mark it as finished."""
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Metric, Param  # noqa: PLC0415

        client, number = self._open(self._locate(settings.uri), settings.experiment)
        version = run_params["run_id"]
        names = ("dataset", "loss", "model", "trial")
        tags = {name: str(value) for name in names if (value := self._parameters[name]) is not None}
        run = client.create_run(
            number,
            start_time=int(1000 * self._started),
            tags={**tags, "version": version, "environment": run_params["env"] or ""},
            run_name=f"{version} {tags['loss']}",
        )
        parameters = [
            Param(name, str(value)[:LONGEST])
            for name, value in flatten({name: self._parameters[name] for name in TRACKED})
        ]
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value, step in self._metrics()]
        for some in _batches(parameters, MOST_PARAMETERS):
            client.log_batch(run.info.run_id, params=some)
        for some in _batches(metrics, MOST_METRICS):
            client.log_batch(run.info.run_id, metrics=some)
        for name, text in self._artifacts():
            client.log_text(run.info.run_id, text, name)
        client.set_terminated(run.info.run_id, status="FINISHED")

    def _open(self, uri: str, name: str) -> tuple[Any, str]:
        """Return a client and the number of an experiment, made where there is none.

        Runs that end together, as trials of a sweep do, take turns: each would make it, and the
        client the tables of a new SQLite file.
        """
        from mlflow import MlflowClient  # noqa: PLC0415

        with FileLock(self._project / "data/.mlflow.lock", timeout=TURN):
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is not None:
                return client, experiment.experiment_id
            artifacts = self._project / "data/mlflow" if uri.startswith("sqlite:") else None
            return client, client.create_experiment(
                name, artifact_location=artifacts and artifacts.absolute().as_uri()
            )

    def _locate(self, uri: str) -> str:
        """Return where MLflow keeps runs; a relative SQLite file lies in the project."""
        scheme = "sqlite:///"
        if not uri.startswith(scheme):
            return uri
        file = self._project.absolute() / uri.removeprefix(scheme)
        file.parent.mkdir(parents=True, exist_ok=True)
        return f"{scheme}{file}"

    def _metrics(self) -> Iterator[tuple[str, float, int]]:
        """Yield metrics by epoch, and those of the test users after the best one."""
        history = self._outputs.get("training_history", {"epochs": [], "best_epoch": 0})
        for epoch in history["epochs"]:
            for name, value in flatten(epoch):
                if name != "epoch" and isinstance(value, int | float):
                    yield _name(f"epoch.{name}"), float(value), epoch["epoch"]
        for name, value in flatten(self._outputs.get("metrics", {})):
            if isinstance(value, int | float):
                yield _name(f"test.{name}"), float(value), history["best_epoch"]

    def _artifacts(self) -> Iterator[tuple[str, str]]:
        """Yield the report and the figures, by file name."""
        if (report := self._outputs.get("run_report")) is not None:
            yield "report.txt", report
        for name in FIGURES:
            if (figure := self._outputs.get(name)) is not None:
                yield f"{name}.html", figure.to_html(include_plotlyjs="cdn")


def _is_installed() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def _batches(entries: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(entries), size):
        yield entries[first : first + size]


def _name(name: str) -> str:
    """Return a name of a metric that MLflow takes: ndcg_at_10 for ndcg@10."""
    return re.sub(r"[^\w.\- /]", "_", name.replace("@", "_at_"))
