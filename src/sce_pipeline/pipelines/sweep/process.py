"""Run a trial in a process of its own, so that whatever ends it does not end the sweep."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sce_pipeline
from sce_pipeline.sweeps.trials import FAILED, Trial

LAST_LINES = 20
"""Lines of a trial's log that its record keeps, where the process left no word of its own."""

ASKED_TO_END = {
    code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)
}
"""Exit codes of a process that ended because somebody wanted it to."""


def run_in_process(
    request: Mapping[str, Any], trial: Trial, pipelines: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run a trial to its end and return its outcome.

    The process reads what to do from its standard input, which stays open as long as this process
    lives. What it prints goes to ``<digest>.log``.

    Args:
        request: Project, configuration and environment.
        trial: What to run.
        pipelines: The pipelines of a run.
        folder: Where the log goes.

    Raises:
        KeyboardInterrupt: The trial was asked to end, as when a cluster takes the machine away. It
            has not failed: the next call of the sweep goes on with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, answer = folder / f"{trial.digest}.log", folder / f"{trial.digest}.outcome"
    answer.unlink(missing_ok=True)
    message = {
        **{name: request[name] for name in ("project_path", "conf_source", "env")},
        "runtime_params": trial.runtime_params,
        "pipelines": list(pipelines),
        "answer": str(answer.absolute()),
    }
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "sce_pipeline.pipelines.sweep.trial"],
            bufsize=0,  # or closing the pipe to a process that has died would fail again
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=request["project_path"],
            env=_environment(),
        ) as process,
    ):
        assert process.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it has died, and its exit code says how
            process.stdin.write(json.dumps(message).encode() + b"\n")
        code = process.wait()
    if code in ASKED_TO_END:
        raise KeyboardInterrupt(f"the trial was asked to end; its log is {log}")
    try:
        return json.loads(answer.read_text(encoding="utf8"))
    except FileNotFoundError:
        return _describe_death(code, log)
    finally:
        answer.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    """Return the environment with this very package in front."""
    source = str(Path(sce_pipeline.__file__).absolute().parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _describe_death(code: int, log: Path) -> dict[str, Any]:
    """Say how a process ended that left no word."""
    if code < 0:
        ended = f"the process was ended by {signal.Signals(-code).name}"
    else:
        ended = f"the process ended with code {code}"
    last_lines = log.read_text(encoding="utf8", errors="replace").splitlines()[-LAST_LINES:]
    return {
        "status": FAILED,
        "error": "\n".join([*last_lines, ended]),
        # The system that runs out of memory kills, and leaves no other trace here.
        "out_of_memory": code == -signal.SIGKILL,
        "metrics": {},
    }
