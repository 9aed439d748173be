from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sce_pipeline.losses import base
from sce_pipeline.losses.sampled import negative_logits

SHARED = ["token", "sequence", "batch"]


def draw(batch, shared, n_negatives=6):
    n_groups = {"token": len(batch.targets), "sequence": len(batch.histories.offsets) - 1}
    return torch.randint(len(batch.item_embeddings), (n_groups.get(shared, 1), n_negatives))


def plain_logits(batch, items, shared):
    groups = [batch.group_of(token, shared) for token in range(len(batch.targets))]
    return torch.einsum("td,tkd->tk", batch.hidden, batch.item_embeddings[items[groups]])


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("elements", [1, 60, 2**22])
def test_logits_and_gradients_in_chunks_of_any_size(batch, agree, monkeypatch, shared, elements):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    items = draw(batch, shared)
    other = batch.like()
    expected = plain_logits(other, items, shared)
    logits = negative_logits(batch.hidden, batch.item_embeddings, items, batch.sequence, shared)
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(expected)
    agree((logits * weight).sum(), batch, (expected * weight).sum(), other)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
@example([4, 1])  # as many tiles as there can be
@settings(max_examples=60, deadline=None)
def test_sequences_of_any_lengths(make_batch, lengths):
    batch = make_batch(lengths, n_items=20)
    items = draw(batch, "sequence")
    logits = negative_logits(batch.hidden, batch.item_embeddings, items, batch.sequence, "sequence")
    torch.testing.assert_close(logits, plain_logits(batch, items, "sequence"))


@pytest.mark.parametrize("shared", SHARED)
def test_gradients_by_finite_differences(make_batch, shared):
    batch = make_batch((2, 1, 3), n_items=5, d=3)
    items = draw(batch, shared, n_negatives=4)
    assert torch.autograd.gradcheck(
        lambda hidden, table: negative_logits(hidden, table, items, batch.sequence, shared),
        (batch.hidden, batch.item_embeddings),
    )


@pytest.mark.parametrize("shared", ["token", "sequence"])
def test_half_precision_tables_sum_their_gradient_in_float32(make_batch, monkeypatch, shared):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 2)
    # 4096 contributions of 1 to one row: bfloat16 alone would stop counting at 256.
    batch = make_batch((1,) * 4096, n_items=1, d=2, dtype=torch.bfloat16)
    with torch.no_grad():
        batch.hidden.fill_(1)
    items = draw(batch, shared, n_negatives=1)
    logits = negative_logits(batch.hidden, batch.item_embeddings, items, batch.sequence, shared)
    logits.sum().backward()
    assert batch.gradients[1].tolist() == [[4096, 4096]]


@pytest.mark.parametrize(("shared", "lengths"), [("token", (125,) * 4), ("sequence", (1,) * 500)])
def test_embeddings_of_all_negatives_never_stand_whole(
    make_batch, monkeypatch, largest_tensor, shared, lengths
):
    n_tokens, n_negatives, d = 500, 20, 16
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", 8192)
    batch = make_batch(lengths, n_items=40, d=d)
    items = draw(batch, shared, n_negatives)
    with largest_tensor() as largest:
        functional.embedding(items, batch.item_embeddings)
    assert largest.elements == n_tokens * n_negatives * d

    with largest_tensor() as largest:
        negative_logits(
            batch.hidden, batch.item_embeddings, items, batch.sequence, shared
        ).sum().backward()
    # Tiles at most double the tokens: their logits are the largest thing then.
    assert largest.elements <= 2 * n_tokens * n_negatives


def test_ragged_sequences_cost_at_most_twice_the_tokens(make_batch, largest_tensor):
    batch = make_batch((1000, *[1] * 99), n_items=40, d=2)
    items = draw(batch, "sequence", n_negatives=10)
    with largest_tensor() as largest:
        negative_logits(
            batch.hidden, batch.item_embeddings, items, batch.sequence, "sequence"
        ).sum().backward()
    assert largest.elements <= 2 * (1099 + 100) * 10
