from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.cce import _weighted_sum, cut_cross_entropy

PLAIN = {
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "logq_correction": False,
    "skip_mass": 0.0,
}


def oracle(x, w, targets, bias, label_smoothing, z_loss, logit_scale, normalized):
    """The loss as it is written, item by item."""
    total = x.new_zeros(())
    for token, target in enumerate(targets.tolist()):
        logits = []
        for item in range(len(w)):
            product = x[token] @ w[item]
            if normalized:
                product = product / (x[token].norm() * w[item].norm())
            logits.append(logit_scale * product + bias[item])
        lse = torch.stack(logits).logsumexp(0)
        loss = lse * 0
        for item, logit in enumerate(logits):
            share = (1 - label_smoothing) * (item == target) + label_smoothing / len(w)
            loss = loss + share * (lse - logit)
        total = total + loss + z_loss * lse**2
    return total / len(targets)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.3},
        {"logit_scale": 2.5},
        {"normalized": True, "logit_scale": 4.0},
        {"label_smoothing": 0.2, "z_loss": 0.1, "normalized": True, "logit_scale": 3.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients(batch, options, biased):
    n_items = len(batch.item_embeddings)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(n_items, dtype=torch.float64, generator=generator).requires_grad_()
    log_probability = -torch.rand(n_items, dtype=torch.float64, generator=generator)
    given = {"item_bias": bias, "log_probability": log_probability} if biased else {}
    other = batch.like()
    other_bias = bias.detach().clone().requires_grad_()
    loss = cut_cross_entropy(batch.hidden, batch.item_embeddings, batch.targets, **given, **options)
    all_options = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "normalized": False}
    expected = oracle(
        other.hidden,
        other.item_embeddings,
        other.targets,
        other_bias - log_probability if biased else torch.zeros(n_items),
        **{**all_options, **options},
    )
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(batch.gradients, other.gradients)
    if biased:
        torch.testing.assert_close(bias.grad, other_bias.grad)


def test_it_is_the_full_cross_entropy(batch, agree):
    other = batch.like()
    agree(LOSSES["cce"](**PLAIN, impl="auto")(*batch), batch, LOSSES["ce"]()(*other), other)


def test_logq_correction_subtracts_the_log_of_the_share_of_interactions(make_batch, agree):
    batch, counts = make_batch((4, 3), n_items=5), torch.tensor([7, 1, 0, 2, 9])
    loss = LOSSES["cce"](**{**PLAIN, "logq_correction": True}, impl="auto")
    with pytest.raises(RuntimeError, match="call use_item_counts first"):
        loss(*batch)
    loss.use_item_counts(counts)
    other = batch.like()
    logits = other.hidden @ other.item_embeddings.T
    logits = logits - torch.log(torch.tensor([7, 1, 1, 2, 9]).double() / 20)
    agree(loss(*batch), batch, torch.nn.functional.cross_entropy(logits, other.targets), other)
    assert "log_probability" not in loss.state_dict()


def test_the_logits_never_stand_whole(make_batch, largest_tensor, monkeypatch):
    monkeypatch.setattr("sce_pipeline.losses.base.CPU_CHUNK_ELEMENTS", 1000)
    batch = make_batch((40, 20), n_items=300, d=8)
    with largest_tensor() as largest:
        LOSSES["cce"](**PLAIN, impl="auto")(*batch).backward()
    assert largest.elements <= 300 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_factors_and_neither_logits_nor_gradients(make_batch, dtype):
    batch = make_batch((40, 20), n_items=50, d=16, dtype=torch.float32)
    rounded = [
        part.detach().to(dtype).double().requires_grad_()
        for part in (batch.hidden, batch.item_embeddings)
    ]
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 2.0}
    given = {**options, "normalized": False, "bias": torch.zeros(50)}
    expected = oracle(*rounded, batch.targets, **given)
    expected.backward()
    with torch.autocast("cpu", dtype):
        loss = cut_cross_entropy(batch.hidden, batch.item_embeddings, batch.targets, **options)
    loss.backward()
    found = [loss.detach(), *batch.gradients]
    wanted = [expected.detach(), *(part.grad for part in rounded)]
    for one, other in zip(found, wanted, strict=True):  # rounded logits err by 1e-3 and more
        assert float((one.double() - other).norm() / other.norm()) < 2e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_of_rows_under_autocast_is_not_rounded(weighted):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator).bfloat16()
    weights = torch.rand(300, generator=generator) if weighted else None
    with torch.autocast("cpu", torch.bfloat16):
        found = _weighted_sum(rows, weights)
    expected = (rows.double() * (1 if weights is None else weights.double()[:, None])).sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_come_only_where_they_are_asked_for(make_batch):
    batch = make_batch((5, 3), n_items=9)
    hidden, table = batch.hidden.detach(), batch.item_embeddings
    cut_cross_entropy(hidden, table, batch.targets).backward()
    assert hidden.grad is None
    assert table.grad is not None
    assert not cut_cross_entropy(hidden, table.detach(), batch.targets).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and under 1, got 1.0"),
        ({"z_loss": -1.0}, "z_loss must be at least 0 and finite, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss must be at least 0 and finite, got nan"),
        ({"logit_scale": 0.0}, "logit_scale must be positive and finite, got 0.0"),
        ({"skip_mass": 1.0}, "skip_mass must be at least 0 and under 1, got 1.0"),
        ({"impl": "trion"}, "impl must be one of auto, torch, triton, got 'trion'"),
        ({"item_bias": torch.zeros(3)}, r"expected item_bias of \(9,\), got \(3,\)"),
        ({"log_probability": torch.zeros(9, 1)}, r"log_probability of \(9,\), got \(9, 1\)"),
    ],
)
def test_what_is_refused(make_batch, options, message):
    batch = make_batch((5, 3), n_items=9)
    with pytest.raises(ValueError, match=message):
        cut_cross_entropy(batch.hidden, batch.item_embeddings, batch.targets, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_tensors_that_do_not_fit_together_are_refused(impl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, table, targets = torch.randn(5, 16), torch.randn(9, 16), torch.zeros(5).long()
    with pytest.raises(ValueError, match=r"got hidden \(5, 16\), item_embeddings \(9, 12\)"):
        cut_cross_entropy(hidden, table[:, :12], targets, impl=impl)
    with pytest.raises(ValueError, match=r"and targets \(tokens,\), got .* targets \(3,\)"):
        cut_cross_entropy(hidden, table, targets[:3], impl=impl)
    with pytest.raises(ValueError, match="a catalogue of at least one item"):
        cut_cross_entropy(hidden, table[:0], targets, impl=impl)
    with pytest.raises(TypeError, match=r"expected int64 targets, got torch\.int32"):
        cut_cross_entropy(hidden, table, targets.int(), impl=impl)


def test_triton_refuses_what_it_cannot_compute(make_batch, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device does not matter
    loss = LOSSES["cce"](**PLAIN, impl="triton")
    with pytest.raises(ValueError, match=r"impl is triton, whose kernels take .* but got float64"):
        loss(*make_batch((5, 3), n_items=9))
    with pytest.raises(ValueError, match="d up to 512, but got d = 513"):
        loss(*make_batch((2,), n_items=3, d=513, dtype=torch.float32))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA device, but hidden is on cpu"):
        loss(*make_batch((2,), n_items=3, dtype=torch.float32))
