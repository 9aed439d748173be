from __future__ import annotations

import pytest
import torch
from batches import VARIANTS, make_batch, make_loss, masses_but_targets
from torch.utils._python_dispatch import TorchDispatchMode

from sce_pipeline.diagnostics import (
    Candidates,
    find_candidates,
    inspect_loss,
    measure_coverage,
    pooled_cross_entropy,
    shuffle_items,
)
from sce_pipeline.losses import LOSSES, Loss, base
from sce_pipeline.losses.rece import chunked_cross_entropy
from sce_pipeline.losses.sce import Buckets, bucketed_cross_entropy

SHAPES = [((5, 1, 7), 40), ((9,), 12), ((70, 3), 23), ((1, 1), 4)]


def compared_by_gradient(loss, batch, seed):
    """Which items get gradient from which token, bool [tokens, n_items]; told by the loss alone.

    Hidden states that are linearly independent make the table's gradient, a combination of them,
    say how much of it is from which.
    """
    leaf = batch.item_embeddings.clone().requires_grad_()
    torch.manual_seed(seed)
    value = loss(batch.hidden, leaf, *batch[2:])
    (gradient,) = torch.autograd.grad(value, leaf)
    shares = (gradient @ torch.linalg.pinv(batch.hidden)).T
    return (shares.abs() > 1e-9).scatter(1, batch.targets[:, None], False)


def test_all_losses_are_looked_at():
    assert {name for name, _ in VARIANTS.values()} == set(LOSSES)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
@pytest.mark.parametrize("elements", [1, 2**22])
def test_a_mass_is_that_of_the_items_that_get_gradient(
    variant, lengths, n_items, elements, monkeypatch
):
    batch = make_batch(lengths, n_items)
    loss = make_loss(variant, n_items)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    compared = compared_by_gradient(loss, batch, seed=3)
    coverage = inspect_loss(loss, *batch, seed=3).coverage
    expected = torch.where(compared, masses_but_targets(batch), 0).sum(1)
    torch.testing.assert_close(coverage.mass, expected)
    assert (coverage.pooled_mass > coverage.mass - 1e-12).all()
    if not variant.startswith("sce"):
        torch.testing.assert_close(coverage.pooled_mass, coverage.mass)
        assert coverage.token_share == 1
        assert coverage.items.equal(compared.any(0))
        assert coverage.item_share == compared.any(0).double().mean().item()


@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
@pytest.mark.parametrize("elements", [1, 2**22])
def test_what_sce_covers_bucket_by_bucket(lengths, n_items, elements, monkeypatch):
    batch = make_batch(lengths, n_items, d=6)
    loss = make_loss("sce", n_items)
    torch.manual_seed(1)
    buckets = loss.draw_buckets(*batch[:2])
    probabilities = masses_but_targets(batch)
    sets = [set() for _ in batch.targets]
    largest = torch.zeros(len(batch.targets), dtype=torch.float64)
    for tokens, items in zip(buckets.tokens.tolist(), buckets.items.tolist(), strict=True):
        for token in tokens:
            sets[token] |= set(items)
            largest[token] = max(largest[token], probabilities[token, items].sum())
    pooled = [probabilities[token, list(items)].sum() for token, items in enumerate(sets)]

    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    coverage = measure_coverage(*batch[:3], Candidates.of_buckets(buckets))
    torch.testing.assert_close(coverage.mass, largest)
    torch.testing.assert_close(coverage.pooled_mass, torch.stack(pooled))
    assert coverage.covered.tolist() == [bool(items) for items in sets]
    owners = [items - {target} for items, target in zip(sets, batch.targets.tolist(), strict=True)]
    assert set(coverage.items.nonzero()[:, 0].tolist()) == set().union(*owners)


def oracle_of_pooled(hidden, item_embeddings, targets, buckets):
    losses = []
    for token, target in enumerate(targets.tolist()):
        rows = [row for row, tokens in enumerate(buckets.tokens.tolist()) if token in tokens]
        if not rows:
            continue
        union = {target}.union(*(buckets.items[row].tolist() for row in rows))
        logits = hidden[token] @ item_embeddings[sorted(union)].T
        losses.append(logits.logsumexp(0) - hidden[token] @ item_embeddings[target])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
