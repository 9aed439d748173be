"""Run trials in processes of their own, so that whatever ends one does not end the sweep."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import sce_pipeline
from sce_pipeline.sweeps.trials import FAILED, Trial

logger = logging.getLogger(__name__)

LAST_LINES = 20
"""Lines of a trial's log that its record keeps, where the process left no word of its own."""

ASKED_TO_END = {
    code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)
}
"""Exit codes of a process that ended because somebody wanted it to."""


class TrialProcesses:
    """Runs trials in processes of their own, as many at once as there are threads that ask.

    A process reads what to do from its standard input, which stays open as long as this process
    lives and wants it to go on. What it prints goes to ``<digest>.log``.

    Args:
        request: Project, configuration and environment.
        pipelines: The pipelines of a run.
        folder: Where the logs go, in the folder of a sweep among those of the data set.
        at_once: How many processes share this machine's cores.
    """

    def __init__(
        self, request: Mapping[str, Any], pipelines: Sequence[str], folder: Path, at_once: int
    ) -> None:
        self._request = request
        self._pipelines = list(pipelines)
        self._folder = folder
        self._environment = _environment(at_once)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def run(self, trial: Trial) -> dict[str, Any]:
        """Run a trial to its end and return its outcome.

        Raises:
            KeyboardInterrupt: The trial was asked to end, as when a cluster takes the machine
                away. It has not failed: the next call of the sweep goes on with it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        log, answer = (self._folder / f"{trial.digest}.{end}" for end in ("log", "outcome"))
        answer.unlink(missing_ok=True)
        message = {
            **{name: self._request[name] for name in ("project_path", "conf_source", "env")},
            "runtime_params": trial.runtime_params,
            "pipelines": self._pipelines,
            "answer": str(answer.absolute()),
            "starting": str(self._folder.absolute().parents[1] / ".starting"),
        }
        with log.open("wb") as output, self._start(message, output) as process:
            code = process.wait()
        with self._lock:
            self._running.discard(process)
            ends = self._closed
        try:
            outcome = json.loads(answer.read_text(encoding="utf8"))
        except FileNotFoundError:
            outcome = _describe_death(code, log)
        finally:
            answer.unlink(missing_ok=True)
        # Whoever is asked to end may fail by that, in any way.
        if code in ASKED_TO_END or (ends and outcome["status"] == FAILED):
            raise KeyboardInterrupt(f"the trial was asked to end; its log is {log}")
        return outcome

    def close(self) -> None:
        """Ask all processes to end, and let none start any more; training saves its state."""
        with self._lock:
            self._closed = True
            if self._running:
                logger.warning("waiting for %d trials to end where they are", len(self._running))
            for process in self._running:
                assert process.stdin is not None  # noqa: S101
                process.stdin.close()

    def _start(self, message: Mapping[str, Any], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a process and say what it is to do.

        Raises:
            KeyboardInterrupt: None is to start any more.
        """
        with self._lock:
            if self._closed:
                raise KeyboardInterrupt("the sweep ends")
            process = subprocess.Popen(
                [sys.executable, "-m", "sce_pipeline.pipelines.sweep.trial"],
                bufsize=0,  # or closing the pipe to a process that has died would fail again
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._request["project_path"],
                env=self._environment,
                # Ctrl-C at a terminal reaches the sweep alone, which asks to end but once: whoever
                # is asked twice does not save its state.
                start_new_session=True,
            )
            self._running.add(process)
            assert process.stdin is not None  # noqa: S101
            with contextlib.suppress(BrokenPipeError):  # it has died, and its exit code says how
                process.stdin.write(json.dumps(message).encode() + b"\n")
        return process


def _environment(at_once: int) -> dict[str, str]:
    """Return the environment with this very package in front.

    Of several processes each takes its share of the cores, unless the environment says how many.
    """
    source = str(Path(sce_pipeline.__file__).absolute().parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    share = {"OMP_NUM_THREADS": str(max(1, _cores() // at_once))} if at_once > 1 else {}
    return {**share, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
