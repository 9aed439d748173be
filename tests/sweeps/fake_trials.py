"""Sweeps whose trials are calls of a function."""

from __future__ import annotations

import threading

from pydantic import TypeAdapter

from sce_pipeline.parameters import Sweep, SweepOptions
from sce_pipeline.sweeps.run import run_trials
from sce_pipeline.sweeps.search import build_search
from sce_pipeline.sweeps.trials import SCORE, Trial, digest_of

FAILURE = {"status": "failed", "error": "it broke", "out_of_memory": False, "metrics": {}}


def parse(**sweep):
    return TypeAdapter(Sweep).validate_python(sweep)


def plan(values):
    if any(value == "bad" for value in values.values()):
        raise ValueError("that is bad")
    return Trial(dict(values), dict(values), digest_of(values))


def finish(score=0.5):
    return {"status": "finished", SCORE: score, "metrics": {}}


class FakeRunner:
    """Runs trials by a function, and knows whether it was asked to end them."""

    def __init__(self, run):
        self.run = run
        self.closed = threading.Event()

    def close(self):
        self.closed.set()


def run(sweep, records, execute, retry_failed=False, at_once=1):
    """Run a sweep; ``execute`` takes a trial."""
    options = SweepOptions(retry_failed=retry_failed, trials_at_once=at_once)
    search = build_search(sweep, plan, records, at_once)
    runner = execute if isinstance(execute, FakeRunner) else FakeRunner(execute)
    return run_trials(search, records, runner, options)
