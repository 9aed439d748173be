from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.models import draw_mask

lengths = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
probabilities = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)


def draw(lengths, probability, last_probability, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return draw_mask(torch.as_tensor(lengths), probability, last_probability, generator)


@given(lengths, probabilities, probabilities, seeds)
def test_every_sequence_has_a_masked_token(lengths, probability, last_probability, seed):
    masked = draw(lengths, probability, last_probability, seed)
    assert (masked.dtype, masked.shape) == (torch.bool, (sum(lengths),))
    assert all(part.any() for part in masked.split(lengths) if len(part))
    assert torch.equal(masked, draw(lengths, probability, last_probability, seed))


@given(lengths, probabilities, seeds)
def test_at_a_last_probability_of_one_the_last_token_is_masked_and_no_other(
    lengths, probability, seed
):
    masked = draw(lengths, probability, 1.0, seed)
    for part in masked.split(lengths):
        assert part.tolist() == [False] * (len(part) - 1) + [True] * bool(len(part))


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize(("probability", "last_probability"), [(0.2, 0.0), (0.6, 0.1)])
def test_a_token_is_masked_as_often_as_it_should_be(length, probability, last_probability):
    n_sequences = 40_000
    lengths = torch.full((n_sequences,), length)
    masked = draw(lengths, probability, last_probability).view(n_sequences, length).double()
    usual = probability + (1 - probability) ** length / length  # at least one of them
    wanted = torch.full((length,), (1 - last_probability) * usual, dtype=torch.float64)
    wanted[-1] += last_probability
    deviation = (wanted * (1 - wanted) / n_sequences).sqrt()
    assert ((masked.mean(0) - wanted).abs() < 4 * deviation).all()


def test_tokens_of_a_sequence_are_masked_independently():
    n_sequences, length, probability = 20_000, 20, 0.4
    lengths = torch.full((n_sequences,), length)
    masked = draw(lengths, probability, 0.0).view(n_sequences, length).double()
    correlation = torch.corrcoef(masked.T) - torch.eye(length)
    assert correlation.abs().max() < 5 / n_sequences**0.5


def test_the_one_token_of_a_sequence_that_would_have_none_may_be_any():
    n_sequences, length = 30_000, 6
    masked = draw(torch.full((n_sequences,), length), 1e-9, 0.0).view(n_sequences, length)
    assert (masked.sum(1) == 1).all()
    expected = n_sequences / length
    statistic = ((masked.sum(0) - expected) ** 2 / expected).sum()
    assert statistic < 20.5  # a chi-square of 5 degrees of freedom is so with probability 0.999


def test_whole_sequences_are_those_with_the_last_token_alone():
    n_sequences, length = 30_000, 40
    masked = draw(torch.full((n_sequences,), length), 0.5, 0.09).view(n_sequences, length)
    alone = (masked.sum(1) == 1) & masked[:, -1]  # by chance once in 2 ** 40
    deviation = (0.09 * 0.91 / n_sequences) ** 0.5
    assert alone.double().mean() == pytest.approx(0.09, abs=4 * deviation)


def test_sequences_without_a_token_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        draw([0, 0], 0.2, 0.1)
