from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.models import Packing

lengths = st.lists(st.integers(1, 7), min_size=1, max_size=9)


@given(lengths)
def test_pad_and_unpad_are_inverse_and_pad_with_zeros(lengths):
    packing = Packing.from_lengths(torch.tensor(lengths))
    tokens = torch.randn(sum(lengths), 3)
    padded = packing.pad(tokens)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert torch.equal(packing.unpad(padded), tokens)
    for row, part in zip(padded, tokens.split(lengths), strict=True):
        assert torch.equal(row[: len(part)], part)
        assert not row[len(part) :].any()


@given(lengths)
def test_last_takes_the_end_of_every_sequence(lengths):
    packing = Packing.from_lengths(torch.tensor(lengths))
    tokens = torch.arange(sum(lengths))
    expected = [int(part[-1]) for part in tokens.split(lengths)]
    assert packing.last(tokens).tolist() == expected


def test_gradients_pass_through_padding():
    packing = Packing.from_lengths(torch.tensor([2, 1]))
    tokens = torch.randn(3, 2, requires_grad=True)
    weights = torch.randn(2, 2, 2)
    (packing.pad(tokens) * weights).sum().backward()
    assert torch.equal(tokens.grad, packing.unpad(weights))


@given(lengths, st.data())
def test_split_gives_the_packings_of_the_parts(lengths, data):
    cut = data.draw(st.integers(1, len(lengths)))
    parts = [part for part in (lengths[:cut], lengths[cut:]) if part]
    found = list(Packing.from_lengths(torch.tensor(lengths)).split(map(len, parts)))
    assert len(found) == len(parts)
    for packing, part in zip(found, parts, strict=True):
        expected = Packing.from_lengths(torch.tensor(part))
        for name, values in vars(expected).items():
            assert torch.equal(torch.as_tensor(getattr(packing, name)), torch.as_tensor(values))


def test_a_sequence_may_be_empty():
    packing = Packing.from_lengths(torch.tensor([2, 0, 1]))
    assert packing.offsets.tolist() == [0, 2, 2, 3]
    assert packing.sequence.tolist() == [0, 0, 2]
    assert packing.place.tolist() == [0, 1, 0]


@pytest.mark.parametrize("lengths", [[], [0, 0], [2, -1, 1]])
def test_a_packing_without_tokens_is_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        Packing.from_lengths(torch.tensor(lengths, dtype=torch.int64))
