"""Each case runs on three ranks and is compared with the whole matrix of logits in float64."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sce_pipeline.losses import cast_table, shard_passes
from sce_pipeline.losses.cce import cut_cross_entropy
from sce_pipeline.losses.sharded import sharded_cross_entropy

NEEDS_TRITON = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="kernels are interpreted on Linux where there is no GPU, and these ranks have none",
)


class Case(NamedTuple):
    """A batch and a table, and who has what of them.

    ``counts`` are the tokens and ``rows`` the items of each rank; ``size`` is that of the hidden
    states, and ``kind`` how they and the targets are drawn.
    """

    counts: tuple[int, ...] = (5, 0, 7)
    rows: tuple[int, ...] = (4, 4, 5)
    d: int = 6
    size: float = 1.0
    kind: str = "random"
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    biased: bool = False
    impl: str = "torch"
    options: tuple[tuple[str, float], ...] = ()

    @property
    def n_items(self) -> int:
        return sum(self.rows)


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, table, targets and log q, the same whoever draws them."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    n_tokens = sum(case.counts)
    x, w = normal(n_tokens, case.d) * case.size, normal(case.n_items, case.d)
    targets = torch.randint(case.n_items, (n_tokens,), generator=generator)
    if case.kind == "duplicates":
        targets = targets % 2 + case.n_items - 2
    if case.kind == "one-hot":
        w = torch.nn.functional.normalize(w, dim=1) * 3
        x = w[targets] * case.size
    if case.kind == "groups":  # of items that belong to the tokens of one place
        centres, each = normal(6, case.d), case.n_items // 6
        x, w = centres.repeat_interleave(n_tokens // 6, 0), centres.repeat_interleave(each, 0)
        targets = torch.arange(n_tokens) // (n_tokens // 6) * each
    log_probability = normal(case.n_items).log_softmax(0) if case.biased else None
    return x.to(case.dtype), w.to(case.dtype), targets, log_probability


def oracle(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients in float64 from all logits, of a third of the mean."""
    x, w, targets, log_probability = draw(case)
    if case.autocast:
        x, w = x.bfloat16(), w.bfloat16()
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    options = dict(case.options)
    smoothing = options.get("label_smoothing", 0.0)
    logits = options.get("logit_scale", 1.0) * (x @ w.T)
    if log_probability is not None:
        logits = logits - log_probability
    lse = logits.logsumexp(1)
    losses = lse - (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0]
    losses = losses - smoothing * logits.mean(1) + options.get("z_loss", 0.0) * lse**2
    loss = losses.mean()
    (loss / 3).backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def part(rank: int, sizes: tuple[int, ...]) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def compute(rank: int, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What one rank gets: the loss, and the gradients of its tokens and of its rows."""
    x, w, targets, log_probability = draw(case)
    tokens, rows = part(rank, case.counts), part(rank, case.rows)
    hidden = x[tokens].clone().requires_grad_()
    shard = w[rows].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss = sharded_cross_entropy(
            hidden,
            shard,
            targets[tokens],
            first_item=rows.start,
            n_items=case.n_items,
            counts=case.counts,
            log_probability=None if log_probability is None else log_probability[rows],
            impl=case.impl,
            **dict(case.options),
        )
    (loss / 3).backward()
    assert hidden.grad is not None
    assert shard.grad is not None
    assert hidden.grad.dtype == shard.grad.dtype == case.dtype
    return loss.detach(), hidden.grad, shard.grad


def together(answers: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, which is the same bits on every rank, and the whole gradients."""
    losses, of_hidden, of_table = zip(*answers, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return losses[0], torch.cat(of_hidden), torch.cat(of_table)


def errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Relative errors by the norms."""
    pairs = zip(got, expected, strict=True)
    return [float((one.double() - other).norm() / other.norm()) for one, other in pairs]


def options(**values: float) -> tuple[tuple[str, float], ...]:
    return tuple(values.items())


EVERYTHING = options(label_smoothing=0.1, z_loss=0.02, logit_scale=1.7)
CASES = {
    "plain": Case(),
    "only one rank has tokens": Case(counts=(0, 0, 4)),
    "uneven rows": Case(rows=(1, 9, 3)),
    "one row each": Case(rows=(1, 1, 1)),
    "duplicate targets": Case(kind="duplicates"),
    "nearly one-hot": Case(kind="one-hot", size=1.5),
    "one-hot": Case(kind="one-hot", size=4.0),
    "zero": Case(size=0.0, options=options(label_smoothing=0.1)),
    "±80": Case(size=25.0),
    "label smoothing": Case(options=options(label_smoothing=0.2)),
    "z-loss": Case(options=options(z_loss=0.3)),
    "scale": Case(options=options(logit_scale=2.5)),
    "log q": Case(biased=True),
    "everything": Case(biased=True, options=EVERYTHING),
    "everything, ±80": Case(biased=True, size=15.0, options=EVERYTHING),
    "everything, uneven": Case(biased=True, rows=(1, 9, 3), options=EVERYTHING),
    "everything, long": Case(biased=True, rows=(1, 150, 20), options=EVERYTHING),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case, three_ranks):
    got = together(three_ranks.run(compute, case))
    expected = oracle(case)
    if case.size == 25.0:
        x, w, *_ = draw(case)
        assert 70 < float((x @ w.T).abs().max()) < 300
    if case.size:
        assert max(errors(got, expected)) < 1e-11
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["plain", "nearly one-hot", "±80", "everything, uneven"])
def test_in_float32(name, three_ranks):
    case = CASES[name]._replace(dtype=torch.float32)
    assert max(errors(together(three_ranks.run(compute, case)), oracle(case))) < 1e-5


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["plain", "one row each", "nearly one-hot", "±80", "everything", "everything, uneven"]
)
def test_in_triton(name, dtype, three_ranks):
    case = CASES[name]._replace(dtype=dtype, impl="triton", d=16)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert max(errors(together(three_ranks.run(compute, case)), oracle(case))) < tolerance


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_a_live_table_of_float32_under_autocast(impl, three_ranks):
    case = Case(dtype=torch.float32, autocast=True, impl=impl, d=16, options=EVERYTHING)
    tolerance = 2e-6 if impl == "torch" else 4e-3
    assert max(errors(together(three_ranks.run(compute, case)), oracle(case))) < tolerance


def compute_in_ranges(
    rank: int, case: Case, cast_bytes: int
) -> tuple[tuple[Tensor, ...], list[int]]:
    """What one rank gets where so many bytes of its rows may be cast at a time; sizes of casts."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.bfloat16:
                sizes.append(result.numel() * 2)
            return result

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(cast_table, "CAST_BYTES", cast_bytes)
        return compute(rank, case), sizes


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize(
    ("n_rows", "name"),
    [
        (3, "plain"),
        (130, "plain"),
        (130, "nearly one-hot"),
        (130, "duplicate targets"),
        (130, "±80"),
        (130, "everything, long"),
    ],
)
def test_ranges_of_rows_give_what_the_whole_cast_does(n_rows, name, impl, three_ranks):
    case = CASES[name]._replace(dtype=torch.float32, autocast=True, impl=impl, d=16)
    cast_bytes = n_rows * 16 * (2 if impl == "triton" else 4)
    answers = three_ranks.run(compute_in_ranges, case, cast_bytes)
    got = together([found for found, _ in answers])
    # What is cast besides are hidden states, sent to each of three ranks, and the tokens' targets.
    others = 2 * 16 * 3 * max(case.counts)
    assert all(max(sizes) <= max(cast_bytes, others) for _, sizes in answers)
    tolerance = 1e-5 if impl == "torch" else 4e-3
    assert max(errors(got, oracle(case))) < tolerance
    whole = together(three_ranks.run(compute, case))
    assert max(errors(got, tuple(part.double() for part in whole))) < tolerance


def test_ranges_that_hold_a_token_s_target_alone_contribute_no_other_item(three_ranks):
    case = Case(rows=(1, 1, 1), dtype=torch.float32, autocast=True, d=16)
    answers = three_ranks.run(compute_in_ranges, case, 1)
    assert max(errors(together([found for found, _ in answers]), oracle(case))) < 3e-6


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_the_same_inputs_give_the_same_bits(impl, three_ranks):
    case = Case(dtype=torch.float32, impl=impl, d=16, biased=True, options=EVERYTHING)
    first, second = (together(three_ranks.run(compute, case)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("dtype", "in_ranges"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["float32", "ranges"],
)
def test_skipped_tiles_cost_no_more_than_the_bound(dtype, in_ranges, three_ranks):
    mass, tolerance = 0.1, 1e-5 if dtype == torch.float32 else 4e-3
    case = Case((100, 0, 140), (150, 450, 600), 16, 1.0, "groups", dtype, impl="triton")
    if in_ranges:  # which there are of what is cast
        case = case._replace(dtype=torch.float32, autocast=True)
    exact = together(three_ranks.run(compute, case))
    skipping = case._replace(options=options(skip_mass=mass))
    if in_ranges:
        answers = three_ranks.run(compute_in_ranges, skipping, 130 * 16 * 2)
        skipped = together([found for found, _ in answers])
        torch.testing.assert_close(skipped[0], exact[0])
    else:
        skipped = together(three_ranks.run(compute, skipping))
        assert torch.equal(skipped[0], exact[0])
    x, w, *_ = (None if part is None else part.double() for part in draw(case))
    off_hidden, off_table = (
        # Of the sum over the tokens, not of a third of the mean.
        (one.double() - other.double()).norm(dim=1) * 3 * len(x)
        for one, other in zip(skipped[1:], exact[1:], strict=True)
    )
    assert 0 < float(off_hidden.max()) <= (mass + tolerance) * float(w.norm(dim=1).max())
    assert 0 < float(off_table.sum()) <= (mass + tolerance) * float(x.norm(dim=1).sum())


@NEEDS_TRITON
def test_what_may_be_skipped_is_shared_by_the_ranks(three_ranks):
    """Where the softmax is uniform, all blocks of items have more than their equal share of δ."""
    case = Case((30, 0, 40), (128, 448, 640), 16, 0.01, dtype=torch.float32, impl="triton")
    exact = together(three_ranks.run(compute, case))
    skipping = case._replace(options=options(skip_mass=0.9))
    skipped = together(three_ranks.run(compute, skipping))
    assert all(torch.equal(one, other) for one, other in zip(skipped, exact, strict=True))


def one_rank(rank: int, case: Case) -> list[tuple[Tensor, ...]]:
    """The same on a group of one rank, and by the function that knows no groups."""
    groups = [dist.new_group([each]) for each in range(dist.get_world_size())]
    x, w, targets, log_probability = draw(case)
    results = []
    for function, where in (
        (cut_cross_entropy, {}),
        (
            sharded_cross_entropy,
            {"first_item": 0, "n_items": len(w), "counts": [len(x)], "group": groups[rank]},
        ),
    ):
        hidden, table = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(
            hidden,
            table,
            targets,
            **where,
            log_probability=log_probability,
            impl=case.impl,
            **dict(case.options),
        )
        (loss / 3).backward()
        results.append((loss.detach(), hidden.grad, table.grad))
    return results


@pytest.mark.parametrize(
    "case",
    [
        Case(biased=True, options=EVERYTHING),
        pytest.param(
            Case(dtype=torch.float32, d=16, biased=True, impl="triton", options=EVERYTHING),
            marks=NEEDS_TRITON,
        ),
    ],
    ids=["torch", "triton"],
)
def test_one_rank_computes_what_cut_cross_entropy_does(case, three_ranks):
    for one, other in three_ranks.run(one_rank, case):
        torch.testing.assert_close(one, other)


def no_tokens(rank: int) -> tuple[Tensor, ...]:
    hidden = torch.zeros(0, 4, requires_grad=True)
    shard = torch.ones(2, 4, requires_grad=True)
    loss = sharded_cross_entropy(
        hidden, shard, torch.zeros(0).long(), first_item=2 * rank, n_items=6, counts=[0, 0, 0]
    )
    loss.backward()
    return loss.detach(), hidden.grad, shard.grad


def test_no_token_anywhere(three_ranks):
    for loss, of_hidden, of_table in three_ranks.run(no_tokens):
        assert loss == 0
        assert of_hidden.shape == (0, 4)
        assert torch.equal(of_table, torch.zeros(2, 4))


def loss_alone(rank: int, case: Case, target: int, grad: bool) -> Tensor:
    """The loss where rank 2 has an odd target and rank 0 hidden states without gradient."""
    x, w, targets, _ = draw(case)
    tokens, rows = part(rank, case.counts), part(rank, case.rows)
    if target != 0:
        targets[-1] = target
    with torch.set_grad_enabled(grad):
        loss = sharded_cross_entropy(
            x[tokens].requires_grad_(rank != 0),
            w[rows].requires_grad_(),
            targets[tokens],
            first_item=rows.start,
            n_items=case.n_items,
            counts=case.counts,
            impl=case.impl,
        )
    assert loss.requires_grad == grad
    if grad:
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("wrong", [-1, 13, 2**40])
def test_a_target_out_of_range_gives_nan_on_every_rank(wrong, impl, three_ranks):
    case = Case(dtype=torch.float32, impl=impl)
    assert all(loss.isnan() for loss in three_ranks.run(loss_alone, case, wrong, True))


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_are_not_needed_everywhere(grad, three_ranks):
    losses = three_ranks.run(loss_alone, Case(), 0, grad)
    expected, *_ = oracle(Case())
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and under 1, got 1.0"),
        ({"z_loss": -1.0}, "z_loss must be at least 0 and finite, got -1.0"),
        ({"logit_scale": 0.0}, "logit_scale must be positive and finite, got 0.0"),
        ({"skip_mass": 1.0}, "skip_mass must be at least 0 and under 1, got 1.0"),
        ({"impl": "trion"}, "impl must be one of auto, torch, triton, got 'trion'"),
        ({"log_probability": torch.zeros(9)}, r"log_probability of \(3,\), got \(9,\)"),
        ({"first_item": 7}, r"9 items \(n_items\), got .* items 7 \(first_item\) to 9"),
        ({"first_item": -1}, r"items -1 \(first_item\) to 1"),
    ],
)
def test_what_is_refused(changes, message):
    arguments = {"first_item": 3, "n_items": 9, "counts": [5]}
    with pytest.raises(ValueError, match=message):
        sharded_cross_entropy(
            torch.zeros(5, 4), torch.zeros(3, 4), torch.zeros(5).long(), **{**arguments, **changes}
        )


def test_a_rank_without_rows_is_refused():
    with pytest.raises(ValueError, match="expected at least one row of the 9 items"):
        sharded_cross_entropy(
            torch.zeros(0, 4),
            torch.zeros(0, 4),
            torch.zeros(0).long(),
            first_item=9,
            n_items=9,
            counts=[0],
        )


@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_matrix_of_tokens_and_items_never_stands_whole(chunk, largest_tensor, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (60, 300))
    own = torch.randint(-1, 300, (60,), generator=generator)
    whole = shard_passes.hidden_parts(x, w, None, own, 1.5, grad=True)
    weights = torch.rand(60, generator=generator, dtype=torch.float64)
    rest = None, own, 1.5, whole.others + 1, weights, 0.1, 0.2
    table = shard_passes.table_gradient(x, w, *rest)
    monkeypatch.setattr("sce_pipeline.losses.base.CPU_CHUNK_ELEMENTS", chunk)
    with largest_tensor() as largest:
        parts = shard_passes.hidden_parts(x, w, None, own, 1.5, grad=True)
        in_chunks = shard_passes.table_gradient(x, w, *rest)
    assert largest.elements <= 300 * 8
    torch.testing.assert_close(tuple(parts), tuple(whole))
    torch.testing.assert_close(in_chunks, table)