@pytest.mark.parametrize("elements", [1, 2**22])
def test_pooled_buckets_against_sets_of_items(lengths, n_items, elements, monkeypatch):
    batch = make_batch(lengths, n_items, d=6)
    torch.manual_seed(2)
    buckets = make_loss("sce", n_items).draw_buckets(*batch[:2])
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    leaves = [values.clone().requires_grad_() for values in batch[:2]]
    others = [values.clone().requires_grad_() for values in batch[:2]]
    value = pooled_cross_entropy(*leaves, batch.targets, Candidates.of_buckets(buckets))
    expected = oracle_of_pooled(*others, batch.targets, buckets)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, others)
    )
    assert value > bucketed_cross_entropy(*batch[:3], buckets) - 1e-12


def test_with_one_bucket_a_token_pooling_changes_nothing():
    batch = make_batch((12,), 30, d=6)
    buckets = Buckets(torch.arange(8).view(2, 4), torch.arange(20).view(2, 10))
    candidates = Candidates.of_buckets(buckets)
    coverage = measure_coverage(*batch[:3], candidates)
    torch.testing.assert_close(coverage.mass, coverage.pooled_mass)
    assert coverage.token_share == 8 / 12
    pooled = pooled_cross_entropy(*batch[:3], candidates)
    torch.testing.assert_close(pooled, bucketed_cross_entropy(*batch[:3], buckets))


@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
def test_rece_that_counts_an_item_once_is_pooled(lengths, n_items):
    batch = make_batch(lengths, n_items, d=6)
    loss = make_loss("rece", n_items)
    torch.manual_seed(4)
    candidates = find_candidates(loss, *batch)
    torch.manual_seed(4)
    torch.testing.assert_close(pooled_cross_entropy(*batch[:3], candidates), loss(*batch))


def test_shuffled_chunks_are_as_large_and_hold_any_items():
    batch = make_batch((40,), 101, d=8)
    loss = make_loss("rece", 101)
    torch.manual_seed(0)
    meetings = loss.draw_meetings(*batch[:2])
    seen = torch.zeros(len(meetings.item_order), 101)
    for _ in range(200):
        shuffled = shuffle_items(meetings)
        assert not shuffled.item_order[0].equal(shuffled.item_order[1])
        for round_, order in enumerate(shuffled.item_order.long()):
            assert order.sort().values.tolist() == list(range(101))
            chunks = shuffled.item_chunks[order, round_]
            assert chunks.equal(meetings.item_chunks[meetings.item_order[round_].long(), round_])
        seen += shuffled.item_chunks.T == 2
    expected = (meetings.item_chunks.T == 2).sum(1, keepdim=True) / 101
    # Five deviations of 200 draws.
    assert ((seen / 200 - expected).abs() < 5 * (expected * (1 - expected) / 200).sqrt()).all()
    candidates = Candidates.of_meetings(shuffled)
    value = chunked_cross_entropy(*batch[:3], shuffled, duplicate_correction=True)
    torch.testing.assert_close(pooled_cross_entropy(*batch[:3], candidates), value)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("variant", ["ce", "sce", "rece", "ce_minus-batch-target", "bce"])
def test_tokens_times_items_never_stand_whole(variant, monkeypatch):
    batch = make_batch((300,), 500, d=6)
    loss = make_loss(variant, 500)
    candidates = find_candidates(loss, *batch)
    hidden = batch.hidden.requires_grad_()
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 20_000)
    with LargestTensor() as largest:
        measure_coverage(*batch[:3], candidates)
        pooled_cross_entropy(hidden, *batch[1:3], candidates).backward()
    assert 500 < largest.elements <= 20_000 * 501 / 500  # a column more, for no item


class Unknown(Loss):
    def _mean_loss(self, *arguments):
        raise AssertionError


def test_what_cannot_be_looked_at_is_refused():
    batch = make_batch((3,), 5)
    with pytest.raises(TypeError, match="what a loss of type Unknown compares"):
        find_candidates(Unknown(), *batch)
    loss = make_loss("ce_minus-sequence-history", 5)
    with pytest.raises(ValueError, match="CEMinus needs histories"):
        find_candidates(loss, *batch[:4], None)
    one = make_batch((2,), 1)
    with pytest.raises(ValueError, match="at least two items, got 1"):
        measure_coverage(*one[:3], find_candidates(LOSSES["ce"](), *one))
