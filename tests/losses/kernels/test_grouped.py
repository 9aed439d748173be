from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from sce_pipeline.losses import LOSSES, base, cce_minus
from sce_pipeline.losses.grouped import (
    Groups,
    grouped_binary_cross_entropy,
    grouped_cross_entropy,
)
from sce_pipeline.losses.kernels import grouped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
BETA = 0.7
GRAD = 1000  # of the loss, so that float16 holds its gradients
LENGTHS = (21, 0, 1, 40, 16)
KINDS = ["plain", "corrected", "weighted", "binary", "weighted binary"]
REGIMES = {
    "random": (1.0, 0.0),
    "nearly one-hot": (1.0, 12.0),
    "one-hot": (1.0, 20.0),
    "near-uniform": (1e-3, 0.0),
}


@pytest.fixture(params=[False, True], ids=["torch", "triton"])
def triton(request):
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that there are several of each kind."""
    for name in ("FORWARD_TILES", "BACKWARD_TILES"):
        for tiles in (name, f"{name}_OF_FLOAT32"):
            monkeypatch.setattr(grouped, tiles, dict.fromkeys((64, 128, 256, 512), SMALL))


SMALL = grouped.Tile(16, 16, 4, 1)


def batch_of(lengths=LENGTHS, *, n_items=40, n_negatives=35, d=20, kind="plain", seed=0):
    """Hidden states, a table, targets and groups of which the last negative is none."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    hidden = torch.randn(n_tokens, d, generator=generator)
    table = torch.randn(n_items, d, generator=generator) / d**0.5
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    size = (len(lengths), n_negatives)
    # Nobody draws the last items: their rows are touched by targets alone, if at all.
    items = torch.randint(max(1, n_items - 5), size, generator=generator)
    items[:, -1] = -1
    log_weights = torch.randn(size, generator=generator) if "weighted" in kind else None
    log_masses = 5 * torch.rand(n_tokens, generator=generator) if kind == "corrected" else None
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    groups = Groups(items, offsets, log_weights, log_masses)
    return (
        hidden.to(DEVICE),
        table.to(DEVICE),
        targets.to(DEVICE),
        Groups(*(each if each is None else each.to(DEVICE) for each in groups)),
    )


def oracle(x, w, targets, groups, *, dtype, binary):
    """The loss token by token; embeddings of negatives are rounded to ``dtype``."""
    rounded = w + (w.to(dtype).double() - w).detach()
    items, offsets, log_weights, log_masses = groups
    total = x.new_zeros(())
    for group, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for token in range(begin, min(end, len(x))):
            positive = x[token] @ w[targets[token]]
            valid = (items[group] != targets[token]) & (items[group] >= 0)
            negative = rounded[items[group][valid]] @ x[token]
            if log_weights is not None:
                negative = negative + log_weights[group][valid].double()
            if log_masses is not None and valid.any():
                negative = negative + log_masses[token].double() - valid.sum().log()
            if binary:
                terms = BETA * functional.softplus(-positive) + functional.softplus(negative).sum()
                total = total + terms / (1 + items.shape[1])
            else:
                total = total + torch.cat([positive[None], negative]).logsumexp(0) - positive
    return total / len(x)


def loss_of(x, w, targets, groups, *, triton, binary):
    if binary:
        return grouped_binary_cross_entropy(x, w, targets, groups, beta=BETA, triton=triton)
    return grouped_cross_entropy(x, w, targets, groups, triton=triton)


def error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm()).item()


