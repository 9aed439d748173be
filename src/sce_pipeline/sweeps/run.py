"""Run the trials of a sweep, some side by side, and pass over those that are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from sce_pipeline.parameters import SweepOptions
from sce_pipeline.sweeps.search import Proposal, Search
from sce_pipeline.sweeps.trials import FAILED, FINISHED, SCORE, Records, Trial
from sce_pipeline.sweeps.values import describe

logger = logging.getLogger(__name__)

ATTENTION = 0.5
"""Seconds after which Ctrl-C is answered at the latest: Polars' handler lets waits go on."""


class Runner(Protocol):
    """Something that runs trials, in as many threads as call it."""

    def run(self, trial: Trial) -> Mapping[str, Any]:
        """Run a trial; returns its outcome, a failure too: ``status`` and what else there is."""

    def close(self) -> None:
        """Ask all trials that run to end, for ``run`` to return or raise soon."""


def run_trials(
    search: Search, records: Records, runner: Runner, options: SweepOptions
) -> list[dict[str, Any]]:
    """Run what has not run yet; returns the records of all trials, in the order of the search.

    A trial that is the same as one that runs waits for that one, and has its record.

    Args:
        search: Which trials there are.
        records: Those of earlier calls; every trial adds its own as soon as it ends.
        runner: Runs a trial. It is closed at the end, whatever that is.
        options: How many trials run at once, and whether what failed is run again.
    """
    trials = _Trials(search.n_trials, options.trials_at_once)
    with ThreadPoolExecutor(options.trials_at_once) as pool, closing(runner):
        for number, proposal in enumerate(search.propose(), start=1):
            trials.wait_for(proposal.trial)
            earlier = records.find(proposal.trial)
            if earlier is not None and not (options.retry_failed and earlier["status"] == FAILED):
                trials.end(number, proposal, earlier)
                continue
            future = pool.submit(_run, runner, records, proposal.trial)
            trials.start(number, proposal, future)
            trials.wait_for_a_place()
        trials.wait_for_all()
    return trials.records()


def _run(runner: Runner, records: Records, trial: Trial) -> dict[str, Any]:
    """Run a trial and save its record at once, whatever becomes of the sweep meanwhile."""
    started = time.perf_counter()
    outcome = runner.run(trial)
    return records.save(trial, {**outcome, "seconds": round(time.perf_counter() - started, 1)})


@dataclass(frozen=True)
class _Running:
    """A trial that runs, its place in the search, and when it started."""

    number: int
    proposal: Proposal
    started: float


class _Trials:
    """Those that run and those that have ended, with a line in the log for each.

    Args:
        n_trials: How many the search has.
        at_once: How many may run at once.
    """

    def __init__(self, n_trials: int, at_once: int) -> None:
        self._n_trials = n_trials
        self._at_once = at_once
        self._running: dict[Future[dict[str, Any]], _Running] = {}
        self._ended: dict[int, dict[str, Any]] = {}
        self._seconds: list[float] = []

    def records(self) -> list[dict[str, Any]]:
        """Return the records of what has ended, in the order of the search."""
        return [self._ended[number] for number in sorted(self._ended)]

    def start(self, number: int, proposal: Proposal, future: Future[dict[str, Any]]) -> None:
        """Take note of a trial that runs from now on."""
        values = describe(proposal.trial.values)
        logger.info("trial %d of %d: %s", number, self._n_trials, values)
        self._running[future] = _Running(number, proposal, time.perf_counter())

    def end(
        self, number: int, proposal: Proposal, record: dict[str, Any], seconds: float | None = None
    ) -> None:
        """Take note of a trial that has ended, after so many seconds or in an earlier call."""
        self._ended[number] = record
        proposal.tell(record)
        took = "ran before"
        if seconds is not None:
            self._seconds.append(seconds)
            took = f"{seconds:.0f} s, about {self._seconds_left():.0f} s left"
        _report(number, self._n_trials, record, took)

    def wait_for(self, trial: Trial) -> None:
        """Wait until none runs that is the same as ``trial``."""
        while any(one.proposal.trial.digest == trial.digest for one in self._running.values()):
            self._wait()

    def wait_for_a_place(self) -> None:
        """Wait until another may run."""
        while len(self._running) >= self._at_once:
            self._wait()

    def wait_for_all(self) -> None:
        """Wait until none runs."""
        while self._running:
            self._wait()

    def _wait(self) -> None:
        """Wait until one ends, or more.

        Raises:
            KeyboardInterrupt: It was asked to end, so the sweep is.
            OSError: Its record cannot be written.
        """
        ended: set[Future[dict[str, Any]]] = set()
        while not ended:
            ended = wait(self._running, ATTENTION, FIRST_COMPLETED).done
        for future in ended:
            record = future.result()
            one = self._running.pop(future)
            self.end(one.number, one.proposal, record, time.perf_counter() - one.started)

    def _seconds_left(self) -> float:
        """Estimate how long what runs and what has not started will take, from what has ended."""
        mean = sum(self._seconds) / len(self._seconds)
        now = time.perf_counter()
        running = sum(max(mean - (now - one.started), 0) for one in self._running.values())
        waiting = self._n_trials - len(self._ended) - len(self._running)
        places = max(1, min(self._at_once, len(self._running) + waiting))
        return (running + waiting * mean) / places


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
