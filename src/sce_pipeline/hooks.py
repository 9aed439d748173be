"""Kedro hooks: parameters, sweeps, costs of nodes, end of checkpoints, the report, one run."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from pathlib import Path, PurePath
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import AbstractVersionedDataset, CatalogProtocol, Version
from kedro.io.core import VersionNotFoundError
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from rich import get_console

from sce_pipeline.parameters import RunParameters

logger = logging.getLogger(__name__)

GROUPS = ("data_processing", "training", "evaluation", "synthetic")
"""Groups of parameters that have defaults and may have a preset."""

REPORTS = ("run_report", "suggestion_report")
"""Outputs that are printed at the end."""

WORTH_A_LINE = 0.1
"""Seconds from which on the cost of a node is logged."""


def _cuda() -> Any:
    """Return ``torch.cuda`` once a GPU is in use; importing torch here would cost seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def check_parameters(chosen: dict[str, Any], parameters: dict[str, Any]) -> RunParameters:
    """Check all parameters of a run: presets, selection and groups.

    Args:
        chosen: What ``globals.yml`` says.
        parameters: All parameters.

    Raises:
        ValueError: A name is unknown or a value is out of range.
    """
    selectors = {"dataset", "loss", "seed"}
    if unknown := set(chosen) - selectors:
        raise ValueError(
            f"globals.yml has {', '.join(sorted(unknown))}, but only dataset, loss and seed "
            "are chosen there"
        )
    defaults = {f"_{group}" for group in GROUPS}
    return RunParameters.model_validate(
        {name: value for name, value in parameters.items() if name not in defaults}
    )


class ParameterHooks:
    """Refuse unknown names at the top of the parameters, where no node would ever look at them."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Check all parameters before any node runs."""
        check_parameters(context.config_loader["globals"], context.params)


class SweepHooks:
    """Tell a sweep what its run was asked for, so that its trials are asked for the same."""

    def __init__(self) -> None:
        self._request: dict[str, Any] = {}

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Choose a sweep's data set, unless ``--params`` does, and note down the request."""
        loader = context.config_loader
        asked = dict(loader.runtime_params or {})
        if "dataset" not in asked and (name := asked.get("sweep")) is not None:
            sweep = loader["parameters"]["sweeps"].get(name) or {}
            if dataset := sweep.get("dataset"):
                loader.runtime_params = asked = {**asked, "dataset": dataset}
        self._request = {
            "project_path": str(context.project_path),
            "conf_source": str(loader.conf_source),
            "env": loader.env,
            "runtime_params": asked,
        }

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol) -> None:
        """Hand over the request as a dataset."""
        catalog["run_request"] = self._request


class NodeCostHooks:
    """Log how long each node took and, on a GPU, the most memory its tensors took at once."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Start the clock and forget earlier peaks of memory."""
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        self._started[node.name] = time.perf_counter()

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Say what the node took."""
        seconds = time.perf_counter() - self._started.pop(node.name)
        if seconds < WORTH_A_LINE:
            return
        if cuda := _cuda():
            peak = cuda.max_memory_allocated() / 2**20
            logger.info("%s took %.1f s and %.0f MB of GPU memory", node.name, seconds, peak)
        else:
            logger.info("%s took %.1f s", node.name, seconds)


class VersionHooks:
    """Let a run load what it has saved itself, whatever another run has saved since.

    Weights are loaded together with the history of their own training, whatever was trained since.
    """

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Fix the version of everything that the run saves, for its nodes and whoever asks it.

        Raises:
            FileNotFoundError: There are no weights, or there is no training history of those that
                would be loaded.
            ValueError: A training history of another version than theirs is asked for.
        """
        for name in pipeline.all_outputs():
            dataset = catalog.get(name)
            if isinstance(dataset, AbstractVersionedDataset) and dataset._version:
                version = dataset.resolve_save_version()
                dataset._version = Version(version, version)
        if {"model_weights", "training_history"} <= pipeline.inputs():
            _join_versions(catalog.get("model_weights"), catalog.get("training_history"))


