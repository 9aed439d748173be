"""The largest inner product within each group of rows, and the products of a few groups.

Both read a bias for each row: 0, or -inf for a row that is left out. A group is ``GROUP`` rows that
follow each other, the last one filled up with rows that are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_pipeline.losses.kernels.common import cdiv, launch, padded
from sce_pipeline.losses.kernels.rows import load_rows, row_products

GROUP = 256
"""Rows whose largest product stands for all of them."""

STATES = 64
"""States whose products a program makes at a time."""

MOST_GROUPS = 32
"""Most groups that a program goes through."""

PROGRAMS = 528
"""Programs to run at the least, four for each multiprocessor of an H100."""

WIDEST_STEP = 64
"""Most columns multiplied at a time."""


def group_maxima(states: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Return the largest product of each state in each group of rows, with factors of bfloat16.

    Args:
        states: bfloat16 [n, d], contiguous.
        table: bfloat16 [rows, d], contiguous.
        bias: float32 [groups * GROUP].

    Returns:
        float32 [groups, n]; -inf for a group of which all rows are left out.
    """
    n_states, d = states.shape
    n_groups = len(bias) // GROUP
    tiles = cdiv(n_states, STATES)
    groups_each = max(1, min(MOST_GROUPS, n_groups * tiles // PROGRAMS))
    maxima = torch.empty(n_groups, n_states, dtype=torch.float32, device=states.device)
    launch(
        _group_maxima,
        (tiles, cdiv(n_groups, groups_each)),
        states,
        table,
        bias,
        maxima,
        n_states,
        len(table),
        n_groups,
        groups_each,
        D=d,
        STEP=min(padded(d), WIDEST_STEP),
        STATES=STATES,
        GROUP=GROUP,
        num_warps=4,
        num_stages=2,
    )
    return maxima


def products_of_groups(
    states: Tensor,
    table: Tensor,
    bias: Tensor,
    pairs: tuple[Tensor, Tensor],
    slots: Tensor,
    products: Tensor,
) -> None:
    """Write the products of some states with some groups of rows, in float32 throughout.

    Args:
        states: Floating [n, d], contiguous.
        table: Floating [rows, d], contiguous.
        bias: float32 [groups * GROUP].
        pairs: The groups and the states, both int64 [pairs].
        slots: Where each pair's products go, int64 [pairs].
        products: float32 [slots, GROUP], contiguous.
    """
    if not len(slots):
        return
    d = states.shape[1]
    launch(
        _products_of_groups,
        (len(slots),),
        states,
        table,
        bias,
        *(numbers.contiguous() for numbers in (*pairs, slots)),
        products,
        len(table),
        D=d,
        STEP=min(padded(d), WIDEST_STEP),
        GROUP=GROUP,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["n_states", "n_rows", "n_groups", "groups_each"])
def _group_maxima(
    states,
    table,
    bias,
    maxima,
    n_states,
    n_rows,
    n_groups,
    groups_each,
    D: tl.constexpr,
    STEP: tl.constexpr,
    STATES: tl.constexpr,
    GROUP: tl.constexpr,
):
    state = tl.program_id(0) * STATES + tl.arange(0, STATES)
    there = state < n_states
    factor = load_rows(states, state, there, 0, D, STEP)
    first = tl.program_id(1) * groups_each
    for group in range(first, tl.minimum(first + groups_each, n_groups)):
        row = group * GROUP + tl.arange(0, GROUP)
        products = row_products(
            factor, states, state, there, table, row, row < n_rows, D, STEP, table.dtype.element_ty
        )
        largest = tl.max(products + tl.load(bias + row)[None, :], 1)
        tl.store(maxima + group * n_states.to(tl.int64) + state, largest, mask=there)


@triton.jit(do_not_specialize=["n_rows"])
def _products_of_groups(
    states,
    table,
    bias,
    groups,
    members,
    slots,
    products,
    n_rows,
    D: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + pair)
    state = tl.load(members + pair)
    place = tl.arange(0, GROUP)
    row = group * GROUP + place
    total = tl.load(bias + row)
    for first in range(0, D, STEP):
        column = first + tl.arange(0, STEP)
        factor = tl.load(states + state * D + column, mask=column < D, other=0.0).to(tl.float32)
        part = load_rows(table, row, row < n_rows, first, D, STEP).to(tl.float32)
        total += tl.sum(part * factor[None, :], 1)
    tl.store(products + tl.load(slots + pair) * GROUP + place, total)
