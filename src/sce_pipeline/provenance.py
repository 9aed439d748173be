"""Stamps on arrays: the parameters sequences were made with, and the items that they number.

Data of a data set lies in one place whatever its split and filters, so a partial run could meet
sequences that an earlier run made with other parameters, or weights that were trained on an earlier
log, in which a number stood for another item. The stamps let it see so. Rankings bear that of the
items, and the version of the weights that ranked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sce_pipeline.parameters import DataProcessingParameters

STAMP = "parameters"
"""Name of the stamp among the arrays: the parameters as JSON, one byte an entry."""

ITEM_STAMP = "item_fingerprint"
"""Name of the other stamp among the arrays: a fingerprint in hexadecimal, one byte an entry."""

WEIGHTS_STAMP = "weights_version"
"""Name of the stamp of rankings: the version of the weights that ranked, one byte an entry."""


def stamp(parameters: DataProcessingParameters) -> dict[str, np.ndarray]:
    """Return the stamp of ``parameters``, uint8 [bytes], by its name."""
    text = json.dumps(parameters.model_dump(mode="json"), sort_keys=True)
    return {STAMP: np.frombuffer(text.encode(), dtype=np.uint8)}


def read_stamp(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters that stamped arrays were made with."""
    return json.loads(arrays[STAMP].tobytes())


def stamp_items(item_ids: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the stamp of the items' original ids in the order of their numbers, by its name."""
    return {ITEM_STAMP: np.frombuffer(fingerprint_texts(item_ids).encode(), dtype=np.uint8)}


def read_item_stamp(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the fingerprint of the ids of the items that stamped arrays number.

    Raises:
        ValueError: They have none, as they were made before there was this stamp.
    """
    if ITEM_STAMP not in arrays:
        raise ValueError(
            "the sequences do not say which items they number, as an earlier version of "
            "sce_pipeline made them; run the pipeline data_processing again"
        )
    return arrays[ITEM_STAMP].tobytes().decode()


def stamp_weights(version: str) -> dict[str, np.ndarray]:
    """Return the stamp of the weights that ranked, by its name."""
    return {WEIGHTS_STAMP: np.frombuffer(version.encode(), dtype=np.uint8)}


def read_origin(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what both stamps say, as it goes on record of what is made of the arrays.

    Raises:
        ValueError: The arrays have no stamp of items.
    """
    return {"data_processing": read_stamp(arrays), ITEM_STAMP: read_item_stamp(arrays)}


def check_stamp(arrays: Mapping[str, np.ndarray], parameters: DataProcessingParameters) -> None:
    """Check that arrays were made with the parameters that are asked for.

    Raises:
        ValueError: They were not; the message lists the differences.
    """
    if found := differences(read_stamp(arrays), parameters.model_dump(mode="json")):
        raise ValueError(
            f"the sequences were made with data_processing.{', '.join(found)}; "
            "run the pipeline data_processing again with the parameters of this run"
        )


def differences(made: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """List where nested values differ, as ``name = value rather than value``."""
    flat_made, flat_asked = dict(flatten(made)), dict(flatten(asked))
    return [
        f"{name} = {flat_made.get(name)!r} rather than {flat_asked.get(name)!r}"
        for name in sorted(flat_made.keys() | flat_asked.keys())
        if flat_made.get(name) != flat_asked.get(name)
    ]


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a number, in hexadecimal, that changes with any value of the arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def fingerprint_texts(texts: Iterable[str | None]) -> str:
    """Return a number, in hexadecimal, that changes with any of the texts or their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = b"" if text is None else text.encode()
        digest.update(f"{-1 if text is None else len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Go through nested values by their full names, as ``name.of.a.value``."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
