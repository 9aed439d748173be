from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses import cast_table, shard_passes
from sce_pipeline.losses.cce import _TwoPasses, cut_cross_entropy
from sce_pipeline.losses.kernels import cce as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])


def draw(n_tokens, n_items, d, *, size=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d, generator=generator) * size
    w = torch.randn(n_items, d, generator=generator) * 0.7 / d**0.5
    targets = torch.randint(n_items, (n_tokens,), generator=generator)
    return x.to(DEVICE, dtype), w.to(DEVICE, dtype), targets.to(DEVICE)


def exact(x, w, targets, bias, label_smoothing=0.0, z_loss=0.0, logit_scale=1.0, normalized=False):
    """The loss in float64 from the whole matrix of logits."""
    if normalized:
        x, w = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, w))
    logits = logit_scale * (x @ w.T)
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(1)
    of_target = logits.gather(1, targets[:, None])[:, 0]
    mean = logits.mean(1)
    loss = lse - (1 - label_smoothing) * of_target - label_smoothing * mean
    return (loss + z_loss * lse**2).mean()


def errors(x, w, targets, bias=None, **options):
    """Relative errors of the value and of each gradient, by the norms."""
    doubles = [part.double().requires_grad_() for part in (x, w, bias) if part is not None]
    live = [part.clone().requires_grad_() for part in (x, w, bias) if part is not None]
    expected = exact(*doubles[:2], targets, *doubles[2:] or [None], **options)
    loss = cut_cross_entropy(
        *live[:2],
        targets,
        item_bias=live[2] if bias is not None else None,
        impl="triton",
        **options,
    )
    (expected / 3).backward()  # a third is rounded in half precision
    (loss / 3).backward()
    assert loss.dtype == torch.float32
    assert all(part.grad.dtype == part.dtype for part in live)
    pairs = [(loss.detach(), expected.detach())]
    pairs += [(part.grad, double.grad) for part, double in zip(live, doubles, strict=True)]
    return [float((got.double() - ref).norm() / ref.norm()) for got, ref in pairs]


@DTYPES
@pytest.mark.parametrize(
    ("n_tokens", "n_items", "d"),
    [(9, 13, 5), (3, 200, 20), (130, 7, 16), (200, 300, 24), (65, 129, 64), (150, 270, 33)],
)
def test_ragged_shapes(n_tokens, n_items, d, dtype):
    assert max(errors(*draw(n_tokens, n_items, d, dtype=dtype))) < TOLERANCES[dtype]


@DTYPES
def test_the_largest_size(dtype):
    assert max(errors(*draw(20, 40, 512, dtype=dtype))) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("size", [0.0, 0.01, 6.0, 40.0], ids=["zero", "uniform", "large", "±80"])
def test_the_size_of_logits(size, dtype):
    x, w, targets = draw(100, 150, 24, size=size, dtype=dtype)
    if size == 40.0:
        assert 60 < float((x.double() @ w.double().T).abs().max()) < 200
    found = errors(x, w, targets) if size else errors(x, w, targets)[:2]  # w's is 0 there
    assert max(found) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("size", [1.0, 2.0])
def test_nearly_one_hot(size, dtype):
    """Each token points at its target, whose probability is within some percent of 1."""
    x, w, targets = draw(100, 150, 24, dtype=dtype)
    w = torch.nn.functional.normalize(w.double(), dim=1)
    # A multiple of the target's embedding, found so that the softmax leaves about 1% to the others.
    w = (w * 3 * size).to(dtype)
    x = (w[targets].double() * (12 / (3 * size) ** 2)).to(dtype)
    misses = 1 - (x.double() @ w.double().T).softmax(1).gather(1, targets[:, None])
    assert 1e-4 < float(misses.mean()) < 0.1
    assert max(errors(x, w, targets)) < TOLERANCES[dtype]


@DTYPES
def test_all_tokens_have_one_target_and_most_items_none(dtype):
    x, w, targets = draw(150, 200, 16, dtype=dtype)
    assert max(errors(x, w, targets * 0 + 3)) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"logit_scale": 3.0},
        {"normalized": True, "logit_scale": 8.0},
        {"label_smoothing": 0.1, "z_loss": 0.01, "normalized": True, "logit_scale": 5.0},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("biased", [False, True])
def test_options(options, biased, dtype):
    x, w, targets = draw(70, 150, 20, dtype=dtype)
    bias = torch.linspace(-2, 3, 150, device=DEVICE) if biased else None
    assert max(errors(x, w, targets, bias, **options)) < TOLERANCES[dtype]


