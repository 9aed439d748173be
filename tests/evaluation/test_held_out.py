from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.evaluation import held_out as held_out_module
from sce_pipeline.evaluation.held_out import UserBlocks, check_sequences


@pytest.fixture
def sequences(held_out):
    return held_out([[3, 1, 4, 1], [5], [2, 6, 5]], [2, 0, 3], n_items=7, max_length=2)


@pytest.mark.parametrize("users_at_once", [1, 2, 3, 512])
def test_blocks_hold_every_user_once_with_the_last_items_of_the_history(
    sequences, monkeypatch, users_at_once
):
    monkeypatch.setattr(held_out_module, "USERS_AT_ONCE", users_at_once)
    blocks = UserBlocks(sequences, filter_seen=True)
    inputs, targets, seen = [], [], []
    for block in blocks:
        assert block.items.dtype == block.targets.dtype == torch.int64
        inputs += [part.tolist() for part in block.items.split(block.packing.lengths.tolist())]
        targets += block.targets.tolist()
        items, offsets = block.seen
        seen += [part.tolist() for part in items.split(offsets.diff().tolist())]
    assert len(blocks) == len(list(blocks)) == -(-3 // users_at_once)
    assert inputs == [[4, 1], [5], [6, 5]]
    assert targets == [2, 0, 3]
    assert seen == [[3, 1, 4, 1], [5], [2, 6, 5]]


def test_nothing_is_left_out_where_seen_items_may_be_recommended(sequences):
    (block,) = UserBlocks(sequences, filter_seen=False)
    assert block.seen is None


def test_blocks_are_cut_out_on_the_device_and_their_ends_known_on_the_cpu(sequences):
    # Tensors of the meta device have no values: to look at one is an error.
    (block,) = UserBlocks(sequences, filter_seen=True).to("meta")
    items, offsets = block.seen
    tensors = [block.items, block.packing.sequence, block.packing.place, block.targets, items]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [len(tensor) for tensor in tensors] == [5, 5, 5, 3, 8]
    assert offsets.tolist() == [0, 4, 5, 8]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 60))
def test_blocks_are_as_large_as_users_and_tokens_allow(device, lengths, users, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out_module, "USERS_AT_ONCE", users)
        cuts = held_out_module._cuts(np.array(lengths), torch.device(device), tokens)

    def fits(start, stop):
        block = lengths[start:stop]  # on a CPU attention pads
        size = sum(block) if device == "cuda" else len(block) * max(block)
        return stop - start <= users and size <= tokens

    assert cuts[0] == 0
    assert cuts[-1] == len(lengths)
    for start, stop in pairwise(cuts):
        assert stop == start + 1 or (stop > start and fits(start, stop))
        assert stop == len(lengths) or not fits(start, stop + 1)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("targets", [2, 0], r"targets must hold one item for each of 3 users, got 2"),
        ("offsets", [0, 4, 8], r"offsets must hold 4 places for 3 users, got 3"),
        ("offsets", [1, 4, 5, 8], r"offsets must run from 0 to 8, .* got 1 to 8"),
        ("offsets", [0, 4, 5, 7], r"offsets must run from 0 to 8, .* got 0 to 7"),
        ("offsets", [0, 4, 4, 8], r"user 1 goes from 4 to 4"),
        ("offsets", [0, 5, 4, 8], r"user 1 goes from 5 to 4"),
        ("users", [4, 9, 4], r"user 4 comes more than once"),
        ("items", [3, 1, 4, 1, 5, 2, 6, 7], r"items must lie in 0..6, got 1..7"),
        ("items", [3, 1, 4, 1, 5, 2, 6, -1], r"items must lie in 0..6, got -1..6"),
        ("targets", [2, 0, 7], r"targets must lie in 0..6, got 0..7"),
    ],
)
def test_malformed_arrays_are_errors_that_name_them(sequences, name, values, message):
    check_sequences(sequences)
    sequences[name] = np.array(values)
    with pytest.raises(ValueError, match=message):
        UserBlocks(sequences, filter_seen=True)


def test_no_user_is_an_error(held_out):
    with pytest.raises(ValueError, match="there is no held-out user"):
        check_sequences(held_out([], [], n_items=3))
