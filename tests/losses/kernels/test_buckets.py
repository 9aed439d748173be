from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses.kernels import buckets as kernels
from sce_pipeline.losses.sce import (
    Buckets,
    bucketed_cross_entropy,
    fused_bucketed_cross_entropy,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}


def oracle(hidden, table, targets, buckets, dtype=None):
    """Value and gradients in float64, token by token, as the paper has it.

    With ``dtype``, negatives enter rounded to it, as the factors of matrix products do; the
    gradient passes the rounding as if it were not there.
    """
    x, w = (tensor.detach().cpu().double().requires_grad_() for tensor in (hidden, table))

    def rounded(tensor, exact):
        if dtype is None:
            return exact
        return exact + (tensor.detach().cpu().to(dtype).double() - exact).detach()

    x_rounded, w_rounded = rounded(hidden, x), rounded(table, w)
    targets = targets.cpu()
    losses: dict[int, torch.Tensor] = {}
    for tokens, items in zip(buckets.tokens.tolist(), buckets.items.tolist(), strict=True):
        for t in tokens:
            positive = x[t] @ w[targets[t]]
            negatives = [item for item in items if item != targets[t]]
            logits = torch.cat([positive[None], w_rounded[negatives] @ x_rounded[t]])
            loss = logits.logsumexp(0) - positive
            if t not in losses or loss > losses[t]:
                losses[t] = loss
    value = torch.stack(list(losses.values())).mean()
    return value.detach(), *torch.autograd.grad(value, (x, w))


def fused(hidden, table, targets, buckets):
    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    value = fused_bucketed_cross_entropy(hidden, table, targets, buckets)
    value.backward()
    assert hidden.grad.dtype == hidden.dtype
    assert table.grad.dtype == table.dtype
    return value.detach(), hidden.grad, table.grad


def assert_close(results, expected, tolerance):
    for name, result, exact in zip(("value", "hidden", "table"), results, expected, strict=True):
        error = (result.cpu().double() - exact).norm() / exact.norm()
        assert error <= tolerance, (name, float(error))


def data(n_tokens, n_items, d, dtype=torch.float32, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, d, generator=generator) * scale
    table = torch.randn(n_items, d, generator=generator) / d**0.5
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    return hidden.to(DEVICE, dtype), table.to(DEVICE, dtype), targets.to(DEVICE)