def test_a_catalogue_of_one_item_has_no_loss():
    x, w, targets = draw(3, 1, 16)
    x.requires_grad_()
    w.requires_grad_()
    loss = cut_cross_entropy(x, w, targets, impl="triton")
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not w.grad.any()


@DTYPES
def test_the_same_inputs_give_the_same_bits(dtype):
    results = []
    for _ in range(2):
        x, w, targets = draw(200, 300, 24, dtype=dtype)
        x.requires_grad_()
        w.requires_grad_()
        loss = cut_cross_entropy(x, w, targets, impl="triton")
        loss.backward()
        results.append((loss, x.grad, w.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(("n_own", "n_other"), [(64, 10_000), (64 * 5, 10_000), (7, 1), (1000, 3)])
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_a_schedule_leaves_nothing_out(n_own, n_other, processors, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    sizes = kernels.Tiles(64, 32, 4, 2)
    plan = kernels.schedule(n_own, n_other, sizes, torch.device("cpu"))
    n_tiles = -(-n_other // 32)
    assert plan.n_blocks == -(-n_own // 64)
    assert plan.n_shares * plan.tiles_per_share >= n_tiles
    assert (plan.n_shares - 1) * plan.tiles_per_share < n_tiles
    assert plan.n_programs <= max(plan.n_blocks, plan.n_whole + processors)


@pytest.mark.parametrize("processors", [1, 7, 50])
def test_however_the_work_is_shared_out(processors, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    for dtype, tolerance in TOLERANCES.items():
        assert max(errors(*draw(130, 270, 16, dtype=dtype))) < tolerance
        assert max(errors(*draw(130, 270, 16, size=40.0, dtype=dtype))) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_live_table_of_float32_under_autocast(dtype):
    x, w, targets = draw(50, 90, 16)
    doubles = [part.to(dtype).double().requires_grad_() for part in (x, w)]
    exact(*doubles, targets, None).backward()
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast(DEVICE, dtype):
        loss = cut_cross_entropy(x, w, targets, impl="triton")
    loss.backward()
    for part, double in zip((x, w), doubles, strict=True):
        assert part.grad.dtype == torch.float32
        error = (part.grad.double() - double.grad).norm() / double.grad.norm()
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 3.0}], ids="-".join
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("grads", ["both", "hidden", "table"])
def test_ranges_of_a_live_table_cast_one_after_the_other(
    grads, biased, options, dtype, monkeypatch
):
    x, w, targets = draw(50, 300, 16)
    bias = torch.linspace(-2, 3, 600, device=DEVICE)[::2] if biased else None
    doubles = [part.to(dtype).double().requires_grad_() for part in (x, w)]
    expected = exact(*doubles, targets, None if bias is None else bias.double(), **options)
    expected.backward()
    x.requires_grad_(grads != "table")
    w.requires_grad_(grads != "hidden")
    monkeypatch.setattr(cast_table, "CAST_BYTES", 16 * 2 * 130)
    monkeypatch.setattr(_TwoPasses, "apply", None)  # which casts the whole
    with torch.autocast(DEVICE, dtype):
        loss = cut_cross_entropy(x, w, targets, item_bias=bias, impl="triton", **options)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for part, double in zip((x, w), doubles, strict=True):
        if part.requires_grad:
            assert part.grad.dtype == torch.float32
            error = (part.grad.double() - double.grad).norm() / double.grad.norm()
            assert error < TOLERANCES[dtype]
        else:
            assert part.grad is None


@pytest.mark.parametrize("options", [{"normalized": True, "logit_scale": 5.0}, {}])
def test_what_ranges_cannot_do_is_done_with_the_whole_cast(options, monkeypatch):
    x, w, targets = draw(50, 300, 16)
    bias = torch.linspace(-2, 3, 300, device=DEVICE).requires_grad_(not options)
    found = []
    for cast_bytes in (cast_table.CAST_BYTES, 16):
        monkeypatch.setattr(cast_table, "CAST_BYTES", cast_bytes)
        live = x.clone().requires_grad_(), w.clone().requires_grad_()
        bias.grad = None
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = cut_cross_entropy(*live, targets, item_bias=bias, impl="triton", **options)
        loss.backward()
        found.append([loss, *(part.grad for part in live), bias.grad if not options else loss])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("wrong", [-1, 300, 2**40])
def test_a_target_out_of_range_gives_nan_in_ranges(wrong, monkeypatch):
    x, w, targets = draw(50, 300, 16)
    targets[7] = wrong
    monkeypatch.setattr(cast_table, "CAST_BYTES", 16 * 2 * 130)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert cut_cross_entropy(x, w, targets, impl="triton").isnan()


def test_layouts_that_are_not_contiguous():
    x, w, targets = draw(50, 90, 16)
    expected = cut_cross_entropy(x, w, targets, impl="triton")
    wide = torch.stack([x, x], dim=2)[:, :, 0], w.T.contiguous().T, targets.repeat(2, 1).T[:, 0]
    assert torch.equal(cut_cross_entropy(*wide, impl="triton"), expected)


@pytest.mark.parametrize("wrong", [-1, 90, 2**40])
def test_a_target_out_of_range_gives_nan(wrong):
    x, w, targets = draw(50, 90, 16)
    targets[7] = wrong
    assert cut_cross_entropy(x, w, targets, impl="triton").isnan()


@DTYPES
@pytest.mark.parametrize("part", [0, 1])
def test_nan_goes_through(part, dtype):
    x, w, targets = draw(50, 90, 16, dtype=dtype)
    (x, w)[part][3, 2] = torch.nan
    assert cut_cross_entropy(x, w, targets, impl="triton").isnan()


@pytest.mark.parametrize(
    ("skip_mass", "dtype"), [(1e-3, torch.float32), *((0.1, dtype) for dtype in TOLERANCES)]
)
def test_skipped_tiles_cost_no_more_than_the_bound(skip_mass, dtype):
    # Items in groups that belong to the tokens of one place: most tiles have next to no mass.
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator)
    w = (centres.repeat_interleave(200, 0) + 0.1).to(DEVICE, dtype)
    x = centres.repeat_interleave(40, 0).to(DEVICE, dtype)
    targets = (torch.arange(240) // 40 * 200 + torch.arange(240) % 40).to(DEVICE)
    gradients = {}
    for mass in (0.0, skip_mass):
        live = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = cut_cross_entropy(*live, targets, skip_mass=mass, impl="triton")
        (len(x) * loss).backward()
        gradients[mass] = loss.detach(), *(part.grad.double() for part in live)
    exact_ones, skipped = gradients[0.0], gradients[skip_mass]
    torch.testing.assert_close(skipped[0], exact_ones[0])
    rounding = TOLERANCES[dtype]
    off = (skipped[1] - exact_ones[1]).norm(dim=1)
    longest = float(w.double().norm(dim=1).max())
    assert float(off.max()) <= skip_mass * longest + rounding * longest
    off_table = float((skipped[2] - exact_ones[2]).norm(dim=1).sum())
    lengths = float(x.double().norm(dim=1).sum())
    assert off_table <= skip_mass * lengths + rounding * lengths
    assert off_table > 0  # something was left out


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("n_tokens", "n_items", "d", "size"),
    [
        (9, 13, 5, 1.0),
        (130, 7, 16, 1.0),
        (150, 270, 33, 1.0),
        (100, 150, 24, 40.0),
        (5, 1, 16, 1.0),
    ],
)
def test_parts_of_a_softmax(n_tokens, n_items, d, size, biased, dtype):
    """Some of the items, and tokens whose targets are among them or not."""
    x, w, targets = draw(n_tokens, n_items, d, size=size, dtype=dtype)
    targets[::3] = -1
    bias = torch.linspace(-2, 3, n_items, device=DEVICE) if biased else None
    terms = kernels.Terms(1.3, 0.1, 0.2, 0.0, bias, None, None, None, None)
    parts = kernels.hidden_parts(x, w, targets, terms, grad=True)
    double = None if bias is None else bias.double()
    expected = shard_passes.hidden_parts(x.double(), w.double(), double, targets, 1.3, grad=True)
    tolerance = TOLERANCES[dtype]
    # Logits are rounded in float32 whatever the dtype: 2**-24 of 200 and more.
    torch.testing.assert_close(parts.others.double(), expected.others, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.of_target.double(), expected.of_target, rtol=1e-5, atol=1e-4)
    assert float((parts.mean.double() - expected.mean).norm()) <= tolerance * float(
        expected.mean.norm()
    )
    assert kernels.hidden_parts(x, w, targets, terms, grad=False).mean is None


@DTYPES
def test_nan_goes_through_parts(dtype):
    x, w, targets = draw(50, 90, 16, dtype=dtype)
    x[3, 2] = torch.nan
    terms = kernels.Terms(1.0, 0.0, 0.0, 0.0, None, None, None, None, None)
    parts = kernels.hidden_parts(x, w, targets, terms, grad=True)
    assert parts.others[3].isnan()
    assert parts.mean[3].isnan().all()
    assert parts.others.isnan().sum() == 1
