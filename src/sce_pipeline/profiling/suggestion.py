"""Which loss and which settings suit a data set on this device, from what steps were seen to cost.

State is four copies of every weight in float32: the weight, its gradient and Adam's two moments. A
step in several parts adds a fifth copy of the item table, since each part makes a gradient of its
own that is then added to the sum. A CPU's Adam takes two more for a moment, which is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sce_pipeline.losses.cast_table import CAST_BYTES
from sce_pipeline.profiling.steps import Cost

EXACT = ("cce", "ce")
"""Losses that are the cross-entropy over all items, the first one first."""

NEAREST = "cce_minus"
"""The loss that, with thousands of negatives, ranked most like those at every size tried."""

COPIES = 4
"""Of a weight: itself, its gradient and Adam's moments."""

USABLE = 0.9
"""Share of the memory that is planned with; an allocator cannot make use of all."""


class Choice(NamedTuple):
    """A loss and why it was chosen."""

    loss: str
    reason: str


class Need(NamedTuple):
    """What decides whether training fits.

    Attributes:
        free: Bytes that a device has.
        table: Bytes of the item table.
        cast: Bytes of the item table in the dtype of products, 0 where that is its own.
        rest: Bytes of all other weights.
        activations: Bytes that the backbone keeps of a step when a device computes it at once.
        loss: Bytes that the loss takes then, beside the cast. Devices that share the item table
            each hold the tokens of all for it, so only parts make it less.
        other: Bytes beside these, such as the data set on the device, which nothing makes less.
        batch: How large a step is, in the unit of ``batch_name``.
        batch_name: The parameter of training that says so.
        n_sequences: Sequences of a step, at least.
        n_parts: Parts in which a step did not fit.
    """

    free: int
    table: int
    cast: int
    rest: int
    activations: int
    loss: int
    other: int
    batch: int
    batch_name: str
    n_sequences: int
    n_parts: int


def choose_loss(costs: Mapping[str, Cost | None], max_slowdown: float) -> Choice | None:
    """Return the loss to train with, None if none fits.

    The faster exact one, unless its epoch takes more than ``max_slowdown`` times as long as one of
    CCE⁻, which is chosen then. How fast other losses are says nothing, as long as one of these two
    fits: they may rank far worse.

    Args:
        costs: What steps of each loss cost, None where they do not fit.
        max_slowdown: At least 1.
    """
    seconds = {name: cost.epoch_seconds for name, cost in costs.items() if cost is not None}
    if not seconds:
        return None
    exact = min((name for name in EXACT if name in seconds), key=seconds.__getitem__, default=None)
    if exact is not None and NEAREST in seconds:
        return _weigh(exact, seconds[exact] / seconds[NEAREST], max_slowdown)
    if exact is not None:
        return Choice(exact, f"it is exact, over all items, and {_absence(NEAREST, costs)}")
    why_not = f"of the exact losses, {' and '.join(_absence(name, costs) for name in EXACT)}"
    if NEAREST in seconds:
        return Choice(NEAREST, f"{why_not}; with many negatives {NEAREST} ranks much like these")
    fastest = min(seconds, key=seconds.__getitem__)
    return Choice(fastest, f"{why_not}; {fastest} is the fastest loss that fits")


def settle_sizes(need: Need) -> dict[str, Any] | None:
    """Return settings of training with which CCE fits, None if no number of devices suffices.

    On as few devices as possible, which share the item table if there are several: a step in parts,
    which leaves the result as it is, or else a smaller batch.

    Args:
        need: What was measured with settings that did not fit.
    """
    usable = USABLE * need.free
    for devices in _doubling(need.n_sequences):
        shared = {"devices": devices, "item_table": "sharded"} if devices > 1 else {}
        table, working = need.table / devices, need.activations / devices + need.loss
        whole = COPIES * (table + need.rest) + min(need.cast / devices, CAST_BYTES) + need.other
        parts_left = [
            parts
            for parts in _doubling(need.n_sequences // devices)
            if devices > 1 or parts > need.n_parts
        ]
        for parts in parts_left:
            another_gradient = table if parts > 1 else 0
            if whole + another_gradient + working / parts <= usable:
                return {**shared, "accumulation_steps": parts}
        for parts in parts_left:
            if whole + working / parts <= usable:
                smaller = {need.batch_name: need.batch // parts}
                return {**shared, **smaller, "accumulation_steps": 1}
    return None


def explain_sizes(need: Need, settings: Mapping[str, Any] | None) -> str:
    """Say why nothing fits, and what the settings make of it."""
    state = COPIES * (need.table + need.rest)
    batch = need.activations + need.loss + min(need.cast, CAST_BYTES) + need.other
    why = (
        f"no loss fits: {COPIES} copies of the weights (with gradients and Adam's moments) take "
        f"{_gigabytes(state)}, a step's batch about {_gigabytes(batch)} more, and "
        f"{_gigabytes(need.free)} are free"
    )
    if settings is None:
        return (
            f"{why}; no number of devices changes that with this batch: lower "
            "training.model.hidden_size or drop rare items with data_processing.filters"
        )
    devices = settings.get("devices", 1)
    remedies = []
    if devices > 1:
        each = _gigabytes(COPIES * need.table / devices)
        remedies.append(f"each of {devices} devices holds {each} of what the item table takes")
    if (parts := settings["accumulation_steps"]) > 1:
        remedies.append(f"a step in {parts} parts needs {parts} times less memory for the batch")
    if (smaller := settings.get(need.batch_name)) is not None:
        remedies.append(f"a {need.batch_name} of {smaller:,} rather than {need.batch:,} needs less")
    return f"{why}; {', and '.join(remedies)}"


def _weigh(exact: str, slowdown: float, max_slowdown: float) -> Choice:
    """Choose between an exact loss and what ranks much like it, by how much slower it is."""
    if slowdown <= 1:
        return Choice(exact, f"it is exact, over all items, and no slower than {NEAREST} here")
    times = f"{slowdown:.2f} times as long as with {NEAREST}"
    if slowdown <= max_slowdown:
        why = f"it is exact, over all items, and an epoch takes {times}"
        return Choice(exact, f"{why}; up to {max_slowdown:g} times is worth it")
    why = f"an epoch with {exact}, which is exact, takes {times}, more than {max_slowdown:g}"
    return Choice(NEAREST, f"{why}; with many negatives {NEAREST} ranks much like it")


def _absence(loss: str, costs: Mapping[str, Cost | None]) -> str:
    return f"{loss} {'does not fit' if loss in costs else 'was not tried'}"


def _doubling(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... up to ``most``."""
    number = 1
    while number <= most:
        yield number
        number *= 2


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GB"