def random_buckets(n_tokens, n_items, n_buckets, size_x, size_y, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(n, size):
        rows = [torch.randperm(n, generator=generator)[:size] for _ in range(n_buckets)]
        return torch.stack(rows).to(DEVICE)

    return Buckets(some(n_tokens, size_x), some(n_items, size_y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_tokens", "n_items", "d", "n_buckets", "size_x", "size_y"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 9, 5, 3, 1, 4),
        (40, 90, 20, 4, 17, 71),
        (90, 40, 33, 2, 70, 40),
        (90, 40, 17, 2, 70, 40),
        (200, 80, 49, 2, 150, 40),
    ],
)
def test_value_and_gradients(dtype, n_tokens, n_items, d, n_buckets, size_x, size_y):
    arguments = data(n_tokens, n_items, d, dtype)
    buckets = random_buckets(n_tokens, n_items, n_buckets, size_x, size_y)
    expected = oracle(*arguments, buckets)
    results = fused(*arguments, buckets)
    if n_items == 1:  # nothing but the target: 0, exactly
        assert all(not result.any() for result in results)
    else:
        assert_close(results, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("regime", "factor"), [("nearly one-hot", 2.6), ("near-uniform", 1e-3), ("extreme", 12.0)]
)
def test_regimes(dtype, regime, factor):
    n_tokens, n_items, d = 30, 60, 24
    hidden, table, targets = data(n_tokens, n_items, d)
    if regime == "nearly one-hot":
        hidden = factor * (table[targets] * d**0.5 + 0.1 * hidden)
        table = table / table.norm(dim=1, keepdim=True)
    else:
        hidden = hidden * factor * d**0.5 / 3
    hidden, table = hidden.to(dtype), table.to(dtype)
    buckets = random_buckets(n_tokens, n_items, 3, 20, 40)
    expected = oracle(hidden, table, targets, buckets)
    logits = hidden.double() @ table.double().T
    if regime == "nearly one-hot":
        assert 1e-4 < expected[0] < 5e-2
    elif regime == "extreme":
        assert logits.abs().max() > 80
    assert_close(fused(hidden, table, targets, buckets), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("d", [70, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows(d, dtype):
    arguments = data(10, 12, d, dtype)
    buckets = random_buckets(10, 12, 2, 6, 7)
    tile = kernels.tile_of(d, dtype)
    assert tile.step < d or d < 128
    assert_close(fused(*arguments, buckets), oracle(*arguments, buckets), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", ["half", "float32"])
def test_autocast_reads_a_float32_table_as_it_is(dtype, hidden_dtype):
    hidden, table, targets = data(40, 60, 20)
    if hidden_dtype == "half":
        hidden = hidden.to(dtype)
    buckets = random_buckets(40, 60, 3, 25, 30)
    with torch.autocast(DEVICE, dtype):
        results = fused(hidden, table, targets, buckets)
    assert_close(results, oracle(hidden, table, targets, buckets, dtype), TOLERANCE[dtype])


def test_duplicate_targets_add_up():
    hidden, table, targets = data(50, 30, 16)
    targets[:] = 7
    buckets = random_buckets(50, 30, 3, 30, 12)
    assert_close(
        fused(hidden, table, targets, buckets), oracle(hidden, table, targets, buckets), 1e-5
    )


def test_what_no_bucket_holds_gets_no_gradient():
    hidden, table, targets = data(40, 60, 16)
    buckets = random_buckets(40, 60, 2, 9, 11)
    _, grad_hidden, grad_table = fused(hidden, table, targets, buckets)
    covered = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    covered[buckets.tokens] = True
    touched = torch.zeros(60, dtype=torch.bool, device=DEVICE)
    touched[buckets.items] = True
    touched[targets[covered]] = True
    assert 0 < covered.sum() < 40
    assert 0 < touched.sum() < 60
    assert not grad_hidden[~covered].any()
    assert not grad_table[~touched].any()
    assert grad_hidden[covered].any(1).all()


def test_equal_buckets_give_the_gradient_once():
    arguments = data(30, 40, 16)
    once = random_buckets(30, 40, 1, 20, 25)
    thrice = Buckets(once.tokens.repeat(3, 1), once.items.repeat(3, 1))
    torch.testing.assert_close(fused(*arguments, thrice), fused(*arguments, once))


def test_the_gradient_carries_on_what_comes_from_above():
    hidden, table, targets = data(20, 30, 16)
    buckets = random_buckets(20, 30, 2, 10, 12)
    _, *expected = fused(hidden, table, targets, buckets)
    hidden.requires_grad_()
    table.requires_grad_()
    (fused_bucketed_cross_entropy(hidden, table, targets, buckets) * -3).backward()
    torch.testing.assert_close(hidden.grad, -3 * expected[0])
    torch.testing.assert_close(table.grad, -3 * expected[1])


@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_a_target_that_is_no_item_shows(bad):
    hidden, table, targets = data(20, 30, 16)
    buckets = random_buckets(20, 30, 2, 20, 12)
    targets[4] = bad
    value, grad_hidden, _ = fused(hidden, table, targets, buckets)
    assert value.isnan()
    assert grad_hidden[4].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["hidden", "item"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_diverged_number_is_not_hidden(bad, where):
    hidden, table, targets = data(20, 30, 16)
    buckets = random_buckets(20, 30, 3, 20, 30)
    (hidden if where == "hidden" else table)[4, 2] = bad
    value = fused_bucketed_cross_entropy(hidden, table, targets, buckets)
    assert not value.isfinite()


def test_a_token_fitted_exactly_stays_in_the_mean():
    hidden = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 1.0]], device=DEVICE)
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=DEVICE)
    only = torch.tensor([[0, 1]], device=DEVICE)
    targets = torch.tensor([0, 0, 1], device=DEVICE)
    value, grad_hidden, _ = fused(hidden, table, targets, Buckets(only, only))
    assert value.item() == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2)
    assert grad_hidden[1].any()
    assert not grad_hidden[2].any()


def test_arguments_need_not_be_contiguous():
    hidden, table, targets = data(20, 30, 16)
    buckets = random_buckets(20, 30, 2, 10, 12)
    turned = [tensor.T.contiguous().T for tensor in (hidden, table, *buckets)]
    result = fused(*turned[:2], targets.repeat_interleave(2)[::2], Buckets(*turned[2:]))
    torch.testing.assert_close(result, fused(hidden, table, targets, buckets))


def test_neither_logits_nor_embeddings_of_the_buckets_stand_whole(largest_tensor):
    hidden, table, targets = data(64, 64, 4)
    buckets = random_buckets(64, 64, 20, 64, 64)
    with largest_tensor() as fused_largest:
        fused(hidden, table, targets, buckets)
    with largest_tensor() as largest:
        bucketed_cross_entropy(hidden.requires_grad_(), table, targets, buckets).backward()
    assert fused_largest.elements < 20 * 64 * 64
    assert largest.elements > 20 * 64 * 64 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_both_gradients_is_written(dtype):
    # Of 90 tokens at most 40 are in a bucket, and most items are in none.
    arguments = data(90, 700, 20, dtype)
    buckets = random_buckets(90, 700, 2, 20, 30)
    torch.use_deterministic_algorithms(True)  # which fills memory that nobody wrote with NaN
    try:
        assert torch.empty(1).isnan().all()
        results = fused(*arguments, buckets)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(results, oracle(*arguments, buckets), TOLERANCE[dtype])