def compare(hidden, table, targets, groups, dtype, *, triton, binary=False, table_dtype=None):
    """Hold value and gradients against the oracle of the same inputs; return the latter's."""
    table_dtype = table_dtype or dtype
    x = hidden.to(dtype, copy=True).requires_grad_()
    w = table.to(table_dtype, copy=True).requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype != table_dtype):
        loss = loss_of(x, w, targets, groups, triton=triton, binary=binary)
    (GRAD * loss).backward()
    exact_x, exact_w = (each.detach().double().requires_grad_() for each in (x, w))
    exact = oracle(exact_x, exact_w, targets, groups, dtype=dtype, binary=binary)
    (GRAD * exact).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (x.grad.dtype, w.grad.dtype) == (dtype, table_dtype)
    assert error(loss, exact) <= TOLERANCE[torch.float32]
    assert error(x.grad, exact_x.grad) <= TOLERANCE[dtype]
    assert error(w.grad, exact_w.grad) <= TOLERANCE[dtype]
    untouched = ~exact_w.grad.any(1)
    assert not w.grad[untouched].any()
    return exact, exact_w.grad


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_gradients(triton, dtype, kind):
    _, grad_table = compare(*batch_of(kind=kind), dtype, triton=triton, binary="binary" in kind)
    assert grad_table[-5:].any()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_regimes(triton, dtype, regime, binary):
    scale, lead = REGIMES[regime]
    hidden, table, targets, groups = batch_of(n_items=60, d=64)
    hidden = scale * hidden
    # A hidden state along its target's embedding gives that a large logit.
    hidden += lead * functional.normalize(table[targets])
    exact, _ = compare(hidden, table, targets, groups, dtype, triton=triton, binary=binary)
    if "one-hot" in regime and not binary:
        assert 1e-3 < exact < 3e-2 if regime == "nearly one-hot" else 0 < exact < 1e-4


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_logits(triton, dtype, binary):
    hidden, table, targets, groups = batch_of(d=8)
    hidden[:], table[:] = hidden.sign() * 3, table.sign() * 3.5
    assert (hidden @ table.T).abs().max() > 80
    compare(hidden, table, targets, groups, dtype, triton=triton, binary=binary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("binary", [False, True])
def test_a_table_in_float32_under_autocast(triton, dtype, binary):
    compare(*batch_of(), dtype, triton=triton, binary=binary, table_dtype=torch.float32)


@pytest.mark.parametrize(
    ("lengths", "n_items", "n_negatives", "d"),
    [
        ((1,), 1, 1, 1),
        ((1, 1, 1), 3, 2, 3),
        ((0, 3), 9, 80, 16),
        ((130,), 9, 5, 4),
        ((64, 65, 0), 200, 90, 33),
        ((7,), 30, 8, 300),
        ((7,), 30, 8, 512),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(triton, lengths, n_items, n_negatives, d, dtype):
    batch = batch_of(lengths, n_items=n_items, n_negatives=n_negatives, d=d, seed=3)
    if n_negatives > 1:
        compare(*batch, dtype, triton=triton)
    compare(*batch, dtype, triton=triton, binary=True)


def test_the_last_group_ends_with_the_tokens(triton):
    hidden, table, targets, groups = batch_of((16, 16, 5))
    groups = groups._replace(offsets=torch.arange(0, 49, 16, device=DEVICE))
    compare(hidden, table, targets, groups, torch.float32, triton=triton)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [(16, 16, 5), (1,) * 9, (70,), (70, 70, 1)])
def test_one_number_stands_for_all_groups_or_tokens(triton, lengths):
    hidden, table, targets, groups = batch_of(lengths, kind="corrected")
    masses = torch.full_like(groups.log_masses, 1.5)
    results = []
    for given in (
        groups._replace(log_masses=masses),
        groups._replace(offsets=lengths[0], log_masses=1.5),
    ):
        x, w = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        loss = grouped_cross_entropy(x, w, targets, given, triton=triton)
        loss.backward()
        results.append((loss, x.grad, w.grad))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("min_programs", [1, 7, 1024])
def test_any_number_of_programs_may_share_the_tokens_of_a_group(monkeypatch, min_programs):
    monkeypatch.setattr(grouped, "MIN_PROGRAMS", min_programs)
    compare(*batch_of((100, 3)), torch.float32, triton=True)


def test_rejected_negatives_get_no_gradient(triton):
    hidden, table, targets, groups = batch_of((3, 2), n_items=6, n_negatives=4)
    targets[:3] = 2
    groups.items[0] = 2
    groups.items[1] = -1
    x, w = hidden.requires_grad_(), table.requires_grad_()
    log_masses = torch.tensor([1.0, 0, -torch.inf, 1, -torch.inf], device=DEVICE)
    for given in (groups, groups._replace(log_masses=log_masses)):
        loss = grouped_cross_entropy(1e3 * x, w, targets, given, triton=triton)
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()
        assert not w.grad.any()


def test_a_weight_of_minus_infinity_rejects(triton):
    hidden, table, targets, groups = batch_of(kind="corrected")
    some = torch.arange(groups.items.shape[1], device=DEVICE) % 3 == 0
    weights = torch.zeros(groups.items.shape, device=DEVICE).masked_fill_(some, -torch.inf)
    results = []
    for given in (
        groups._replace(log_weights=weights),
        groups._replace(items=groups.items.masked_fill(some, -1)),
    ):
        x, w = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        loss = grouped_cross_entropy(x, w, targets, given, triton=triton)
        loss.backward()
        results.append((loss, x.grad, w.grad))
    torch.testing.assert_close(*results)


def test_targets_that_are_no_items_give_nan_and_touch_nothing():
    for wrong in (-1, 40, 2**40):
        hidden, table, targets, groups = batch_of()
        targets[5] = wrong
        x, w = hidden.requires_grad_(), table.requires_grad_()
        loss = grouped_cross_entropy(x, w, targets, groups, triton=True)
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("where", ["hidden", "table"])
def test_nan_is_not_hidden(triton, where, binary):
    hidden, table, targets, groups = batch_of()
    (hidden if where == "hidden" else table)[3] = torch.nan
    assert loss_of(hidden, table, targets, groups, triton=triton, binary=binary).isnan()


@pytest.mark.parametrize("elements", [1, 500, 2**22])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size(monkeypatch, largest_tensor, elements, kind):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(base, "DEVICE_CHUNK_ELEMENTS", elements)
    hidden, table, targets, groups = batch_of(kind=kind, n_negatives=60)
    x, w = hidden.double().requires_grad_(), table.double().requires_grad_()
    binary = "binary" in kind
    with largest_tensor() as largest:
        loss = loss_of(x, w, targets, groups, triton=False, binary=binary)
        loss.backward()
    # A tile of 16 rows has 16 x 60 logits and 60 rows of negatives; tokens at most double in tiles.
    assert largest.elements <= max(elements, 60 * 20, 2 * len(hidden) * 20)
    expected_x, expected_w = (each.detach().clone().requires_grad_() for each in (x, w))
    expected = oracle(expected_x, expected_w, targets, groups, dtype=torch.float64, binary=binary)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((x.grad, w.grad), (expected_x.grad, expected_w.grad))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    hidden, table, targets, groups = batch_of((3, 2), n_items=7, n_negatives=5, d=2, kind=kind)
    assert torch.autograd.gradcheck(
        lambda x, w: loss_of(x, w, targets, groups, triton=False, binary="binary" in kind),
        (hidden.double().requires_grad_(), table.double().requires_grad_()),
    )


def test_half_precision_tables_sum_their_gradient_in_float32(triton):
    # 4096 contributions to one row: bfloat16 alone would stop counting at 256.
    hidden = torch.ones(4096, 16, device=DEVICE, dtype=torch.bfloat16)
    table = torch.zeros(2, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4096, device=DEVICE, dtype=torch.int64)
    items, offsets = torch.tensor([[1]], device=DEVICE), torch.tensor([0, 4096], device=DEVICE)
    grouped_cross_entropy(hidden, table, targets, Groups(items, offsets), triton=triton).backward()
    assert table.grad[:, 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("shared", "exclude"), list(itertools.product(("sequence", "batch"), ("history", "target")))
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ce_minus", {"log_correction": True}),
        ("ce_minus", {"log_correction": False}),
        ("bce", {}),
        ("gbce", {"t": 0.75}),
    ],
)
def test_losses_over_shared_negatives_take_the_kernels(
    make_batch, monkeypatch, name, options, shared, exclude
):
    calls, forward = [], grouped.forward
    monkeypatch.setattr(
        grouped, "forward", lambda *args, **given: calls.append(args) or forward(*args, **given)
    )
    options = {**options, "n_negatives": 6, "shared": shared, "exclude": exclude}
    results = []
    for impl in ("torch", "triton"):
        batch = make_batch((3, 1, 6), n_items=13, full_history=True, dtype=torch.float32).to(DEVICE)
        torch.manual_seed(0)
        loss = LOSSES[name](**options, impl=impl)(*batch)
        loss.backward()
        results.append((loss, *batch.gradients))
    assert len(calls) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["bce", "ce_minus"])
