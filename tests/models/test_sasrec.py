from __future__ import annotations

import math

import pytest
import torch
from histories import HISTORIES, MAX_LENGTH, N_ITEMS, away_from_zero, pack
from torch import nn
from torch.nn import functional as F

from sce_pipeline.models import SASRec, build_model, load_model
from sce_pipeline.parameters import SASRecParameters


def make_model(n_heads=2, n_blocks=2, dropout=0.0):
    torch.manual_seed(0)
    return away_from_zero(SASRec(N_ITEMS, MAX_LENGTH, 12, n_blocks, n_heads, dropout).double())


def padded_oracle(model, history, n_padding):
    """SASRec of one history behind empty places, with explicit masks and torch's own attention."""
    size = model.item_embedding.embedding_dim
    length = n_padding + len(history)
    real = torch.arange(length) >= n_padding
    hidden = torch.zeros(length, size, dtype=torch.float64)
    positions = range(MAX_LENGTH - len(history), MAX_LENGTH)
    hidden[n_padding:] = (
        model.item_embeddings[torch.tensor(history)] * math.sqrt(size)
        + model.position_embedding.weight[list(positions)]
    )
    blocked = ~(torch.ones(length, length, dtype=torch.bool).tril() & real[None, :])
    blocked[~real] = False  # rows of padding attend anywhere; nobody reads them
    for block in model.blocks:
        attention = nn.MultiheadAttention(size, block.attention.n_heads, batch_first=True).double()
        attention.in_proj_weight = block.attention.in_projection.weight
        attention.in_proj_bias = block.attention.in_projection.bias
        attention.out_proj = block.attention.out_projection
        queries = block.attention_norm(hidden)
        attended = attention(queries[None], hidden[None], hidden[None], attn_mask=blocked)[0][0]
        hidden = block.feed_forward_norm(queries + attended)
        first, _, _, second, _ = block.feed_forward
        hidden = hidden + second(torch.relu(first(hidden)))
        hidden = hidden * real[:, None]
    return model.norm(hidden)[n_padding:]


@pytest.mark.parametrize("n_heads", [1, 2, 3])
@pytest.mark.parametrize("n_padding", [0, 4])
def test_packed_hidden_states_and_gradients_equal_the_padded_oracle(n_heads, n_padding):
    model = make_model(n_heads)
    items, packing = pack(*HISTORIES)
    hidden = model(items, packing)
    expected = torch.cat([padded_oracle(model, history, n_padding) for history in HISTORIES])
    torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-10)

    weights = torch.randn_like(hidden)
    parameters = list(model.parameters())
    found = torch.autograd.grad((hidden * weights).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-8, atol=1e-9)


def test_a_hidden_state_depends_on_its_own_past_alone():
    model = make_model()
    alone = model(*pack(HISTORIES[1]))
    together = model(*pack(*HISTORIES))[1:5]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)

    items, packing = pack(*HISTORIES)
    changed = items.clone()
    changed[3] = 11  # third item of the second history
    difference = (model(changed, packing) - model(items, packing)).abs().amax(dim=1)
    assert difference[3] > 1e-3
    assert difference[4] > 1e-3
    assert difference[[0, 1, 2, *range(5, 15)]].max() < 1e-12


def test_encode_last_gives_the_state_of_each_last_item():
    model = make_model()
    items, packing = pack(*HISTORIES)
    assert torch.equal(
        model.encode_last(model.embed(items), packing), model(items, packing)[[0, 4, 12, 14]]
    )


def test_the_catalogue_has_a_row_for_each_item_and_no_more():
    assert make_model().item_embeddings.shape == (N_ITEMS, 12)


def test_weights_are_xavier_and_projections_have_the_reference_scale():
    torch.manual_seed(0)
    model = SASRec(1000, 50, 64, 2, 1, 0.0)
    bounds = {
        "item_embedding.weight": math.sqrt(6 / (1000 + 64)),
        "position_embedding.weight": math.sqrt(6 / (50 + 64)),
        "blocks.0.attention.in_projection.weight": math.sqrt(6 / (4 * 64)),
        "blocks.0.attention.out_projection.weight": math.sqrt(6 / (2 * 64)),
    }
    for name, bound in bounds.items():
        largest = model.get_parameter(name).abs().max()
        assert 0.98 * bound < largest <= bound
    for projection in ("in_projection", "out_projection"):
        assert not model.get_parameter(f"blocks.1.attention.{projection}.bias").any()


def test_dropout_reaches_embeddings_attention_and_feed_forward_with_its_probability(monkeypatch):
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
    assert dropped == [tokens, ("attention", 0.25, True), tokens, tokens]


def test_norms_have_the_reference_epsilon():
    norms = [module for module in make_model().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {1e-8}


def test_dropout_acts_in_training_only():
    model = make_model(dropout=0.5)
    items, packing = pack(*HISTORIES)
    assert not torch.equal(model(items, packing), model(items, packing))
    model.eval()
    assert torch.equal(model(items, packing), model(items, packing))


def test_a_longer_history_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="9 items is longer than max_length = 8"):
        make_model()(*pack(range(9)))


PARAMETERS = SASRecParameters(name="sasrec", hidden_size=12, n_blocks=2, n_heads=2, dropout=0.1)


def test_saved_weights_come_back():
    model = build_model(PARAMETERS, N_ITEMS, MAX_LENGTH)
    loaded = load_model(PARAMETERS, model.state_dict(), MAX_LENGTH)
    items, packing = pack(*HISTORIES)
    assert torch.equal(loaded.eval()(items, packing), model.eval()(items, packing))


def test_weights_of_another_architecture_are_refused_with_the_parameters_named():
    weights = build_model(PARAMETERS, N_ITEMS, MAX_LENGTH).state_dict()
    other = PARAMETERS.model_copy(update={"n_blocks": 1})
    with pytest.raises(ValueError, match=r"do not fit training\.model.*n_blocks=1"):
        load_model(other, weights, MAX_LENGTH)
