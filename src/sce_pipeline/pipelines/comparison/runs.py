"""The runs on a data set, put together from what each left in the folders of its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sce_pipeline.provenance import ITEM_STAMP

CUTOFF = 10
"""The k of what is compared, which is also that of validation."""

MONITOR = f"ndcg@{CUTOFF}"
"""The metric by which runs are ordered and compared."""

Partitions = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Run:
    """A model that was trained and measured, or a baseline.

    Attributes:
        version: The version of all outputs.
        model: The backbone or the baseline.
        loss: The loss; None for a baseline.
        history: The training history; of a baseline, the record of parameters and data.
        metrics: What ``measure`` returned.
        load_rankings: Loads what ``rank_all`` returned.
    """

    version: str
    model: str
    loss: str | None
    history: dict[str, Any]
    metrics: dict[str, Any]
    load_rankings: Callable[[], dict[str, np.ndarray]]

    @property
    def name(self) -> str:
        """What to call the run in tables, figures and errors."""
        return self.model if self.loss is None else f"{self.model} + {self.loss}, {self.version}"

    @property
    def origin(self) -> dict[str, Any]:
        """Parameters and items of the run's data; no item stamp where an earlier version ran it."""
        return {name: self.history.get(name) for name in ("data_processing", ITEM_STAMP)}

    @property
    def validation(self) -> float:
        """The best validation NDCG@10."""
        return max(epoch[MONITOR] for epoch in self.history["epochs"])


@dataclass(frozen=True)
class Runs:
    """The runs on a data set.

    Attributes:
        dataset: Its name.
        origin: Parameters and items of the test sequences of now.
        complete: Models, then baselines, each by version.
        incomplete: What the others lack, by loss and version.
    """

    dataset: str
    origin: dict[str, Any]
    complete: list[Run]
    incomplete: dict[str, str]

    @property
    def models(self) -> list[Run]:
        """The complete runs of models."""
        return [run for run in self.complete if run.loss is not None]

    def find(self, name: str) -> Run:
        """Return the run of a version, or the latest of a baseline.

        Raises:
            ValueError: There is none, or the version is that of several losses.
        """
        versions = [run for run in self.models if run.version == name]
        if len(versions) > 1:
            losses = ", ".join(str(run.loss) for run in versions)
            raise ValueError(f"comparison.pairs names {name}, a version of {losses}")
        found = versions or [run for run in self.complete if run.loss is None and run.model == name]
        if found:
            return found[-1]
        lacks = "".join(f"; {run} lacks {parts}" for run, parts in self.incomplete.items())
        baselines = sorted({run.model for run in self.complete if run.loss is None})
        raise ValueError(
            f"comparison.pairs names {name}, but the runs are "
            f"{', '.join([*(run.version for run in self.models), *baselines])}{lacks}"
        )

    @property
    def on_other_data(self) -> list[Run]:
        """The complete runs on data of other parameters or items than that of now."""
        return [run for run in self.complete if run.origin != self.origin]

    def best_per_loss(self) -> list[Run]:
        """Choose, of the runs on the data of now, one a loss and the latest of each baseline.

        The best has the highest validation NDCG@10, of equals it is the first: what is chosen for
        its test metrics would be overrated by them.
        """
        chosen: dict[str, Run] = {}
        elsewhere = self.on_other_data
        for run in self.complete:
            if run in elsewhere:
                continue
            key = run.loss or run.model
            if run.loss is None or key not in chosen or run.validation > chosen[key].validation:
                chosen[key] = run
        return list(chosen.values())


def join_parts(
    dataset: str,
    origin: dict[str, Any],
    histories: Partitions,
    metrics: Partitions,
    rankings: Partitions,
) -> Runs:
    """Join what runs left, by loss and version.

    Histories and metrics are loaded, rankings are not. A run is complete with a history, metrics at
    10 and rankings. Popularity, which every evaluation measures again, is that of the latest run on
    each kind of data.

    Args:
        dataset: The name of the data set.
        origin: Parameters and items of the test sequences of now.
        histories: Loaders by ``<loss>/training_history.json/<version>``.
        metrics: Loaders by ``<loss>/metrics.json/<version>``.
        rankings: Loaders by ``<loss>/<name>_rankings.safetensors/<version>/<name>``.
    """
    parts = {
        "training history": {_key(place): load for place, load in histories.items()},
        "metrics": {_key(place): load for place, load in metrics.items()},
    }
    ranked: dict[tuple[str, str], dict[str, Callable[[], Any]]] = {}
    for place, load in rankings.items():
        folder, _, version, name = place.rsplit("/", 3)
        ranked.setdefault((folder, version), {})[name] = load

    models: list[Run] = []
    baselines: list[Run] = []
    incomplete: dict[str, str] = {}
    keys = {*parts["training history"], *parts["metrics"], *ranked}
    for folder, version in sorted(keys, key=lambda key: key[::-1]):
        key = folder, version
        lacks = [part for part, found in parts.items() if key not in found]
        if key not in ranked:
            lacks.append("rankings")
        if lacks:
            incomplete["/".join(key)] = ", ".join(lacks)
            continue
        history, measured = (found[key]() for found in parts.values())
        for name, values in measured.items():
            file = {"model": "test"}.get(name, name)
            wanting = [] if MONITOR in values else [f"metrics at {CUTOFF}"]
            wanting += [] if file in ranked[key] else [f"rankings of {name}"]
            if wanting:
                place = "/".join(key) if name == "model" else f"{'/'.join(key)}, {name}"
                incomplete[place] = ", ".join(wanting)
                continue
            is_model = name == "model"
            run = Run(
                version,
                history["parameters"]["model"]["name"] if is_model else name,
                history["parameters"]["loss"]["name"] if is_model else None,
                history,
                values,
                ranked[key][file],
            )
            (models if is_model else baselines).append(run)
    return Runs(dataset, origin, [*models, *_latest_popularity(baselines)], incomplete)


def _key(place: str) -> tuple[str, str]:
    folder, _, version = place.rsplit("/", 2)
    return folder, version


def _latest_popularity(baselines: Iterable[Run]) -> list[Run]:
    """Leave out popularity as earlier runs measured it again."""
    kept: list[Run] = []
    for run in baselines:
        if run.model == "popularity":
            kept = [
                other for other in kept if other.model != "popularity" or other.origin != run.origin
            ]
        kept.append(run)
    return kept
