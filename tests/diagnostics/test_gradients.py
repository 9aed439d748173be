from __future__ import annotations

import pytest
import torch
from batches import make_batch, make_loss
from torch.nn import functional

from sce_pipeline.diagnostics import compare_gradients, inspect_loss
from sce_pipeline.losses import base


@pytest.mark.parametrize("elements", [1, 2**22])
@pytest.mark.parametrize("variant", ["ce", "cce"])
def test_exact_losses_agree(variant, elements, monkeypatch):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    batch = make_batch((5, 8), 17, d=4)
    inspection = inspect_loss(make_loss(variant, 17), *batch, seed=0)
    gradients = inspection.gradients
    assert gradients.value == pytest.approx(gradients.exact_value, rel=1e-12)
    for agreement in (gradients.hidden, gradients.table):
        assert agreement.relative_error < 1e-12
        assert agreement.cosine == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(inspection.coverage.mass, torch.ones(13, dtype=torch.float64))


def test_numbers_are_those_of_the_whole_gradients():
    batch = make_batch((6, 5), 19, d=4)

    def loss(hidden, item_embeddings):
        return functional.cross_entropy(hidden @ item_embeddings[:9].T, batch.targets % 9)

    def exact(hidden, item_embeddings):
        return functional.cross_entropy(hidden @ item_embeddings.T, batch.targets)

    leaves = [values.clone().requires_grad_() for values in batch[:2]]
    pairs = [torch.autograd.grad(function(*leaves), leaves) for function in (loss, exact)]
    found = compare_gradients(loss, *batch[:3])
    assert found.value == loss(*batch[:2]).item()
    assert found.exact_value == pytest.approx(exact(*batch[:2]).item())
    for agreement, one, other in zip((found.hidden, found.table), *pairs, strict=True):
        error = ((one - other) ** 2).sum().sqrt() / (other**2).sum().sqrt()
        assert agreement.relative_error == pytest.approx(error.item())
        cosine = functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert agreement.cosine == pytest.approx(cosine.item())
    assert not any(values.requires_grad for values in batch[:2])


def test_a_longer_gradient_of_the_same_direction_is_an_error_but_no_other_direction():
    batch = make_batch((6, 5), 19, d=4)
    loss = make_loss("ce", 19)
    found = compare_gradients(lambda h, w: 3 * loss(h, w, *batch[2:]), *batch[:3])
    for agreement in (found.hidden, found.table):
        assert agreement.relative_error == pytest.approx(2)
        assert agreement.cosine == pytest.approx(1)


def test_more_negatives_and_larger_buckets_come_nearer_to_the_exact_gradient():
    batch = make_batch((150,), 200, d=6)
    for variant, size in (("ce_minus-batch-target", "n_negatives"), ("sce", "bucket_size_y")):
        loss = make_loss(variant, 200)
        errors, masses = [], []
        for number in (4, 40, 190):
            setattr(loss, size, number)
            inspection = inspect_loss(loss, *batch, seed=1)
            errors.append(inspection.gradients.table.relative_error)
            masses.append(inspection.coverage.mass.mean().item())
        assert masses == sorted(masses)
        if variant != "sce":  # whose mean is over few tokens here
            assert errors == sorted(errors, reverse=True)


def test_the_draw_follows_from_the_seed_and_leaves_no_trace():
    batch = make_batch((30,), 50, d=6)
    loss = make_loss("sce", 50)
    state = torch.get_rng_state()
    first, again, other = (inspect_loss(loss, *batch, seed=seed) for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(state)
    assert first.gradients == again.gradients != other.gradients
    assert first.coverage.mass.equal(again.coverage.mass)
    assert not first.coverage.mass.equal(other.coverage.mass)
