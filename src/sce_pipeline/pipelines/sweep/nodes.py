"""Nodes of the sweep pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from sce_pipeline.parameters import Sweep, SweepOptions
from sce_pipeline.pipelines.sweep.planning import Planner
from sce_pipeline.pipelines.sweep.process import TrialProcesses
from sce_pipeline.provenance import read_stamp
from sce_pipeline.sweeps.rules import DataSizes, measure_sizes
from sce_pipeline.sweeps.run import run_trials
from sce_pipeline.sweeps.search import build_search
from sce_pipeline.sweeps.trials import FAILED, SCORE, Records

logger = logging.getLogger(__name__)


def choose_sweep(sweep: str | None, sweeps: dict[str, Any]) -> Sweep:
    """Return the sweep that was asked for.

    Raises:
        ValueError: None was.
    """
    if sweep is None:
        raise ValueError(f"choose a sweep with --params sweep=..., one of {', '.join(sweeps)}")
    chosen: TypeAdapter[Sweep] = TypeAdapter(Sweep)
    return chosen.validate_python(sweeps[sweep])


def measure_data(train_sequences: dict[str, np.ndarray]) -> DataSizes:
    """Measure what rules ask for, so that no sequences stay in memory while trials run."""
    return measure_sizes(train_sequences, read_stamp(train_sequences))


def run_sweep(
    sweep: Sweep,
    data_sizes: DataSizes,
    run_request: dict[str, Any],
    sweep_options: SweepOptions,
    sweep_folder: Path,
) -> pl.DataFrame:
    """Run the trials of a sweep that have not run yet, each in a process of its own.

    Returns:
        One row a trial, see ``tabulate``.

    Raises:
        ValueError: A combination is bad.
        KeyboardInterrupt: The sweep or one of its trials was asked to end, and all have ended.
        RuntimeError: The same sweep runs already.
    """
    try:
        with FileLock(sweep_folder / "lock", timeout=0):
            records = Records(sweep_folder / "trials")
            planner = Planner(run_request, data_sizes, sweep.pipelines)
            at_once = sweep_options.trials_at_once
            search = build_search(sweep, planner.plan, records, at_once)
            processes = TrialProcesses(run_request, sweep.pipelines, records.folder, at_once)
            done = run_trials(search, records, processes, sweep_options)
    except Timeout as error:
        raise RuntimeError(f"the same sweep runs already, in {sweep_folder}") from error
    n_failed = sum(record["status"] == FAILED for record in done)
    if n_failed:
        logger.warning(
            "%d of %d trials failed; their logs lie in %s, and --params "
            "sweep_options.retry_failed=true runs them again",
            n_failed,
            len(done),
            records.folder,
        )
    return tabulate(done)


def tabulate(records: list[dict[str, Any]]) -> pl.DataFrame:
    """Lay out records, a row each: what varies, how it ended, version, metrics and costs.

    Values of different kinds in one column, or lists, are written as text; where a trial has no
    such parameter, nothing is.
    """
    names = list(dict.fromkeys(name for record in records for name in record["values"]))
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    facts = (
        "status",
        "version",
        SCORE,
        *("best_epoch", "n_epochs", "memory_mb", "seconds", "out_of_memory", "error", "digest"),
    )
    columns = {name: [record["values"].get(name) for record in records] for name in names}
    return pl.DataFrame(
        [
            *(pl.Series(name, _plain(values)) for name, values in columns.items()),
            *(pl.Series(name, [record.get(name) for record in records]) for name in facts),
            *(
                pl.Series(f"test_{name}", [record["metrics"].get(name) for record in records])
                for name in metrics
            ),
        ]
    )


def _plain(values: list[Any]) -> list[Any]:
    """Return the values of a column, as text where they are not of one plain kind."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return [float(value) if float in kinds and value is not None else value for value in values]
    return [None if value is None else str(value) for value in values]
