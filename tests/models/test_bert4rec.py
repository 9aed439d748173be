from __future__ import annotations

import pytest
import torch
from histories import HISTORIES, MAX_LENGTH, N_ITEMS, away_from_zero, pack
from torch import nn
from torch.nn import functional as F

from sce_pipeline.models import BERT4Rec

MASKED = [[0], [1, 3], [0, 2, 7], []]
"""Masked places of each history."""


def make_model(n_heads=2, n_blocks=2, dropout=0.0):
    torch.manual_seed(0)
    return away_from_zero(BERT4Rec(N_ITEMS, MAX_LENGTH, 12, n_blocks, n_heads, dropout).double())


def pack_masked():
    items, packing = pack(*HISTORIES)
    masked = [
        place in places
        for history, places in zip(HISTORIES, MASKED, strict=True)
        for place in range(len(history))
    ]
    return items, packing, torch.tensor(masked)


def norm(layer, hidden):
    centred = hidden - hidden.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return layer.weight * centred / (variance + 1e-12).sqrt() + layer.bias


def gelu(values):
    return values * (1 + torch.erf(values / 2**0.5)) / 2


def padded_oracle(model, history, masked, n_padding):
    """BERT4Rec of one history behind empty places, with explicit masks and torch's attention."""
    size = model.item_embedding.embedding_dim
    length = n_padding + len(history)
    real = torch.arange(length) >= n_padding
    hidden = torch.zeros(length, size, dtype=torch.float64)
    for place, item in enumerate(history):
        embedding = model.mask if place in masked else model.item_embeddings[item]
        position = model.position_embedding.weight[MAX_LENGTH - len(history) + place]
        hidden[n_padding + place] = norm(model.embedding_norm, embedding + position)
    for block in model.blocks:
        attention = nn.MultiheadAttention(size, block.attention.n_heads, batch_first=True).double()
        attention.in_proj_weight = block.attention.in_projection.weight
        attention.in_proj_bias = block.attention.in_projection.bias
        attention.out_proj = block.attention.out_projection
        one = hidden[None]
        attended = attention(one, one, one, key_padding_mask=~real[None])[0][0]
        hidden = norm(block.attention_norm, hidden + attended)
        first, _, second = block.feed_forward
        assert first.weight.shape == (4 * size, size)
        hidden = norm(block.feed_forward_norm, hidden + second(gelu(first(hidden))))
    projection, _, last_norm = model.head
    return norm(last_norm, gelu(projection(hidden)))[n_padding:]


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("n_padding", [0, 4])
def test_packed_hidden_states_and_gradients_equal_the_padded_oracle(n_heads, n_padding):
    model = make_model(n_heads)
    items, packing, masked = pack_masked()
    hidden = model.encode(model.embed(items), packing, masked)
    expected = torch.cat(
        [
            padded_oracle(model, history, places, n_padding)
            for history, places in zip(HISTORIES, MASKED, strict=True)
        ]
    )
    torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-10)

    weights = torch.randn_like(hidden)
    parameters = list(model.parameters())
    found = torch.autograd.grad((hidden * weights).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-8, atol=1e-9)


def test_without_a_mask_every_item_is_seen():
    model = make_model()
    items, packing, masked = pack_masked()
    embedded = model.embed(items)
    nowhere = torch.zeros_like(masked)
    assert torch.equal(model.encode(embedded, packing), model.encode(embedded, packing, nowhere))


def test_no_state_sees_a_masked_item():
    model = make_model()
    items, packing, masked = pack_masked()
    hidden = model.encode(model.embed(items), packing, masked)
    others = torch.where(masked, (items + 1) % N_ITEMS, items)
    assert torch.equal(model.encode(model.embed(others), packing, masked), hidden)
    assert not torch.equal(model.encode(model.embed(others), packing), hidden)

    embedded = model.embed(items).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode(embedded, packing, masked).norm(), embedded)
    assert torch.equal(gradient.any(dim=1), ~masked)


def test_encode_last_masks_a_place_behind_the_history_and_gives_up_the_oldest_item_for_it():
    model = make_model()
    items, packing = pack(*HISTORIES)
    found = model.encode_last(model.embed(items), packing)
    for state, history in zip(found, HISTORIES, strict=True):
        kept = history[-(MAX_LENGTH - 1) :]
        whole = padded_oracle(model, [*kept, 0], {len(kept)}, n_padding=0)
        torch.testing.assert_close(state, whole[-1], rtol=1e-10, atol=1e-10)


def test_a_model_for_one_item_predicts_from_the_mask_alone():
    model = BERT4Rec(N_ITEMS, 1, 12, 1, 2, 0.0)
    items, packing = pack([4], [9])
    first, second = model.encode_last(model.embed(items), packing)
    assert torch.equal(first, second)


def test_matrices_are_truncated_normal_and_biases_zero():
    torch.manual_seed(0)
    model = BERT4Rec(1000, 50, 64, 1, 1, 0.0)
    for name, parameter in model.named_parameters():
        if name == "mask" or parameter.dim() == 2:
            assert parameter.abs().max() <= 0.04, name
            # A normal distribution cut off at two deviations keeps 0.88 of its deviation.
            tolerance = 0.2 if name == "mask" else 0.03
            assert parameter.detach().std() == pytest.approx(0.88 * 0.02, rel=tolerance), name
        elif "norm" not in name and not name.startswith("head.2"):
            assert not parameter.any(), name


def test_dropout_reaches_embeddings_attention_and_residual_paths(monkeypatch):
    dropped = []
    plain, attention = torch.nn.functional.dropout, F.scaled_dot_product_attention

    def watch_dropout(values, p, training, inplace):
        dropped.append((tuple(values.shape), p, training))
        return plain(values, p, training, inplace)

    def watch_attention(*args, dropout_p, is_causal, **options):
        dropped.append(("attention", dropout_p, is_causal))
        return attention(*args, dropout_p=dropout_p, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "dropout", watch_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch_attention)
    items, packing = pack(*HISTORIES)
    make_model(n_blocks=1, dropout=0.25)(items, packing)
    tokens = ((len(items), 12), 0.25, True)
    assert dropped == [tokens, ("attention", 0.25, False), tokens, tokens]