def _join_versions(weights: Any, history: Any) -> None:
    """Let the training history load in the version of the weights, which is settled by this."""
    try:
        version = weights.resolve_load_version()
    except VersionNotFoundError as error:
        raise FileNotFoundError(_describe_absence(weights)) from error
    asked = history._version.load
    if asked not in (None, version):
        raise ValueError(
            f"training_history is asked for in the version {asked}, but model_weights load in "
            f"{version}: name the weights alone, with --load-versions model_weights:<version>"
        )
    history._version = Version(version, history._version.save)
    if not history.exists():
        raise FileNotFoundError(
            f"there is no training history of the weights {version}, without which their model is "
            f"not known: put {history._get_load_path()} back, or name other weights with "
            "--load-versions model_weights:<version>"
        )


def _describe_absence(weights: Any) -> str:
    """Say which model is not trained, which are and how to, by the folders of the weights."""
    file = weights._filepath
    loss, dataset = file.parent.name, file.parent.parent.name
    versions = weights._glob_function(str(file.parent.parent / "*" / file.name / "*" / file.name))
    trained = sorted({PurePath(version).parts[-4] for version in versions})
    return (
        f"no model is trained on the data set {dataset} with the loss {loss}: there are no weights "
        f"in {file}. Losses with weights on {dataset}: {', '.join(trained) or 'none'}. This one is "
        "trained with: kedro run --pipelines data_processing,training --params "
        f"dataset={dataset},loss={loss}"
    )


class CheckpointHooks:
    """Remove the checkpoints of a run once its weights and history are saved, and not before."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._unsaved: set[str] = set()

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        """Remember the folder that training is given."""
        if dataset_name == "checkpoints":
            self._folder = data
            self._unsaved = {"model_weights", "training_history"}

    @hook_impl
    def after_dataset_saved(self, dataset_name: str) -> None:
        """Remove it after the last thing that training saves, in whatever order that is."""
        self._unsaved.discard(dataset_name)
        if self._folder is None or self._unsaved:
            return
        folder, self._folder = self._folder, None
        try:
            shutil.rmtree(folder.resolve())
            if folder.is_symlink():  # to a disk for such things, which the next run wants too
                folder.resolve().mkdir()
        except OSError as error:
            logger.warning("could not remove the checkpoints of a run that is done: %s", error)


class ReportHooks:
    """Print the reports of a run when everything is done, where nothing scrolls it away."""

    def __init__(self) -> None:
        self._reports: list[str] = []

    @hook_impl
    def after_node_run(self, outputs: dict[str, Any]) -> None:
        """Keep a report."""
        self._reports += [outputs[name] for name in REPORTS if name in outputs]

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Print them, as text that means nothing but itself."""
        for report in self._reports:
            get_console().print(report, markup=False, highlight=False, soft_wrap=True)
        self._reports = []


class OneRunHooks:
    """Refuse a run beside another of the same process, as a server may be asked for.

    These hooks and Kedro's parameters are shared by all runs of a process: a run would take those
    of the other for its own, and remove its checkpoints. Runs in processes of their own may go
    side by side.
    """

    def __init__(self) -> None:
        self._runs: threading.Thread | None = None
        self._lock = threading.Lock()

    @hook_impl(trylast=True)
    def before_pipeline_run(self) -> None:
        """Take note of the thread that runs, once nothing else can refuse its run.

        A run of the same thread that has not ended was interrupted, as in a notebook.

        Raises:
            RuntimeError: Another one runs.
        """
        me = threading.current_thread()
        with self._lock:
            if self._runs is not None and self._runs is not me and self._runs.is_alive():
                raise RuntimeError(
                    "another run is going on in this process: send the request again once that "
                    "has ended"
                )
            self._runs = me

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self) -> None:
        """Let another one run."""
        self._runs = None

    @hook_impl(tryfirst=True)
    def on_pipeline_error(self) -> None:
        """Let another one run."""
        self._runs = None
