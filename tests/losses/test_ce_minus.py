from __future__ import annotations

import itertools
import math

import pytest
import torch

from sce_pipeline.losses import LOSSES, Histories
from sce_pipeline.losses.grouped import Groups, grouped_cross_entropy

WAYS = list(itertools.product(("token", "sequence", "batch"), ("history", "target")))


def oracle(batch, items, *, exclude, corrected):
    """CE⁻ token by token, given the draws of each."""
    x, w = batch.hidden, batch.item_embeddings
    total = x.new_zeros(())
    for t, target in enumerate(batch.targets.tolist()):
        excluded = batch.excluded_of(t, exclude)
        negatives = [item for item in items[t].tolist() if item not in {-1, *excluded}]
        weight = (len(w) - len(excluded)) / len(negatives) if corrected and negatives else 1
        partition = (x[t] @ w[target]).exp()
        for item in negatives:
            partition = partition + weight * (x[t] @ w[item]).exp()
        total = total + partition.log() - x[t] @ w[target]
    return total / len(x)


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
@pytest.mark.parametrize("corrected", [False, True])
def test_value_and_gradients(batch, agree, draws_of, shared, exclude, corrected):
    options = {"n_negatives": 6, "shared": shared, "exclude": exclude}
    loss = LOSSES["ce_minus"](**options, log_correction=corrected)
    items = draws_of(*batch[2:], n_items=len(batch.item_embeddings), **options)
    other = batch.like()
    expected = oracle(other, items, exclude=exclude, corrected=corrected)
    agree(loss(*batch), batch, expected, other)


def test_all_candidates_once_give_the_full_cross_entropy(make_batch, agree):
    # With the target excluded, negatives that are the rest of the catalogue leave nothing out.
    batch = make_batch((4, 2), n_items=8)
    rest = torch.tensor([[i for i in range(8) if i != target] for target in batch.targets])
    groups = Groups(rest, 1, log_masses=math.log(7))
    other = batch.like()
    value = grouped_cross_entropy(*batch[:3], groups, triton=False)
    agree(value, batch, LOSSES["ce"]()(*other), other)


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
def test_the_corrected_partition_function_is_unbiased(draws_of, shared, exclude):
    torch.manual_seed(11)  # of the scores
    n_items, n_draws, n_negatives = 12, 4000, 6
    scores = torch.randn(n_items, dtype=torch.float64).exp()
    history = torch.tensor([1, 4, 7, 11])
    excluded = history if exclude == "history" else history[2:3]
    exact = scores.sum() - scores[excluded].sum()

    # Many sequences of one token: independent draws, except where a batch shares one.
    n_sequences, n_batches = (1, n_draws) if shared == "batch" else (n_draws, 1)
    estimates = []
    for seed in range(n_batches):
        torch.manual_seed(seed)  # draws_of leaves the generator as it was
        items = draws_of(
            torch.full((n_sequences,), 7),
            torch.arange(n_sequences),
            Histories(history.repeat(n_sequences), torch.arange(n_sequences + 1) * 4),
            n_items=n_items,
            n_negatives=n_negatives,
            shared=shared,
            exclude=exclude,
        )
        valid = (items >= 0) & (items != 7)
        weights = (n_items - len(excluded)) / valid.sum(1).clamp(min=1)
        sums = (scores[items] * valid).sum(1) * weights
        estimates.append(sums[valid.any(1)])  # nothing drawn estimates nothing
    estimate = torch.cat(estimates)
    error = estimate.std() / len(estimate) ** 0.5
    assert abs(estimate.mean() - exact) < 4 * error  # by chance with one seed in 16,000
    # Without the correction, or with the whole catalogue in it, the test would not pass.
    assert abs(estimate.mean() * n_items / (n_items - len(excluded)) - exact) > 4 * error


def test_a_user_with_every_item_has_nothing_to_contrast(make_batch):
    batch = make_batch((3,), n_items=6, full_history=True)
    with torch.no_grad():
        batch.hidden.mul_(1e6)
    for shared, corrected in itertools.product(("token", "sequence", "batch"), (False, True)):
        loss = LOSSES["ce_minus"](
            n_negatives=4, shared=shared, exclude="history", log_correction=corrected
        )
        again = batch.like()
        result = loss(*again)
        result.backward()
        assert result.item() == 0
        assert not any(gradient.any() for gradient in again.gradients)
