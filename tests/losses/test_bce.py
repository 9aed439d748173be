from __future__ import annotations

import itertools
import logging

import pytest
import torch

from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.grouped import Groups, grouped_binary_cross_entropy

WAYS = list(itertools.product(("token", "sequence", "batch"), ("history", "target")))


def oracle(batch, items, *, exclude, beta):
    """gBCE as its paper writes it: the target's probability to the power beta."""
    x, w = batch.hidden, batch.item_embeddings
    total = x.new_zeros(())
    for t, target in enumerate(batch.targets.tolist()):
        excluded = batch.excluded_of(t, exclude)
        likelihood = torch.sigmoid(x[t] @ w[target]) ** beta
        for item in items[t].tolist():
            if item not in {-1, *excluded}:
                likelihood = likelihood * (1 - torch.sigmoid(x[t] @ w[item]))
        total = total - likelihood.log() / (1 + items.shape[1])
    return total / len(x)


def paper_beta(n_negatives, n_items, t):
    alpha = n_negatives / (n_items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
@pytest.mark.parametrize("t", [None, 0.6])
def test_value_and_gradients(batch, agree, draws_of, shared, exclude, t):
    n_items = len(batch.item_embeddings)
    options = {"n_negatives": 3, "shared": shared, "exclude": exclude}
    loss = LOSSES["bce"](**options) if t is None else LOSSES["gbce"](**options, t=t)
    beta = 1.0 if t is None or n_items <= 3 else paper_beta(3, n_items, t)
    items = draws_of(*batch[2:], n_items=n_items, **options)
    other = batch.like()
    expected = oracle(other, items, exclude=exclude, beta=beta)
    agree(loss(*batch), batch, expected, other)


@pytest.mark.parametrize(("shared", "exclude"), WAYS)
def test_gbce_without_calibration_is_bce(make_batch, agree, shared, exclude):
    batch = make_batch((30, 4), n_items=50)
    other = batch.like()
    options = {"n_negatives": 7, "shared": shared, "exclude": exclude}
    torch.manual_seed(0)
    value = LOSSES["gbce"](**options, t=0.0)(*batch)
    torch.manual_seed(0)
    agree(value, batch, LOSSES["bce"](**options)(*other), other)


@pytest.mark.parametrize(("n_negatives", "n_items"), [(1, 1000), (256, 12101), (9, 10)])
@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_beta_is_the_papers(n_negatives, n_items, t):
    loss = LOSSES["gbce"](n_negatives=n_negatives, shared="token", exclude="target", t=t)
    assert loss.beta(n_items) == pytest.approx(paper_beta(n_negatives, n_items, t))
    if t == 1:
        assert loss.beta(n_items) == pytest.approx(n_negatives / (n_items - 1))


@pytest.mark.parametrize("n_items", [1, 2, 5, 6])
def test_beta_is_one_from_all_items_on(n_items):
    loss = LOSSES["gbce"](n_negatives=6, shared="token", exclude="target", t=0.75)
    assert loss.beta(n_items) == 1


def test_more_negatives_than_items_make_gbce_bce_and_are_told_once(make_batch, agree, caplog):
    options = {"n_negatives": 12, "shared": "token", "exclude": "target"}
    loss = LOSSES["gbce"](**options, t=0.75)
    batch = make_batch((3, 2), n_items=9)
    other = batch.like()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        value = loss(*batch)
        loss(*batch.like())
    assert [record.getMessage() for record in caplog.records] == [
        "n_negatives = 12 is as large as the catalogue of 9 items or larger: "
        "negatives are drawn with replacement and repeat themselves",
        "gBCE has n_negatives = 12, more than the 8 items beside a target: "
        "its sampling rate is taken as 1, which makes it BCE",
    ]
    torch.manual_seed(0)
    agree(value, batch, LOSSES["bce"](**options)(*other), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [1000.0, -1000.0])
def test_gbce_at_extreme_logits(dtype, logit):
    hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    table = torch.tensor([[logit], [-logit]], dtype=dtype, requires_grad=True)
    groups = Groups(torch.tensor([[1, -1]]), 1)
    targets = torch.zeros(1, dtype=torch.int64)
    value = grouped_binary_cross_entropy(hidden, table, targets, groups, beta=0.25, triton=False)
    value.backward()
    wrong = logit < 0
    exact = (0.25 * 1000 + 1000) / 3 if wrong else 0.0
    assert value.item() == pytest.approx(exact, rel=0.01)
    expected = [-0.25 / 3, 1 / 3] if wrong else [0.0, 0.0]
    assert table.grad[:, 0].tolist() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1000.0, -1000.0])
@pytest.mark.parametrize("exclude", ["history", "target"])
def test_gbce_from_extreme_hidden_states(make_batch, dtype, scale, exclude):
    torch.manual_seed(0)
    n_items = 4000  # neither token draws its target
    batch = make_batch((1, 1), n_items=n_items, d=1, dtype=dtype)
    with torch.no_grad():
        batch.hidden.fill_(scale)
        batch.item_embeddings.fill_(1)
    loss = LOSSES["gbce"](n_negatives=2, shared="token", exclude=exclude, t=0.75)
    value = loss(*batch)
    value.backward()
    exact = 2 * 1000 / 3 if scale > 0 else loss.beta(n_items) * 1000 / 3
    assert value.item() == pytest.approx(exact, rel=0.01)
    assert all(gradient.isfinite().all() for gradient in batch.gradients)


def test_a_user_with_every_item_trains_on_the_target_alone(make_batch):
    batch = make_batch((3,), n_items=6, full_history=True)
    logits = (batch.hidden * batch.item_embeddings[batch.targets]).sum(1)
    expected = torch.nn.functional.softplus(-logits).mean() / 5
    for shared in ("token", "sequence", "batch"):
        loss = LOSSES["bce"](n_negatives=4, shared=shared, exclude="history")
        torch.testing.assert_close(loss(*batch), expected)
