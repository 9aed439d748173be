from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.kernels import sampled
from sce_pipeline.losses.per_token import (
    per_token_binary_cross_entropy,
    per_token_cross_entropy,
)
from sce_pipeline.losses.sampling import Popularity, draw

TILE_FOR = sampled.tile_for
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
BETA = 0.7
GRAD = 1000  # of the loss, so that float16 holds its gradients
KINDS = ["plain", "corrected", "popular", "popular corrected", "binary"]
REGIMES = {"random": (1.0, 0.0), "nearly one-hot": (1.0, 9.0), "near-uniform": (1e-3, 0.0)}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Tiles so large that an interpreter has little to do."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(sampled, "tile_for", lambda matrix: sampled.Tile(16, 8, 1))


def inputs(n_tokens=16, n_items=32, d=20, *, dtype=torch.float32, scale=1.0, lead=0.0, seed=0):
    """Hidden states, table and targets, of which many are alike; targets lead by a logit."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, d, generator=generator)
    table = scale * torch.randn(n_items, d, generator=generator) / d**0.5
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    targets[: n_tokens // 2] = n_items // 3
    hidden += lead * table[targets] / (table[targets].square().sum(1, keepdim=True) + 1e-9)
    return hidden.to(DEVICE, dtype), table.to(DEVICE, dtype), targets.to(DEVICE)


def popularity_of(n_items):
    counts = (50 / torch.arange(1, n_items + 1)).long()  # beyond 50, items never occur
    return Popularity(counts[torch.arange(n_items) * 7 % n_items]).to(DEVICE)


def loss_of(kind, hidden, table, targets, drawn, *, triton):
    if kind == "binary":
        return per_token_binary_cross_entropy(
            hidden, table, targets, drawn, beta=BETA, triton=triton
        )
    return per_token_cross_entropy(
        hidden,
        table,
        targets,
        drawn,
        popularity=popularity_of(len(table)) if "popular" in kind else None,
        log_correction="corrected" in kind,
        triton=triton,
    )


def results(kind, hidden, table, targets, drawn, *, triton, dtype=None):
    """Value and gradients, from the same numbers in ``dtype``."""
    hidden, table = (
        each.detach().to(dtype or each.dtype).requires_grad_() for each in (hidden, table)
    )
    value = loss_of(kind, hidden, table, targets, drawn, triton=triton)
    (GRAD * value).backward()
    return value.detach(), hidden.grad, table.grad


def oracle(kind, hidden, table, targets, drawn):
    """The loss token by token, in float64, from the items that PyTorch says are drawn."""
    x, w = (each.detach().double().requires_grad_() for each in (hidden, table))
    popularity = popularity_of(len(w)) if "popular" in kind else None
    chances = torch.full((len(w),), 1 / len(w), dtype=torch.float64, device=DEVICE)
    if popularity is not None:
        chances = popularity.log_chances.double().exp()
    items = drawn.items(0, len(x), popularity)
    total = x.new_zeros(())
    for token, target in enumerate(targets.tolist()):
        positive = x[token] @ w[target]
        valid = items[token][items[token] != target]
        negative = w[valid] @ x[token]
        if kind == "binary":
            softplus = torch.nn.functional.softplus
            of_token = (
                BETA * softplus(-positive, threshold=700) + softplus(negative, threshold=700).sum()
            )
            total = total + of_token / (1 + items.shape[1])
            continue
        if "corrected" in kind and len(valid):
            negative = negative + ((1 - chances[target]) / (len(valid) * chances[valid])).log()
        log_odds = torch.cat([negative, negative.new_tensor([-torch.inf])]).logsumexp(0) - positive
        total = total + torch.nn.functional.softplus(log_odds, threshold=700)
    value = total / len(x)
    (GRAD * value).backward()
    return value.detach(), x.grad, w.grad


def error(result, expected):
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-300)).item()


def assert_close(result, expected, dtype):
    for one, other in zip(result, expected, strict=True):
        assert error(one, other) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("regime", "dtype"),
    [
        *((regime, torch.float32) for regime in REGIMES),
        *(("random", dtype) for dtype in (torch.bfloat16, torch.float16)),
        ("nearly one-hot", torch.bfloat16),
    ],
)
def test_value_and_gradients(kind, regime, dtype):
    scale, lead = REGIMES[regime]
    arguments = inputs(dtype=dtype, scale=scale, lead=lead)
    drawn = draw(16, 32, 12, DEVICE, with_coins=True)
    found = results(kind, *arguments, drawn, triton=True)
    assert [each.dtype for each in found] == [torch.float32, dtype, dtype]
    assert_close(found, oracle(kind, *arguments, drawn), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_tokens", "n_items", "n_negatives", "d"),
    [(1, 1, 1, 1), (1, 50, 9, 3), (7, 1, 3, 4), (33, 12, 17, 8), (9, 64, 1, 70), (5, 3, 2, 130)],
)
def test_ragged_sizes(kind, n_tokens, n_items, n_negatives, d):
    arguments = inputs(n_tokens, n_items, d)
    drawn = draw(n_tokens, n_items, n_negatives, DEVICE, with_coins=True)
    found = results(kind, *arguments, drawn, triton=True)
    assert_close(found, oracle(kind, *arguments, drawn), torch.float32)


@pytest.mark.parametrize("kind", ["popular corrected", "binary"])
@pytest.mark.parametrize("d", [256, 512])
def test_wide_states(kind, d):
    arguments = inputs(6, 9, d, dtype=torch.bfloat16)
    drawn = draw(6, 9, 5, DEVICE, with_coins=True)
    found = results(kind, *arguments, drawn, triton=True)
    assert_close(found, oracle(kind, *arguments, drawn), torch.bfloat16)


@pytest.mark.parametrize("tile", [(1, 2, 1), (4, 4, 2)])
def test_tiles_of_any_size_give_the_same(monkeypatch, tile):
    arguments = inputs(9, 14)
    drawn = draw(9, 14, 12, DEVICE, with_coins=True)
    expected = results("popular corrected", *arguments, drawn, triton=True)
    monkeypatch.setattr(sampled, "tile_for", lambda matrix: sampled.Tile(*tile))
    found = results("popular corrected", *arguments, drawn, triton=True)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 16, 64, 100, 256, 512])
def test_a_warp_holds_whole_rows(dtype, d):
    tile = TILE_FOR(torch.empty(1, d, dtype=dtype))
    assert tile.rows == 1 or tile.rows * d * dtype.itemsize <= 512
    assert tile.rows & (tile.rows - 1) == tile.partners & (tile.partners - 1) == 0


@pytest.mark.parametrize("kind", ["corrected", "binary"])
def test_many_tokens_of_one_target(kind):
    # Runs of 64 tokens are summed before: some begin and end within a target's tokens, others not.
    hidden, table, targets = inputs(300, 310, 4)
    targets[:290] = 7
    targets[290:] = torch.arange(10, device=DEVICE)
    drawn = draw(300, 310, 2, DEVICE, with_coins=False)
    found = results(kind, hidden, table, targets, drawn, triton=True)
    expected = results(kind, hidden, table, targets, drawn, triton=False, dtype=torch.float64)
    assert_close(found, expected, torch.float32)


def test_rows_that_no_token_touches_get_zeros():
    hidden, table, targets = inputs(5, 200, 8)
    drawn = draw(5, 200, 6, DEVICE, with_coins=False)
    _, _, gradient = results("corrected", hidden, table, targets, drawn, triton=True)
    touched = torch.zeros(200, dtype=torch.bool, device=DEVICE)
    touched[drawn.items(0, 5)] = True
    touched[targets] = True
    assert gradient[touched].any(1).all()
    assert not gradient[~touched].any()


@pytest.mark.parametrize("kind", ["corrected", "popular", "binary"])
def test_extreme_logits(kind):
    hidden, table, targets = inputs(12, 30, 16)
    products = hidden @ table.T
    hidden *= 80 / products.abs().max()
    drawn = draw(12, 30, 10, DEVICE, with_coins=True)
    found = results(kind, hidden, table, targets, drawn, triton=True)
    # A logit of 80 is rounded to 2^-18 or so, and its exponential by as much.
    for one, other in zip(found, oracle(kind, hidden, table, targets, drawn), strict=True):
        assert error(one, other) <= 3e-5


@pytest.mark.parametrize("kind", ["corrected", "popular corrected", "binary"])
def test_the_same_bits_every_time(kind):
    arguments = inputs(dtype=torch.bfloat16)
    drawn = draw(16, 32, 12, DEVICE, with_coins=True)
    first, again = (results(kind, *arguments, drawn, triton=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["corrected", "popular", "binary"])
@pytest.mark.parametrize("wrong", [-1, 32, 2**40])
def test_a_target_out_of_range_gives_nan_and_touches_nothing(kind, wrong):
    hidden, table, targets = inputs()
    targets[5] = wrong
    drawn = draw(16, 32, 12, DEVICE, with_coins=True)
    value, of_hidden, _ = results(kind, hidden, table, targets, drawn, triton=True)
    assert value.isnan()
    assert of_hidden.isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("kind", ["corrected", "binary"])
@pytest.mark.parametrize("n_items", [32, 1])
def test_nan_is_not_hidden(kind, n_items):
    hidden, table, targets = inputs(n_items=n_items)
    hidden[3, 2] = torch.nan
    drawn = draw(16, n_items, 12, DEVICE, with_coins=False)
    assert loss_of(kind, hidden, table, targets, drawn, triton=True).isnan()


def test_what_needs_no_gradient_gets_none():
    hidden, table, targets = inputs()
    drawn = draw(16, 32, 12, DEVICE, with_coins=False)
    value, of_hidden, of_table = results("corrected", hidden, table, targets, drawn, triton=True)
    alone = hidden.clone().requires_grad_()
    (GRAD * loss_of("corrected", alone, table, targets, drawn, triton=True)).backward()
    assert torch.equal(alone.grad, of_hidden)
    alone = table.clone().requires_grad_()
    result = loss_of("corrected", hidden, alone, targets, drawn, triton=True)
    (GRAD * result).backward()
    assert torch.equal(alone.grad, of_table)
    assert torch.equal(result, value)


def test_tensors_need_not_be_contiguous():
    hidden, table, targets = inputs()
    drawn = draw(16, 32, 12, DEVICE, with_coins=False)
    expected = results("corrected", hidden, table, targets, drawn, triton=True)
    strided = (each.T.contiguous().T for each in (hidden, table))
    found = results("corrected", *strided, targets.repeat_interleave(2)[::2], drawn, triton=True)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("half_hidden", [False, True])
def test_autocast_leaves_the_precision_of_the_arguments(half_hidden):
    hidden, table, targets = inputs()
    hidden = hidden.bfloat16() if half_hidden else hidden
    drawn = draw(16, 32, 12, DEVICE, with_coins=False)
    expected = oracle("corrected", hidden, table, targets, drawn)
    for triton in (True, False):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = results("corrected", hidden, table, targets, drawn, triton=triton)
        assert_close(found[::2], expected[::2], torch.float32)
        assert error(found[1], expected[1]) <= TOLERANCE[hidden.dtype]


NAMES = {
    "cce_minus": {"shared": "token", "sampling": "popularity", "log_correction": True},
    "ce_minus": {"shared": "token", "exclude": "target", "log_correction": True},
    "bce": {"shared": "token", "exclude": "target"},
    "gbce": {"shared": "token", "exclude": "target", "t": 0.6},
}


@pytest.mark.parametrize("name", NAMES)
def test_losses_have_the_same_value_whoever_computes(make_batch, name):
    batch = make_batch((9, 4), n_items=30, dtype=torch.float32).to(DEVICE)
    found = []
    for impl in ("torch", "triton"):
        loss = LOSSES[name](n_negatives=7, **NAMES[name], impl=impl)
        if loss.needs_item_counts:
            loss.use_item_counts(torch.arange(30))
            loss.to(DEVICE)
        again = batch.like()
        torch.manual_seed(4)
        value = loss(*again)
        value.backward()
        found.append((value.detach(), *again.gradients))
    for one, other in zip(*found, strict=True):
        assert error(one, other) <= TOLERANCE[torch.float32]
