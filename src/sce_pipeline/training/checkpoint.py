"""The state of a run on disk, so that a run that is cut off goes on where it was."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from sce_pipeline.provenance import differences

logger = logging.getLogger(__name__)

KEPT = 2
"""States that are kept: should the last be damaged, the one before it serves."""

WRITING = "writing"
"""Folder of the state that is being written; only when it is whole it gets its number."""

SHARED = "shared.pt"
"""File of what all ranks hold alike, written by the first; each has a file of its own beside it."""

LOCK = "lock"
"""File that is locked while a run uses the folder; the system unlocks it when the run ends."""


class CheckpointError(RuntimeError):
    """A folder of checkpoints cannot be used; the message says why and what to do."""


class State(NamedTuple):
    """What a run needs to go on, tensors and plain values.

    Attributes:
        shared: What all ranks hold alike; the first one's is kept.
        own: What differs from rank to rank.
    """

    shared: Mapping[str, Any]
    own: Mapping[str, Any]


class Checkpoints:
    """States of one run, each a folder of files that are written whole or not at all.

    Every file has the number of its state in it, so that files of different states, of which the
    shards of a table might come from different steps, are never taken for one.

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

    def save(self, state: State) -> bool:
        """Write a state, atomically; returns whether that was possible, and warns where it was not.

        All ranks must call it.
        """
        writing = self.folder / WRITING

        def next_number() -> int:  # the same on all ranks, as only ``end`` makes another state
            earlier = self._states()
            return int(earlier[-1].name) + 1 if earlier else 1

        def begin() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def write() -> None:
            number = next_number()
            _write({"number": number, **state.own}, writing / _own_file(self.rank))
            if self.rank == 0:
                shared = {"number": number, "identity": self.identity, **state.shared}
                _write(shared, writing / SHARED)

        def end() -> None:
            writing.rename(self.folder / f"{next_number():06}")
            _sync(self.folder)
            for outdated in self._states()[:-KEPT]:
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

    def load(self) -> State | None:
        """Read the last state that is whole on all ranks, on the CPU; None where there is none yet.

        All ranks must call it.

        Raises:
            CheckpointError: The state is of a run with other parameters or data, or there are
                states and none can be read by all ranks.
        """
        if (found := self.load_ranks([self.rank])) is None:
            return None
        shared, (own,) = found
        return State(shared, own)

    def load_ranks(
        self, ranks: Sequence[int]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Read, of the last state that is whole, what is shared and what each of ``ranks`` has.

        Raises:
            CheckpointError: As for ``load``.
        """
        damaged: list[str] = []
        for folder in reversed(self._states()):
            problem = None
            try:
                shared = _read(folder, SHARED)
                self._check(shared.pop("identity"))  # another number of ranks is no damage
                owns = [_read(folder, _own_file(rank)) for rank in ranks]
            except _DamagedError as error:
                problem = error
                logger.warning("a checkpoint is damaged and passed over: %s", problem)
            if self._agree(problem is None):
                if damaged and self.rank == 0:
                    logger.warning("an older checkpoint, which is whole, is taken: %s", folder)
                return shared, owns
            damaged.append(str(problem or f"{folder}: unreadable on another rank"))
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


class _DamagedError(Exception):
    """A file cannot be read, or is no part of its state."""


def _own_file(rank: int) -> str:
    return f"rank_{rank}.pt"


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Read a file of the state in ``folder``, on the CPU.

    Raises:
        _DamagedError: It is damaged, missing or of another state.
    """
    file = folder / name
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        number = state.pop("number")
    except Exception as error:  # a damaged file can fail in any way
        raise _DamagedError(f"{file}: {error}") from error
    if number != int(folder.name):
        raise _DamagedError(f"{file}: it is of the state {number:06}")
    return state


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
