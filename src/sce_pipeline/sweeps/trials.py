"""Trials and their records: one file each, by which a sweep knows what was done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED, FAILED = "finished", "failed"

SCORE = "validation_ndcg@10"
"""What trials are compared by, the best of all epochs."""


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
        values: What the sweep varies, by dotted names, with rules computed.
        runtime_params: What a run of it is given as ``--params``.
        digest: Of all parameters in force, so that a change of any default makes another trial.
    """

    values: Mapping[str, Any]
    runtime_params: Mapping[str, Any]
    digest: str


def digest_of(parameters: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with any parameter."""
    text = json.dumps(parameters, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Records:
    """What became of trials, one JSON file each, written whole or not at all.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, trial: Trial) -> dict[str, Any] | None:
        """Return the record of a trial, None if it has not ended yet."""
        try:
            return json.loads(self._path(trial).read_text(encoding="utf8"))
        except FileNotFoundError:
            return None

    def save(self, trial: Trial, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record of a trial, in place of an earlier one; returns it.

        Args:
            trial: What ran.
            outcome: ``status``, finished or failed, and what else there is to say.
        """
        record = {"digest": trial.digest, "values": dict(trial.values), **outcome}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(trial)
        writing = path.with_suffix(".writing")
        with writing.open("w", encoding="utf8") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
        return record

    def _path(self, trial: Trial) -> Path:
        return self.folder / f"{trial.digest}.json"
