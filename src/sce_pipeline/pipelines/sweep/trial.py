"""The process of one trial, ``python -m`` this module; standard input says what to run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
from kedro.io import AbstractDataset
from kedro.io.core import generate_timestamp

from sce_pipeline.sweeps.trials import FAILED, FINISHED, SCORE

MONITOR = SCORE.removeprefix("validation_")
"""Name of the score among an epoch's metrics."""


def main() -> None:
    """Run what the first line of the standard input says, and write what became of it."""
    message = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    configure_project("sce_pipeline")
    answer = Path(message["answer"])
    try:
        # The same trial of a sweep that was killed may still be saving its state.
        with FileLock(answer.with_suffix(".running")):
            outcome = run(message)
    except Exception as error:
        outcome = describe_failure(error)
        traceback.print_exc()
    writing = answer.with_suffix(".writing")
    writing.write_text(json.dumps(outcome), encoding="utf8")
    writing.replace(answer)


def run(message: Mapping[str, Any]) -> dict[str, Any]:
    """Run the pipelines and collect what the run saved."""
    session = create_session(message)
    with session:
        session.run(pipeline_names=message["pipelines"])
        catalog = session.load_context().config_loader["catalog"]
    version = session.session_id
    history = _load("training_history", catalog, version)
    metrics = _load("metrics", catalog, version) if "evaluation" in message["pipelines"] else {}
    best = history["epochs"][history["best_epoch"] - 1]
    return {
        "status": FINISHED,
        "version": version,
        SCORE: best[MONITOR],
        "best_epoch": history["best_epoch"],
        "n_epochs": len(history["epochs"]),
        "memory_mb": max(epoch["memory_mb"] for epoch in history["epochs"]),
        "metrics": {
            name: value["value"]
            for name, value in metrics.get("model", {}).items()
            if isinstance(value, dict)
        },
    }


def create_session(message: Mapping[str, Any]) -> KedroSession:
    """Return a session that has a version of its own among the trials on a data set.

    Versions count milliseconds, in which others may start too: one after the other they differ.
    """
    with FileLock(message["starting"]):
        session = KedroSession.create(
            message["project_path"],
            env=message["env"],
            conf_source=message["conf_source"],
            runtime_params=message["runtime_params"],
        )
        while generate_timestamp() == session.session_id:
            time.sleep(0.001)
    return session


def describe_failure(error: BaseException) -> dict[str, Any]:
    """Put an error into words, with those that it came from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return {
        "status": FAILED,
        "error": "\n".join("".join(traceback.format_exception_only(one)).strip() for one in chain),
        "out_of_memory": _is_out_of_memory(chain),
        "metrics": {},
    }


def _is_out_of_memory(chain: list[BaseException]) -> bool:
    if any("OutOfMemoryError" in str(error) for error in chain):  # ranks fail in text alone
        return True
    # It imports torch, which a trial that does not fail may do without.
    from sce_pipeline.profiling.limits import is_out_of_memory  # noqa: PLC0415

    return is_out_of_memory(chain[0])


def _load(name: str, catalog: Mapping[str, Any], version: str) -> Any:
    """Load what this run saved, and not what another saved since."""
    config = dict(catalog[name])  # which from_config changes
    dataset = AbstractDataset.from_config(name, config, load_version=version)
    return dataset.load()


def _end_with_the_sweep() -> None:
    """Ask this process to end when the sweep does, as Ctrl-C would; training saves its state."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
