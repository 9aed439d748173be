from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.models import BERT4Rec, GRU4Rec, Packing, SASRec, draw_mask
from sce_pipeline.training.encoder import (
    FINEST_STEP,
    Encoder,
    ReplayedEncoder,
    can_replay,
    round_up,
)

MAX_LENGTH = 40
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


each_replayed = pytest.mark.parametrize("backbone", [SASRec, BERT4Rec])


def make_model(dropout, device="cpu", backbone=SASRec):
    torch.manual_seed(0)
    return backbone(5, MAX_LENGTH, 16, 2, 2, dropout).to(device)


def weights_of(model):
    """All weights but the item table, each with a gradient to add to."""
    weights = [weight for weight in model.parameters() if weight is not model.item_embeddings]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        weight.grad.fill_(0.5)  # in place: that is where a recording adds to
    return weights


def inputs(lengths, device="cpu"):
    packing = Packing.from_lengths(torch.tensor(lengths), device)
    return torch.randn(sum(lengths), 16, device=device), packing


def mask_of(model, packing, seed=0):
    """Where a masked model sees a mask, ``None`` for another."""
    if model.objective == "next":
        return None
    generator = torch.Generator().manual_seed(seed)
    return draw_mask(packing.on_host, 0.3, 0.5, generator).to(packing.sequence.device)


@given(st.integers(1, 10**9))
def test_rounding_up_wastes_at_most_an_eighth_and_makes_few_shapes(n):
    slots = round_up(n)
    assert n <= slots <= max(n + FINEST_STEP, n * 9 // 8)
    assert round_up(slots) == slots


def test_few_shapes_occur():
    assert len({round_up(n) for n in range(4096, 32768)}) <= 3 * 8 + 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_are_replayed_in_half_precision_on_a_gpu_where_they_are_the_same(device, half):
    models = {
        make_model(0.0): True,
        make_model(0.0, backbone=BERT4Rec): True,
        GRU4Rec(5, MAX_LENGTH, 16, 1, 0.0): False,  # which has as many steps as the longest history
    }
    for model, is_static in models.items():
        expected = is_static and half and device == "cuda"
        assert can_replay(model, torch.device(device), half) == expected


@each_replayed
def test_the_two_calls_are_autograds_forward_and_backward(backbone):
    model = make_model(0.0, backbone=backbone)
    weights = weights_of(model)
    embedded, packing = inputs([3, 40, 1])
    masked = mask_of(model, packing)
    gradient = torch.randn_like(embedded)
    leaf = embedded.clone().requires_grad_()
    expected = model.encode(leaf, packing, *([] if masked is None else [masked]))
    wanted = torch.autograd.grad(expected, [leaf, *weights], gradient)

    encoder = Encoder(model.encode)
    hidden = encoder.forward(embedded, packing, masked)
    assert not hidden.requires_grad
    assert torch.equal(hidden, expected)
    assert torch.equal(encoder.backward(gradient), wanted[0])
    for weight, derivative in zip(weights, wanted[1:], strict=True):
        assert torch.equal(weight.grad, 0.5 + derivative)


@on_gpu
@each_replayed
@pytest.mark.parametrize("half", [False, True])
def test_replayed_is_as_it_comes(half, backbone):
    model = make_model(0.0, "cuda", backbone)
    weights = weights_of(model)

    def encode(*args):
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            return model.encode(*args)

    plain, replayed = Encoder(encode), ReplayedEncoder(encode, weights, MAX_LENGTH)
    # Shapes in turn, some sharing their memory, with other lengths within and empty sequences.
    for lengths in (
        [3, 40, 1, 0, 16],
        [3, 40, 1, 0],
        [10, 10],
        [20, 4, 0, 20],
        [19, 1],
        [20, 20, 20, 0, 0],
        [40, 0, 1, 3],
    ):
        embedded, packing = inputs(lengths, "cuda")
        masked = mask_of(model, packing, seed=max(lengths))
        gradient = torch.randn_like(embedded)
        found = []
        for encoder in (plain, replayed):
            weights_of(model)
            hidden = encoder.forward(embedded.clone(), packing, masked).clone()
            laid = gradient
            if encoder.room is not None:
                laid = encoder.room.copy_(gradient)
            of_embedded = encoder.backward(laid).clone()
            found.append([hidden, of_embedded, *(weight.grad.clone() for weight in weights)])
        for expected, result in zip(*found, strict=True):
            # BERT4Rec's norms magnify what is drawn small, and rounding with it.
            size = 1.0 if backbone is SASRec else max(1.0, float(expected.abs().max()))
            tolerance = size * (2e-2 if half else 1e-5)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=tolerance)


@on_gpu
@each_replayed
def test_each_replay_drops_others_and_recording_takes_no_random_numbers(backbone):
    model = make_model(0.5, "cuda", backbone)
    encoder = ReplayedEncoder(model.encode, weights_of(model), MAX_LENGTH)
    embedded, packing = inputs([12, 7], "cuda")
    masked = mask_of(model, packing)
    before = torch.cuda.get_rng_state()
    first = encoder.forward(embedded, packing, masked).clone()
    after = torch.cuda.get_rng_state()
    encoder.backward(torch.ones_like(first))
    second = encoder.forward(embedded, packing, masked).clone()
    assert not torch.allclose(first, second)
    torch.cuda.set_rng_state(before)
    assert torch.equal(encoder.forward(embedded, packing, masked), first)
    assert torch.equal(torch.cuda.get_rng_state(), after)