def test_no_kernel_draws_for_each_token_outside_its_history(make_batch, name):
    options = {"log_correction": True} if name == "ce_minus" else {}
    loss = LOSSES[name](n_negatives=6, shared="token", exclude="history", impl="triton", **options)
    with pytest.raises(ValueError, match="got shared: token and exclude: history"):
        loss(*make_batch((3, 1), n_items=13))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("log_correction", [False, True])
@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_tiles_share_the_negatives_of_cce_minus(
    make_batch, monkeypatch, impl, log_correction, sampling
):
    monkeypatch.setattr(cce_minus, "TILE", 4)
    n_items, drawn = 9, []
    loss = LOSSES["cce_minus"](
        n_negatives=8, shared="tile", sampling=sampling, log_correction=log_correction, impl=impl
    )
    counts = torch.tensor([3, 0, 8, 1, 40, 2, 2, 5, 1])
    if sampling == "popularity":
        loss.use_item_counts(counts)
        loss.to(DEVICE)
    draw = grouped_cross_entropy
    monkeypatch.setattr(
        cce_minus,
        "grouped_cross_entropy",
        lambda *args, **options: drawn.append(args[3].items) or draw(*args, **options),
    )
    batch = make_batch((5, 1, 4), n_items=n_items, dtype=torch.float32).to(DEVICE)
    result = loss(*batch)
    result.backward()

    (items,) = drawn
    assert items.shape == (3, 8)
    chances = (counts if sampling == "popularity" else torch.ones(n_items)).double()
    chances = (chances / chances.sum()).to(DEVICE)
    assert (chances[items] > 0).all()
    x, w = (each.detach().double().requires_grad_() for each in batch[:2])
    total = x.new_zeros(())
    for token, target in enumerate(batch.targets.tolist()):
        valid = items[token // 4][items[token // 4] != target]
        weights = torch.ones_like(valid, dtype=torch.float64)
        if log_correction:
            weights = (1 - chances[target]) / (len(valid) * chances[valid])
        partition = (x[token] @ w[target]).exp() + (weights * (w[valid] @ x[token]).exp()).sum()
        total = total + partition.log() - x[token] @ w[target]
    expected = total / len(x)
    expected.backward()
    torch.testing.assert_close(result, expected.float())
    torch.testing.assert_close(batch.gradients, (x.grad.float(), w.grad.float()))
