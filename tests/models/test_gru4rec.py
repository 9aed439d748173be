from __future__ import annotations

import math
import warnings

import pytest
import torch
from histories import HISTORIES, MAX_LENGTH, N_ITEMS, away_from_zero, pack
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from sce_pipeline.models import GRU4Rec, Packing
from sce_pipeline.models.gru4rec import time_major


def make_model(n_layers=2, dropout=0.0):
    torch.manual_seed(0)
    return away_from_zero(GRU4Rec(N_ITEMS, MAX_LENGTH, 12, n_layers, dropout).double())


@pytest.mark.parametrize("n_layers", [1, 3])
def test_hidden_states_and_gradients_equal_a_recurrence_over_each_sequence_alone(n_layers):
    model = make_model(n_layers)
    items, packing = pack(*HISTORIES)
    hidden = model(items, packing)
    expected = torch.cat(
        [model.gru(model.item_embeddings[torch.tensor(history)])[0] for history in HISTORIES]
    )
    torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-12)

    weights = torch.randn_like(hidden)
    parameters = list(model.parameters())
    found = torch.autograd.grad((hidden * weights).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-8, atol=1e-10)


def test_a_step_is_that_of_a_gated_recurrent_unit():
    model = make_model(n_layers=1)
    items, packing = pack([4, 9, 2])
    expected, state = [], torch.zeros(12, dtype=torch.float64)
    for item in items:
        from_item = model.gru.weight_ih_l0 @ model.item_embeddings[item] + model.gru.bias_ih_l0
        from_state = model.gru.weight_hh_l0 @ state + model.gru.bias_hh_l0
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_item.chunk(3), from_state.chunk(3)
        reset, update = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        state = update * state + (1 - update) * torch.tanh(n_x + reset * n_h)
        expected.append(state)
    torch.testing.assert_close(model(items, packing), torch.stack(expected), rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any))
def test_the_order_is_that_of_torchs_packed_sequences(lengths):
    packing = Packing.from_lengths(torch.tensor(lengths))
    order, batch_sizes = time_major(packing)
    assert sorted(order.tolist()) == list(range(sum(lengths)))

    longest_first = sorted((part for part in lengths if part), reverse=True)
    padded = torch.zeros(len(longest_first), max(lengths))
    expected = pack_padded_sequence(padded, torch.tensor(longest_first), batch_first=True)
    assert torch.equal(batch_sizes, expected.batch_sizes)

    steps = torch.repeat_interleave(batch_sizes)
    assert torch.equal(packing.place[order], steps)
    for step in range(1, max(lengths)):  # each place in a step stays with its sequence
        before, now = (packing.sequence[order[steps == which]] for which in (step - 1, step))
        assert torch.equal(before[: len(now)], now)


def test_weights_are_xavier_for_each_gate_and_biases_are_zero():
    torch.manual_seed(0)
    model = GRU4Rec(1000, 50, 64, 2, 0.0)
    table = model.item_embeddings.abs().max()
    assert 0.98 < table / math.sqrt(6 / (1000 + 64)) <= 1
    for name, parameter in model.gru.named_parameters():
        for gate in parameter.chunk(3):
            if name.startswith("weight"):
                assert 0.98 < gate.abs().max() / math.sqrt(6 / (64 + 64)) <= 1
            else:
                assert not gate.any()


@pytest.mark.parametrize(("n_layers", "between"), [(1, 0.0), (2, 0.25)])
def test_dropout_is_of_embeddings_between_layers_and_of_the_output(monkeypatch, n_layers, between):
    dropped = []
    plain = torch.nn.functional.dropout

    def watch(values, p, training, inplace):
        dropped.append((tuple(values.shape), p, training))
        return plain(values, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, of dropout between the layers of one
        model = make_model(n_layers, dropout=0.25)
    items, packing = pack(*HISTORIES)
    model(items, packing)
    tokens = ((len(items), 12), 0.25, True)
    assert dropped == [tokens, tokens]
    assert isinstance(model.gru, nn.GRU)
    assert model.gru.dropout == between


def test_the_recurrence_keeps_its_precision_under_autocast(monkeypatch):
    model = make_model(n_layers=2).float()
    items, packing = pack(*HISTORIES)
    expected = model(items, packing)
    precisions = []
    forward = nn.GRU.forward

    def watch(gru, *args):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return forward(gru, *args)

    monkeypatch.setattr(nn.GRU, "forward", watch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(items, packing)
    assert precisions == [False]
    assert torch.equal(hidden, expected)
