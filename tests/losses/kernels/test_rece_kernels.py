from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from sce_pipeline.losses.base import Histories
from sce_pipeline.losses.kernels import projections, rece
from sce_pipeline.losses.kernels.projections import nearest_projections
from sce_pipeline.losses.rece import RECE, Meetings, _cut, _FusedCrossEntropy, chunked_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that there are several of each kind."""
    monkeypatch.setattr(rece, "tile_for", lambda d, dtype: rece.Tile(16, 16, 4))
    monkeypatch.setattr(projections, "tile_for", lambda d, dtype: projections.Tile(16, 16, 4, 1))


def normal(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


def meetings_of(n_tokens, n_items, n_chunks=5, n_extra_chunks=1, n_rounds=3, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def cut(n):
        buckets = torch.randint(n_chunks, (n_rounds, n), generator=generator)
        return _cut(buckets.to(DEVICE), n_chunks)

    (token_order, token_chunks), (item_order, item_chunks) = cut(n_tokens), cut(n_items)
    return Meetings(token_order, item_order, token_chunks, item_chunks, n_chunks, n_extra_chunks)


def error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm()).item()


def compare(hidden, table, targets, meetings, dtype, *, table_dtype=None, correction=True, scale=1):
    """Return the relative errors of value and gradients, against the oracle of the same inputs."""
    table_dtype = table_dtype or dtype
    x = hidden.to(dtype, copy=True).requires_grad_()
    w = table.to(table_dtype, copy=True).requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype != table_dtype):
        loss = _FusedCrossEntropy.apply(x, w, targets, meetings, correction)
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    exact_x = x.detach().double().requires_grad_()
    exact_w = w.detach().to(dtype).double().requires_grad_()
    # Proven against a slow oracle in tests/losses/test_rece.py.
    exact = chunked_cross_entropy(
        exact_x, exact_w, targets, meetings, duplicate_correction=correction
    )
    (exact * scale).backward()
    assert x.grad.dtype == dtype
    assert w.grad.dtype == table_dtype
    errors = (error(loss, exact), error(x.grad, exact_x.grad), error(w.grad, exact_w.grad))
    untouched = ~exact_w.grad.any(1)
    assert not w.grad[untouched].any()
    return errors, (exact, untouched)


def targets_of(n_tokens, n_items, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_items, (n_tokens,), generator=generator).to(DEVICE)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("n_tokens", "n_items", "d", "sizes"),
    [
        (1, 37, 16, (3, 1, 2)),
        (37, 3, 20, (2, 0, 2)),
        (41, 67, 24, (5, 0, 4)),
        (150, 200, 33, (2, 1, 2)),
        (33, 70, 16, (9, 2, 3)),
        (7, 40, 16, (11, 0, 2)),  # more chunks than tokens
        (40, 50, 16, (1, 0, 2)),
    ],
)
def test_value_and_gradients(n_tokens, n_items, d, sizes):
    hidden, table = normal(n_tokens, d), normal(n_items, d, scale=0.7, seed=1)
    meetings = meetings_of(n_tokens, n_items, *sizes)
    errors, _ = compare(hidden, table, targets_of(n_tokens, n_items), meetings, torch.float32)
    assert max(errors) <= TOLERANCE[torch.float32]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_a_catalogue_of_one_item_has_no_negatives(n_tokens):
    x, w = normal(n_tokens, 3).requires_grad_(), normal(1, 3).requires_grad_()
    meetings = meetings_of(n_tokens, 1, n_chunks=1)
    loss = _FusedCrossEntropy.apply(x, w, targets_of(n_tokens, 1), meetings, True)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not w.grad.any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "regime", ["random", "nearly one-hot", "near-uniform", "extreme", "one target"]
)
def test_regimes(dtype, regime):
    n_tokens, n_items, d = 24, 40, 20
    hidden, table = normal(n_tokens, d, scale=0.7), normal(n_items, d, seed=1)
    targets = targets_of(n_tokens, n_items)
    if regime == "nearly one-hot":  # the target's logit is some 9 above the others'
        table = torch.nn.functional.normalize(table)
        hidden = table[targets] * 10 + hidden * 0.3
    elif regime == "near-uniform":
        hidden = hidden * 1e-3
    elif regime == "extreme":  # logits up to ±80
        logits = hidden.double() @ table.double().T
        hidden = hidden * (80 / logits.abs().max().item())
    elif regime == "one target":
        targets[:] = 3
    meetings = meetings_of(n_tokens, n_items, n_chunks=4, n_rounds=2)
    errors, (exact, _) = compare(hidden, table, targets, meetings, dtype)
    if regime == "nearly one-hot":
        assert 2e-3 < exact.item() < 5e-2
    assert max(errors) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("small_tiles")
def test_float16_keeps_probabilities_that_it_has_no_number_for():
    # The target's logit is 18 above the others': p is about 1e-8, and float16 ends at 6e-8.
    n, d = 24, 32
    table = torch.eye(d, device=DEVICE)[:n]
    hidden = table * 18 + normal(n, d, scale=0.3)
    targets = torch.arange(n, device=DEVICE)
    meetings = meetings_of(n, n, n_chunks=3)
    errors, _ = compare(hidden, table, targets, meetings, torch.float16, scale=2**20)
    assert max(errors) <= TOLERANCE[torch.float16]


@pytest.mark.usefixtures("small_tiles")
def test_items_no_token_meets_get_no_gradient():
    hidden, table = normal(3, 16), normal(40, 16, seed=1)
    meetings = meetings_of(3, 40, n_chunks=10, n_extra_chunks=0, n_rounds=1)
    errors, (_, untouched) = compare(hidden, table, targets_of(3, 40), meetings, torch.float32)
    assert max(errors) <= TOLERANCE[torch.float32]
    assert 20 < untouched.sum() < 40


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_table_under_autocast(dtype):
    hidden, table = normal(20, 16), normal(30, 16, seed=1)
    if DEVICE == "cpu":  # the interpreter does not round to bfloat16, it cuts
        table = table.to(dtype).float()
    errors, _ = compare(
        hidden, table, targets_of(20, 30), meetings_of(20, 30), dtype, table_dtype=torch.float32
    )
    assert max(errors) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("small_tiles")
def test_without_correction_negatives_count_in_every_round():
    hidden, table, targets = normal(20, 16), normal(30, 16, seed=1), targets_of(20, 30)
    meetings = meetings_of(20, 30)
    results = {}
    for correction in (True, False):
        errors, (exact, _) = compare(
            hidden, table, targets, meetings, torch.float32, correction=correction
        )
        assert max(errors) <= TOLERANCE[torch.float32]
        results[correction] = exact.item()
    assert results[False] > results[True] + 0.1


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (100, torch.float32)])
def test_the_tiles_in_force(d, dtype):
    hidden, table = normal(70, d, scale=0.5), normal(90, d, scale=0.5, seed=1)
    meetings = meetings_of(70, 90, n_chunks=4, n_rounds=2)
    errors, _ = compare(hidden, table, targets_of(70, 90), meetings, dtype)
    assert max(errors) <= TOLERANCE[dtype]


@pytest.mark.parametrize("d", [1, 64, 65, 300, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_are_tiles_for_every_size(d, dtype):
    for module in (rece, projections):
        assert min(module.tile_for(d, dtype)[:2]) >= 16


@pytest.mark.usefixtures("small_tiles")
def test_many_tokens_of_one_target_are_added_up():
    n = 3 * rece.BLOCK + 5
    hidden, table = normal(n + 2, 16), normal(9, 16, seed=1)
    targets = torch.tensor([8] + [4] * n + [0], device=DEVICE)
    meetings = meetings_of(n + 2, 9, n_chunks=2, n_extra_chunks=0, n_rounds=1)
    errors, _ = compare(hidden, table, targets, meetings, torch.float32)
    assert max(errors) <= TOLERANCE[torch.float32]


@pytest.mark.usefixtures("small_tiles")
def test_scaled_losses_scale_their_gradients():
    x = normal(20, 16).requires_grad_()
    w = normal(30, 16, seed=1).requires_grad_()
    loss = _FusedCrossEntropy.apply(x, w, targets_of(20, 30), meetings_of(20, 30), True)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    scaled = torch.autograd.grad(loss * 1024, (x, w))
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, one * 1024)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("wrong", [-1, 30, 2**40])
def test_a_target_out_of_range_makes_the_loss_nan(wrong):
    x = normal(20, 16).requires_grad_()
    w = normal(30, 16, seed=1).requires_grad_()
    targets = targets_of(20, 30)
    targets[7] = wrong
    meetings = meetings_of(20, 30)
    loss = _FusedCrossEntropy.apply(x, w, targets, meetings, True)
    assert loss.isnan()
    loss.backward()
    assert x.grad[:7].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("where", ["hidden", "table"])
def test_nan_is_not_hidden(where):
    hidden, table = normal(20, 16), normal(30, 16, seed=1)
    {"hidden": hidden, "table": table}[where][5, 2] = torch.nan
    meetings = meetings_of(20, 30, n_chunks=1)
    assert _FusedCrossEntropy.apply(hidden, table, targets_of(20, 30), meetings, True).isnan()


@pytest.mark.usefixtures("small_tiles")
def test_the_loss_launches_the_kernels_and_the_same_bits_come_out(monkeypatch):
    hidden, table = normal(12, 40).T, normal(12, 30, seed=1).T  # not contiguous
    targets, sequence = targets_of(40, 30), torch.zeros(40, dtype=torch.int64, device=DEVICE)
    empty = Histories(targets[:0], targets[:0])
    directions = normal(3, 4, 12, seed=5)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: directions.view(shape))
    results = {}
    for impl in ("triton", "torch", "triton"):
        x = hidden.detach().requires_grad_()
        w = table.detach().requires_grad_()
        loss = RECE(
            n_buckets=4, n_extra_chunks=0, n_rounds=3, duplicate_correction=True, impl=impl
        )(x, w, targets, sequence, empty)
        loss.backward()
        results.setdefault(impl, []).append((loss.detach(), x.grad, w.grad))
    torch.testing.assert_close(results["triton"][0], results["torch"][0])
    for one, other in zip(*results["triton"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "n_directions", "d", "n_rounds"), [(1, 1, 1, 1), (37, 21, 20, 2), (16, 50, 16, 1)]
)
def test_nearest_projections(dtype, n, n_directions, d, n_rounds):
    rows, directions = normal(n, d), normal(n_rounds, n_directions, d, seed=1)
    nearest = nearest_projections(rows, directions, dtype)
    assert nearest.shape == (n_rounds, n)
    assert nearest.dtype == torch.int16
    scores = directions.to(dtype).double() @ rows.to(dtype).double().T
    found = scores.gather(1, nearest.long()[:, None])[:, 0]
    # TF32 has 11 significant bits: a score that is nearly the best may be taken for it.
    torch.testing.assert_close(
        found, scores.amax(1), rtol=0, atol=0.01 if dtype == DTYPES[0] else 1e-5
    )


@pytest.mark.usefixtures("small_tiles")
def test_of_equal_projections_the_first_is_nearest():
    # Every direction comes four times, among them in one block and in different ones.
    rows, directions = normal(20, 16), normal(1, 10, 16, seed=1)
    many = directions.repeat(1, 4, 1)
    once, repeated = (nearest_projections(rows, some, torch.float32) for some in (directions, many))
    assert torch.equal(once, repeated)
    assert len(once.unique()) > 3


@pytest.mark.usefixtures("small_tiles")
def test_rows_without_a_direction_fall_into_some_bucket():
    rows = torch.zeros(3, 16, device=DEVICE)
    rows[1] = torch.nan
    rows[2] = torch.inf
    nearest = nearest_projections(rows, normal(2, 20, 16), torch.float32)
    assert nearest.min() >= 0
    assert nearest.max() < 20
    assert not nearest[:, 0].any()


@triton.jit(do_not_specialize=["first", "last", "n_from", "n_to", "n_chunks", "n_extra"])
def window_kernel(found, first, last, n_from, n_to, n_chunks, n_extra):
    begin, end = rece._window(first, last, n_from, n_to, n_chunks, n_extra)
    triton.language.store(found, begin)
    triton.language.store(found + 1, end)


@pytest.mark.parametrize("n_extra", [0, 1, 8])
@pytest.mark.parametrize(("n_from", "n_to"), [(17_001, 50_000_000), (50_000_000, 17_001)])
def test_chunks_of_a_catalogue_whose_products_pass_32_bits(n_from, n_to, n_extra):
    n_chunks = 451
    starts = [j * n_from // n_chunks for j in range(n_chunks + 1)]
    for chunk in (0, 200, n_chunks - 1):
        found = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        first, last = starts[chunk], starts[chunk + 1] - 1
        window_kernel[1,](found, first, last, n_from, n_to, n_chunks, n_extra)
        begin = max(chunk - n_extra, 0) * n_to // n_chunks
        end = min(chunk + n_extra + 1, n_chunks) * n_to // n_chunks
        assert found.tolist() == [begin, end]
