"""Random numbers that are functions of what they are for: no state, so no order of drawing.

Whoever draws for the same user and the same purpose gets the same numbers, in whatever chunks users
come. The numbers are those of SplitMix64 (Steele, Lea & Flood, 2014) with a stream for each key.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What random numbers are for; each purpose has streams of its own."""

    ITEM_ID = 1
    SUCCESSOR = 2
    LENGTH = 3
    CLUSTER = 4
    CLUSTER_WEIGHT = 5
    STRETCH = 6
    TIME = 7
    SOURCE = 8
    RANK = 9


def streams(seed: int, purpose: Purpose, keys: np.ndarray) -> np.ndarray:
    """Return the stream of each key (a user, an item): int [keys] to uint64 [keys]."""
    start = np.uint64((seed * _GOLDEN + purpose * int(_FIRST)) % _WORD)
    return _mix(_mix(keys.astype(np.uint64) + start))


def uniforms(stream: np.ndarray, counter: int) -> np.ndarray:
    """Return number ``counter`` of each stream, strictly between 0 and 1: to float64, same shape.

    53 bits are drawn, and half of the last one is added.
    """
    bits = _mix(stream + np.uint64((counter + 1) * _GOLDEN % _WORD))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
