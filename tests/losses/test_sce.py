from __future__ import annotations

import math

import pytest
import torch

from sce_pipeline.losses import LOSSES, base
from sce_pipeline.losses.sce import (
    Buckets,
    bucketed_cross_entropy,
    draw_buckets,
    draw_buckets_fused,
    draw_centres,
    fused_bucketed_cross_entropy,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(batch, buckets):
    """SCE given its buckets, as the paper's algorithm goes, token by token."""
    x, w = batch.hidden, batch.item_embeddings
    largest = {}
    for tokens, items in zip(buckets.tokens.tolist(), buckets.items.tolist(), strict=True):
        for t in tokens:
            target = int(batch.targets[t])
            correct = x[t] @ w[target]
            partition = correct.exp()
            for item in items:
                if item != target:
                    partition = partition + (x[t] @ w[item]).exp()
            loss = partition.log() - correct
            if t not in largest or loss > largest[t]:
                largest[t] = loss
    return torch.stack(list(largest.values())).mean()


def random_buckets(batch, n_buckets, size_x, size_y, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(n, size):
        rows = [torch.randperm(n, generator=generator)[:size] for _ in range(n_buckets)]
        return torch.stack(rows)

    return Buckets(some(len(batch.hidden), size_x), some(len(batch.item_embeddings), size_y))


@pytest.mark.parametrize("elements", [1, 30, 2**22])
@pytest.mark.parametrize(("size_x", "size_y"), [(1, 1), (3, 2), (5, 4), (100, 100)])
def test_value_and_gradients(batch, agree, monkeypatch, elements, size_x, size_y):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    buckets = random_buckets(batch, 4, size_x, size_y)
    other = batch.like()
    agree(bucketed_cross_entropy(*batch[:3], buckets), batch, oracle(other, buckets), other)


def test_buckets_that_tie_share_the_gradient(make_batch, agree):
    batch = make_batch((4, 5), n_items=12)
    once = random_buckets(batch, 1, 6, 7)
    thrice = Buckets(once.tokens.repeat(3, 1), once.items.repeat(3, 1))
    other = batch.like()
    expected = bucketed_cross_entropy(*other[:3], once)
    agree(bucketed_cross_entropy(*batch[:3], thrice), batch, expected, other)


@pytest.mark.parametrize("mix_x", [False, True])
def test_one_bucket_over_everything_is_the_full_cross_entropy(batch, agree, mix_x):
    n_tokens, n_items = len(batch.hidden), len(batch.item_embeddings)
    loss = LOSSES["sce"](n_buckets=1, bucket_size_x=n_tokens, bucket_size_y=n_items, mix_x=mix_x)
    other = batch.like()
    agree(loss(*batch), batch, LOSSES["ce"]()(*other), other)


def test_a_token_fitted_exactly_stays_in_the_mean():
    # The first token's loss is exactly 0 in float32; the second's is log 2; the third has none.
    hidden = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    items = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    buckets = Buckets(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    loss = bucketed_cross_entropy(hidden, items, torch.tensor([0, 0, 1]), buckets)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[1].any()
    assert not hidden.grad[2].any()


def test_a_diverged_token_is_not_hidden():
    hidden = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]], requires_grad=True)
    buckets = Buckets(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    loss = bucketed_cross_entropy(hidden, torch.eye(2), torch.tensor([0, 0]), buckets)
    assert loss.isnan()


@pytest.mark.parametrize("mix_x", [False, True])
@pytest.mark.parametrize("elements", [1, 100, 2**22])
def test_buckets_hold_what_is_nearest_to_their_centre(make_batch, monkeypatch, mix_x, elements):
    batch = make_batch((20, 11), n_items=40)
    n_buckets, size_x, size_y = 7, 5, 6
    normal = torch.randn(n_buckets, 31 if mix_x else 4, dtype=torch.float64)
    drawn = 0

    def next_rows(n_rows, width, **options):
        nonlocal drawn
        drawn += n_rows
        assert width == normal.shape[1]
        return normal[drawn - n_rows : drawn].to(**options).clone()

    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(torch, "randn", next_rows)
    buckets = draw_buckets(
        *batch[:2], n_buckets=n_buckets, bucket_size_x=size_x, bucket_size_y=size_y, mix_x=mix_x
    )
    assert buckets.tokens.shape == (n_buckets, size_x)
    assert buckets.items.shape == (n_buckets, size_y)
    for bucket in range(n_buckets):
        centre = normal[bucket] @ batch.hidden if mix_x else normal[bucket]
        for chosen, vectors in ((buckets.tokens, batch.hidden), (buckets.items, batch[1])):
            scores = (vectors @ centre).tolist()
            nearest = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])
            assert set(chosen[bucket].tolist()) == set(nearest[: chosen.shape[1]])


@pytest.mark.parametrize(
    ("lengths", "expected"), [((1,), (2, 1)), ((2, 1), (3, 3)), ((100, 60), (25, 25))]
)
def test_automatic_sizes(make_batch, monkeypatch, lengths, expected, caplog):
    seen = {}

    def remember(hidden, items, **options):
        seen.update(options)
        return draw_buckets(hidden, items, **options)

    monkeypatch.setattr("sce_pipeline.losses.sce.draw_buckets", remember)
    loss = LOSSES["sce"](n_buckets="auto", bucket_size_x="auto", bucket_size_y=4, mix_x=False)
    assert loss(*make_batch(lengths, n_items=9)).isfinite()
    assert (seen["n_buckets"], seen["bucket_size_x"]) == expected
    assert not caplog.records


