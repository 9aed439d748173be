"""Run the trials of a sweep, one after the other, and pass over those that are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from sce_pipeline.sweeps.search import Search
from sce_pipeline.sweeps.trials import FAILED, FINISHED, SCORE, Records, Trial
from sce_pipeline.sweeps.values import describe

logger = logging.getLogger(__name__)

Execute = Callable[[Trial], Mapping[str, Any]]
"""Runs a trial and returns its outcome, a failure too: ``status`` and what else there is to say."""


def run_trials(
    search: Search, records: Records, execute: Execute, retry_failed: bool
) -> list[dict[str, Any]]:
    """Run what has not run yet; returns the records of all trials, in their order.

    Args:
        search: Which trials there are.
        records: Those of earlier calls; every trial adds its own as soon as it ends.
        execute: Runs a trial.
        retry_failed: Whether to run again what failed.
    """
    done = []
    seconds: list[float] = []
    for number, trial in enumerate(search.propose(), start=1):
        earlier = records.find(trial)
        if earlier is not None and not (retry_failed and earlier["status"] == FAILED):
            record, took = earlier, "ran before"
        else:
            logger.info("trial %d of %d: %s", number, search.n_trials, describe(trial.values))
            started = time.perf_counter()
            outcome = execute(trial)
            seconds.append(time.perf_counter() - started)
            record = records.save(trial, {**outcome, "seconds": round(seconds[-1], 1)})
            left = sum(seconds) / len(seconds) * (search.n_trials - number)
            took = f"{seconds[-1]:.0f} s, about {left:.0f} s left"
        search.tell(trial, record)
        done.append(record)
        _report(number, search.n_trials, record, took)
    return done


def _report(number: int, n_trials: int, record: Mapping[str, Any], took: str) -> None:
    """Log what became of a trial, in one line."""
    place = f"trial {number} of {n_trials}"
    values = describe(record["values"])
    if record["status"] == FINISHED:
        test = record["metrics"].get("ndcg@10")
        on_test = "" if test is None else f", test {test:.4f}"
        score = f"validation NDCG@10 {record[SCORE]:.4f}{on_test}"
        logger.info("%s: %s: %s, %s", place, values, score, took)
    else:
        reason = "out of memory" if record["out_of_memory"] else record["error"].splitlines()[-1]
        logger.warning("%s: %s: failed, %s, %s", place, values, reason, took)
