from __future__ import annotations

import math

import pytest
import torch

from sce_pipeline.losses import LOSSES, base
from sce_pipeline.losses.rece import RECE, Meetings, chunked_cross_entropy, draw_meetings

OPTIONS = {"n_buckets": 4, "n_extra_chunks": 1, "n_rounds": 3, "duplicate_correction": True}


def chunks_of(order, n_chunks):
    """The chunk of each thing, from the definition: cut at the fractions j/n_chunks."""
    n = len(order)
    return {
        thing: j
        for j in range(n_chunks)
        for thing in order[j * n // n_chunks : (j + 1) * n // n_chunks]
    }


def oracle(batch, meetings, duplicate_correction=True):
    """The paper's loss token by token: logits less the logarithm of how often a pair meets."""
    x, w = batch.hidden, batch.item_embeddings
    orders = zip(meetings.token_order.tolist(), meetings.item_order.tolist(), strict=True)
    rounds = [[chunks_of(order, meetings.n_chunks) for order in pair] for pair in orders]
    losses = []
    for t, target in enumerate(batch.targets.tolist()):
        correct = x[t] @ w[target]
        partition = correct.exp()
        for item in range(len(w)):
            times = sum(
                abs(token_chunk[t] - item_chunk[item]) <= meetings.n_extra_chunks
                for token_chunk, item_chunk in rounds
            )
            if times and item != target:
                correction = math.log(times) if duplicate_correction else 0
                partition = partition + times * (x[t] @ w[item] - correction).exp()
        losses.append(partition.log() - correct)
    return torch.stack(losses).mean()


def random_meetings(batch, n_chunks, n_extra_chunks, n_rounds, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def orders(n):
        return torch.stack([torch.randperm(n, generator=generator) for _ in range(n_rounds)]).int()

    def chunks(order):
        of = [chunks_of(row, n_chunks) for row in order.tolist()]
        return torch.tensor([[row[i] for row in of] for i in range(order.shape[1])]).short()

    token_order, item_order = orders(len(batch.hidden)), orders(len(batch.item_embeddings))
    return Meetings(
        token_order,
        item_order,
        chunks(token_order),
        chunks(item_order),
        n_chunks,
        n_extra_chunks,
    )


@pytest.mark.parametrize("elements", [1, 50, 2**22])
@pytest.mark.parametrize("sizes", [(1, 0, 1), (3, 0, 2), (4, 1, 5), (7, 2, 2), (40, 3, 2)])
@pytest.mark.parametrize("duplicate_correction", [True, False])
def test_value_and_gradients(batch, agree, monkeypatch, elements, sizes, duplicate_correction):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    meetings = random_meetings(batch, *sizes)
    other = batch.like()
    loss = chunked_cross_entropy(*batch[:3], meetings, duplicate_correction=duplicate_correction)
    agree(loss, batch, oracle(other, meetings, duplicate_correction), other)


@pytest.mark.parametrize("sizes", [(1, 0, 1), (1, 0, 3), (3, 2, 1)])
def test_chunks_that_meet_everything_are_the_full_cross_entropy(batch, agree, sizes):
    n_buckets, n_extra_chunks, n_rounds = sizes
    options = {"n_buckets": n_buckets, "n_extra_chunks": n_extra_chunks, "n_rounds": n_rounds}
    loss = LOSSES["rece"](**options, duplicate_correction=True)
    other = batch.like()
    agree(loss(*batch), batch, LOSSES["ce"]()(*other), other)


def test_without_correction_a_negative_counts_in_every_round(make_batch):
    batch = make_batch((4, 5), n_items=12)
    options = {"n_buckets": 1, "n_extra_chunks": 0, "n_rounds": 3, "duplicate_correction": False}
    x, w = batch[:2]
    weights = (x @ w.T).exp()
    correct = weights.gather(1, batch.targets[:, None])[:, 0]
    expected = (1 + 3 * (weights.sum(1) - correct) / correct).log().mean()
    torch.testing.assert_close(LOSSES["rece"](**options)(*batch), expected)


def test_more_rounds_meet_more_negatives(make_batch):
    batch = make_batch((60,), n_items=300)
    losses = []
    for n_rounds in (1, 4, 16):
        torch.manual_seed(0)
        losses.append(RECE(**OPTIONS | {"n_buckets": 30, "n_rounds": n_rounds})(*batch).item())
    losses.append(LOSSES["ce"]()(*batch).item())
    assert losses == sorted(losses)
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("elements", [1, 100, 2**22])
@pytest.mark.parametrize(("n_chunks", "n_extra_chunks"), [(1, 0), (7, 1), (31, 2)])
def test_what_is_near_the_same_directions_meets(
    make_batch, monkeypatch, elements, n_chunks, n_extra_chunks
):
    batch = make_batch((20, 11), n_items=40)
    directions = torch.randn(3, n_chunks, 4)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: directions.view(shape).to(device))
    meetings = draw_meetings(
        *batch[:2], n_chunks=n_chunks, n_extra_chunks=n_extra_chunks, n_rounds=3
    )
    assert meetings[4:] == (n_chunks, n_extra_chunks)
    for vectors, orders, chunks in (
        (batch.hidden, meetings.token_order, meetings.token_chunks),
        (batch.item_embeddings, meetings.item_order, meetings.item_chunks),
    ):
        for round_ in range(3):
            scores = (vectors @ directions[round_].double().T).tolist()
            buckets = [row.index(max(row)) for row in scores]
            order = orders[round_].tolist()
            assert order == sorted(range(len(buckets)), key=lambda i, b=buckets: b[i])
            of = chunks_of(order, n_chunks)
            assert chunks[:, round_].tolist() == [of[i] for i in range(len(order))]


def test_chunks_are_of_one_size_but_for_one(make_batch):
    batch = make_batch((50, 33), n_items=131)
    meetings = draw_meetings(*batch[:2], n_chunks=9, n_extra_chunks=0, n_rounds=4)
    for chunks in (meetings.token_chunks, meetings.item_chunks):
        for column in chunks.T:
            sizes = column.long().bincount(minlength=9)
            assert sizes.max() - sizes.min() <= 1


def test_directions_differ_from_round_to_round(make_batch):
    batch = make_batch((200,), n_items=10)
    meetings = draw_meetings(*batch[:2], n_chunks=10, n_extra_chunks=0, n_rounds=2)
    assert not torch.equal(meetings.token_order[0], meetings.token_order[1])


@pytest.mark.parametrize(
    ("lengths", "n_extra_chunks", "expected"),
    [((1,), 0, 1), ((1,), 3, 1), ((100, 60), 0, 6), ((100, 60), 1, 9), ((4,), 1, 4)],
)
def test_automatic_number_of_buckets(
    make_batch, monkeypatch, caplog, lengths, n_extra_chunks, expected
):
    seen = {}

    def remember(*args, **options):
        seen.update(options)
        return draw_meetings(*args, **options)

    monkeypatch.setattr("sce_pipeline.losses.rece.draw_meetings", remember)
    options = {"n_buckets": "auto", "n_extra_chunks": n_extra_chunks}
    loss = RECE(**OPTIONS | options)
    assert loss(*make_batch(lengths, n_items=9)).isfinite()
    assert seen["n_chunks"] == expected
    assert not caplog.records


def test_more_buckets_than_tokens_or_items_are_clamped(make_batch, caplog):
    loss = RECE(**OPTIONS | {"n_buckets": 10})
    for _ in range(2):
        loss(*make_batch((9, 3), n_items=7))
    assert [record.getMessage() for record in caplog.records] == [
        "RECE has n_buckets = 10, more than the 7 tokens or items there are: "
        "each has a chunk of its own"
    ]
    batch = make_batch((2, 3), n_items=7)
    torch.manual_seed(0)
    clamped = loss(*batch)
    torch.manual_seed(0)
    assert torch.equal(clamped, RECE(**OPTIONS | {"n_buckets": 5})(*batch))


def test_a_token_fitted_almost_exactly_keeps_its_loss_and_gradient():
    # 1 - p is about e^-30: lost in float32 where 1 - p or log p is computed from p.
    hidden = torch.tensor([[30.0, 0.0]], requires_grad=True)
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = RECE(**OPTIONS)(hidden, items, torch.tensor([0]), torch.tensor([0]), None)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)
    loss.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad, math.exp(-30) * torch.tensor([[-1.0, 1.0]]), atol=0, rtol=1e-4
    )