def test_sizes_beyond_tokens_and_catalogue_are_clamped(batch, agree):
    loss = LOSSES["sce"](n_buckets=3, bucket_size_x=500, bucket_size_y=500, mix_x=False)
    other = batch.like()
    agree(loss(*batch), batch, LOSSES["ce"]()(*other), other)


@pytest.mark.parametrize("mix_x", [False, True])
def test_inner_products_of_all_buckets_never_stand_whole(
    make_batch, monkeypatch, largest_tensor, mix_x
):
    n_buckets, n_tokens, n_items = 60, 500, 800
    batch = make_batch((n_tokens,), n_items=n_items)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 4096)
    with largest_tensor() as largest:
        draw_buckets(
            *batch[:2], n_buckets=n_buckets, bucket_size_x=10, bucket_size_y=10, mix_x=mix_x
        )
    assert 800 < largest.elements <= 4096


def test_logits_of_all_buckets_never_stand_whole(make_batch, monkeypatch, largest_tensor):
    batch = make_batch((100,), n_items=100)
    buckets = random_buckets(batch, 40, 30, 50)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 12_000)
    with largest_tensor() as largest:
        bucketed_cross_entropy(*batch[:3], buckets).backward()
    assert 8000 < largest.elements <= 12_000 * 51 / 50  # a column more, for the targets


def test_half_precision_holds_mixtures_of_many_long_hidden_states(make_batch, monkeypatch):
    batch = make_batch((3000,), n_items=50, d=64)
    with torch.no_grad():
        batch.hidden.mul_(24)
    omega = torch.randn(20, 3000)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: omega.to(**options).clone())
    sizes = {"n_buckets": 20, "bucket_size_x": 50, "bucket_size_y": 20, "mix_x": True}
    exact = draw_buckets(*batch[:2], **sizes).tokens.tolist()
    half = draw_buckets(*batch.to(torch.float16)[:2], **sizes).tokens.tolist()
    for one, other in zip(exact, half, strict=True):
        assert len(set(one) & set(other)) > 45


@pytest.mark.parametrize(("size_x", "size_y"), [(1, 1), (3, 2), (100, 100)])
def test_the_kernels_agree_with_pytorch_given_the_buckets(batch, agree, size_x, size_y):
    buckets = Buckets(*(t.to(DEVICE) for t in random_buckets(batch, 4, size_x, size_y)))
    batch = batch.to(DEVICE, torch.float32)
    other = batch.like()
    agree(
        fused_bucketed_cross_entropy(*batch[:3], buckets),
        batch,
        bucketed_cross_entropy(*other[:3], buckets),
        other,
    )


@pytest.mark.parametrize("mix_x", [False, True])
def test_the_kernels_over_everything_are_the_full_cross_entropy(batch, agree, mix_x):
    batch = batch.to(DEVICE, torch.float32)
    sizes = {"n_buckets": 2, "bucket_size_x": 500, "bucket_size_y": 500, "mix_x": mix_x}
    other = batch.like()
    loss = LOSSES["sce"](**sizes, impl="triton")
    agree(loss(*batch), batch, LOSSES["ce"]()(*other), other)


@pytest.mark.parametrize("mix_x", [False, True])
@pytest.mark.parametrize("few", [0, 2**14])
def test_the_kernels_choose_the_same_buckets(make_batch, monkeypatch, mix_x, few):
    from sce_pipeline.losses.kernels import nearest  # noqa: PLC0415

    monkeypatch.setattr(nearest, "FEW_ROWS", few)
    batch = make_batch((40, 30), n_items=90, dtype=torch.float32).to(DEVICE)
    sizes = {"n_buckets": 6, "bucket_size_x": 9, "bucket_size_y": 11, "mix_x": mix_x}
    torch.manual_seed(0)
    expected = draw_buckets(*batch[:2], **sizes)
    torch.manual_seed(0)
    buckets = draw_buckets_fused(*batch[:2], **sizes)
    torch.testing.assert_close(buckets.tokens.sort().values, expected.tokens.sort().values)
    torch.testing.assert_close(buckets.items.sort().values, expected.items.sort().values)


@pytest.mark.parametrize("elements", [1, 300, 2**22])
def test_mixtures_for_the_kernels_are_drawn_few_at_a_time(
    make_batch, monkeypatch, largest_tensor, elements
):
    batch = make_batch((100,), n_items=20, dtype=torch.float32)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    with largest_tensor() as largest:
        centres = draw_centres(12, batch.hidden, mix_x=True)
    assert centres.shape == (12, 4)
    assert largest.elements <= max(elements, batch.hidden.numel())


@pytest.mark.parametrize("impl", ["auto", "torch", "triton"])
def test_the_loss_takes_the_implementation_it_is_told(make_batch, monkeypatch, impl):
    batch = make_batch((5, 4), n_items=12, dtype=torch.float32).to(DEVICE)
    taken = []
    for name in ("bucketed_cross_entropy", "fused_bucketed_cross_entropy"):
        function = globals()[name]

        def remember(*arguments, function=function, name=name):
            taken.append(name)
            return function(*arguments)

        monkeypatch.setattr(f"sce_pipeline.losses.sce.{name}", remember)
    loss = LOSSES["sce"](n_buckets=3, bucket_size_x=4, bucket_size_y=5, mix_x=False, impl=impl)
    assert loss(*batch).isfinite()
    fused = impl == "triton" or (impl == "auto" and DEVICE == "cuda")
    assert taken == ["fused_bucketed_cross_entropy" if fused else "bucketed_cross_entropy"]
