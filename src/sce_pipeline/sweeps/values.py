"""Dotted names of parameters, and the nested parameters of a run that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def lay_over(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested ``parameters`` with ``values``, by dotted names, laid over them.

    Raises:
        ValueError: A name leads into a value that is not a group, or is given both ways.
    """
    result: dict[str, Any] = copy.deepcopy(dict(parameters))
    for name, value in values.items():
        *groups, last = name.split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name} lies in {group}, which is {place!r} and no group")
        if last in place:
            raise ValueError(f"{name} is varied by the sweep, so --params cannot set it")
        place[last] = copy.deepcopy(value)
    return result


def describe(values: Mapping[str, Any]) -> str:
    """Write values as ``--params`` takes them."""
    return ",".join(f"{name}={value}" for name, value in values.items())