def test_a_diverged_token_is_not_hidden(make_batch):
    batch = make_batch((5,), n_items=9)
    with torch.no_grad():
        batch.hidden[2] = torch.nan
    assert RECE(**OPTIONS)(*batch).isnan()


def test_items_that_meet_nobody_get_no_gradient(make_batch):
    batch = make_batch((3, 4), n_items=40)
    meetings = random_meetings(batch, 7, 0, 1)
    chunked_cross_entropy(*batch[:3], meetings, duplicate_correction=True).backward()
    # 7 chunks of one token each and 5 or 6 items: all items meet somebody; now only some do.
    assert batch.gradients[1].any(1).all()
    batch = make_batch((3,), n_items=40)
    meetings = random_meetings(batch, 10, 0, 1)
    chunked_cross_entropy(*batch[:3], meetings, duplicate_correction=True).backward()
    token_chunks = set(meetings.token_chunks[:, 0].tolist())
    met = [chunk in token_chunks for chunk in meetings.item_chunks[:, 0].tolist()]
    touched = torch.tensor(met)
    touched[batch.targets] = True
    assert batch.gradients[1].any(1).equal(touched)
    assert not touched.all()


def test_neither_inner_products_nor_logits_stand_whole(make_batch, monkeypatch, largest_tensor):
    n_tokens, n_items, d = 500, 800, 4
    batch = make_batch((n_tokens,), n_items=n_items)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 6000)
    with largest_tensor() as largest:
        RECE(**OPTIONS | {"n_buckets": 20, "n_rounds": 4})(*batch).backward()
    # Of one round: 500 x 20 inner products, and 500 x 120 logits.
    assert n_items * d < largest.elements <= 6000


def test_one_chunk_over_everything_is_cut_too(make_batch, monkeypatch, largest_tensor):
    batch = make_batch((100,), n_items=100)
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 2000)
    with largest_tensor() as largest:
        RECE(**OPTIONS | {"n_buckets": 1})(*batch).backward()
    assert largest.elements <= 2000
