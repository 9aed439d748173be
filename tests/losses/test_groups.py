from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sce_pipeline.losses import base
from sce_pipeline.losses.grouped import Groups, grouped_binary_cross_entropy


def groups_of(batch, shared, n_negatives=6):
    """A draw for each token, each sequence or all of the batch."""
    lengths = torch.bincount(batch.sequence, minlength=len(batch.histories.offsets) - 1)
    n_tokens = len(batch.targets)
    n_groups = {"token": n_tokens, "sequence": len(lengths), "batch": 1}[shared]
    items = torch.randint(len(batch.item_embeddings), (n_groups, n_negatives))
    if shared == "sequence":
        return Groups(items, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    return Groups(items, n_tokens // n_groups)


def loss_of(batch, groups):
    return grouped_binary_cross_entropy(*batch[:3], groups, beta=1.0, triton=False)


def plain(batch, groups, shared):
    """The loss of all logits at once."""
    x, w = batch.hidden, batch.item_embeddings
    items = groups.items[[batch.group_of(token, shared) for token in range(len(x))]]
    logits = torch.einsum("td,tkd->tk", x, w[items])
    logits = logits.masked_fill(items == batch.targets[:, None], -torch.inf)
    positive = (x * w[batch.targets]).sum(1)
    losses = torch.nn.functional.softplus(-positive)
    losses = losses + torch.nn.functional.softplus(logits).sum(1)
    return losses.mean() / (1 + items.shape[1])


@pytest.mark.parametrize("shared", ["token", "sequence", "batch"])
@pytest.mark.parametrize("elements", [1, 60, 2**22])
def test_groups_of_every_kind_in_chunks_of_any_size(batch, agree, monkeypatch, shared, elements):
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    groups = groups_of(batch, shared)
    other = batch.like()
    agree(loss_of(batch, groups), batch, plain(other, groups, shared), other)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
@example([4, 1])  # as many tiles as there can be
@settings(max_examples=60)
def test_sequences_of_any_lengths(make_batch, lengths):
    batch = make_batch(lengths, n_items=20)
    groups = groups_of(batch, "sequence")
    torch.testing.assert_close(loss_of(batch, groups), plain(batch, groups, "sequence"))


@pytest.mark.parametrize(
    ("shared", "lengths"), [("token", (125,) * 4), ("sequence", (1,) * 500), ("batch", (500,))]
)
def test_neither_logits_nor_embeddings_of_all_negatives_stand_whole(
    make_batch, monkeypatch, largest_tensor, shared, lengths
):
    n_tokens, n_negatives, d, elements = 500, 20, 16, 4096
    monkeypatch.setattr(base, "CPU_CHUNK_ELEMENTS", elements)
    batch = make_batch(lengths, n_items=40, d=d)
    groups = groups_of(batch, shared, n_negatives)
    with largest_tensor() as largest:
        loss_of(batch, groups).backward()
    # The gradient of the hidden states stands whole, in tiles that are at most twice the tokens.
    assert elements < n_tokens * n_negatives
    assert largest.elements <= max(elements, 2 * n_tokens * d)


def test_ragged_sequences_cost_at_most_twice_the_tokens(make_batch, largest_tensor):
    batch = make_batch((1000, *[1] * 99), n_items=40, d=2)
    groups = groups_of(batch, "sequence", n_negatives=10)
    with largest_tensor() as largest:
        loss_of(batch, groups).backward()
    assert largest.elements <= 2 * (1099 + 100) * 10
