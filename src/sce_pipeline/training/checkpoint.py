"""The state of a run on disk, so that a run that is cut off goes on where it was."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sce_pipeline.provenance import differences

logger = logging.getLogger(__name__)

KEPT = 2
"""States that are kept: should the last be damaged, the one before it serves."""

WRITING = "writing"
"""Folder of the state that is being written; only when it is whole it gets its number."""

LOCK = "lock"
"""File that is locked while a run uses the folder; the system unlocks it when the run ends."""


class CheckpointError(RuntimeError):
    """A folder of checkpoints cannot be used; the message says why and what to do."""


class Checkpoints:
    """States of one run, each a folder in which every rank has a file, written whole or not at all.

    Args:
        folder: Where the states are.
        identity: What the run that wrote a state and the one that goes on must have in common.
        rank: Number of this rank.
        agree: Returns whether something is true on every rank, and waits for all of them.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        rank: int = 0,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.rank = rank
        self._agree = agree

    def save(self, state: Mapping[str, Any]) -> bool:
        """Write a state, atomically; returns whether that was possible, and warns where it was not.

        Args:
            state: Tensors and plain values.
        """
        writing = self.folder / WRITING
        file = writing / f"rank_{self.rank}.pt"

        def begin() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def write() -> None:
            _write({"identity": self.identity, **state}, file)

        def end() -> None:
            earlier = self._states()
            number = int(earlier[-1].name) + 1 if earlier else 1
            writing.rename(self.folder / f"{number:06}")
            _sync(self.folder)
            for outdated in earlier[: 1 - KEPT]:
                shutil.rmtree(outdated, ignore_errors=True)

        for act, ranks in ((begin, (0,)), (write, (self.rank,)), (end, (0,))):
            problem = None
            try:
                if self.rank in ranks:
                    act()
            except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error
                problem = error
            if not self._agree(problem is None):  # whatever happened, all ranks come here
                logger.warning(
                    "could not write a checkpoint to %s: %s; training goes on, and the last one "
                    "that could be written stays",
                    self.folder,
                    problem or "another rank failed",
                )
                return False
        return True

    def load(self) -> dict[str, Any] | None:
        """Read the last state that is whole, on the CPU; None where there is none yet.

        Raises:
            CheckpointError: The state is of a run with other parameters or data, or there are
                states and none can be read.
        """
        damaged = []
        for folder in reversed(self._states()):
            file = folder / f"rank_{self.rank}.pt"
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                problem = None
            except Exception as error:  # a damaged file can fail in any way
                problem = error
            if self._agree(problem is None):
                self._check(state.pop("identity"))
                return state
            damaged.append(f"{file}: {problem or 'unreadable on another rank'}")
            logger.warning("a checkpoint is damaged and passed over: %s", damaged[-1])
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; "
                f"remove the folder to start afresh ({'; '.join(damaged)})"
            )
        return None

    def _states(self) -> list[Path]:
        """Return the folders of whole states, the oldest first."""
        return sorted(path for path in self.folder.iterdir() if path.name.isdigit())

    def _check(self, identity: Mapping[str, Any]) -> None:
        if found := differences(identity, self.identity):
            raise CheckpointError(
                f"{self.folder} has a checkpoint of an unfinished run with {', '.join(found)}; "
                "run with the same again to finish it, or remove the folder to start afresh"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep it to this run until the end.

    Raises:
        CheckpointError: The folder cannot be made or written to, or another run uses it.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another run trains in {folder}; wait until it ends, or take another seed"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be written to {folder}: {error}") from error
    with lock:
        yield


def _write(state: Mapping[str, Any], path: Path) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Wait until the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
