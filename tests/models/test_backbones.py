"""What holds for every backbone."""

from __future__ import annotations

import pytest
import torch
from histories import HISTORIES, MAX_LENGTH, N_ITEMS, away_from_zero, pack
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch.nn import functional as F

from helpers import ROOT
from sce_pipeline.losses import LOSSES, Histories, build_loss
from sce_pipeline.models import MODELS, Packing, build_model, draw_mask, load_model
from sce_pipeline.parameters import LossParameters, ModelParameters

SIZES = {
    "sasrec": {"hidden_size": 12, "n_blocks": 1, "n_heads": 2},
    "gru4rec": {"hidden_size": 12, "n_layers": 2},
    "bert4rec": {
        "hidden_size": 12,
        "n_blocks": 1,
        "n_heads": 2,
        "mask_probability": 0.2,
        "last_mask_probability": 0.5,
    },
}
LOSS_PRESETS = OmegaConf.load(ROOT / "conf/base/parameters/losses.yml").loss_presets

each_model = pytest.mark.parametrize("name", MODELS)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_parameters(name, **changes):
    values = {"name": name, "dropout": 0.0, **SIZES[name], **changes}
    return TypeAdapter(ModelParameters).validate_python(values)


def make_model(name, **changes):
    torch.manual_seed(0)
    return build_model(make_parameters(name, **changes), N_ITEMS, MAX_LENGTH).double()


def make_loss(name):
    values = dict(LOSS_PRESETS[name])
    if "n_negatives" in values:
        values["n_negatives"] = 16  # fewer than there are items
    loss = build_loss(TypeAdapter(LossParameters).validate_python(values))
    if loss.needs_item_counts:
        loss.use_item_counts(torch.ones(N_ITEMS, dtype=torch.int64))
    return loss


def walk(n_users, generator):
    """Users who walk the catalogue in steps of one: items, and what follows each of them."""
    lengths = torch.randint(4, MAX_LENGTH + 1, (n_users,), generator=generator)
    packing = Packing.from_lengths(lengths)
    starts = torch.randint(N_ITEMS, (n_users,), generator=generator)
    items = (starts[packing.sequence] + packing.place) % N_ITEMS
    return items, (items + 1) % N_ITEMS, packing


def mean_loss(model, loss, generator):
    """The loss of one batch of walks, as a model of its objective is trained."""
    items, following, packing = walk(64, generator)
    users, taken = packing.sequence.repeat(2), torch.cat([items, following])
    keys = (users * N_ITEMS + taken).unique()
    n_taken = torch.bincount(keys // N_ITEMS)
    histories = Histories(keys % N_ITEMS, F.pad(n_taken.cumsum(0), (1, 0)))
    if model.objective == "next":
        hidden, targets, sequence = model(items, packing), following, packing.sequence
    else:
        masked = draw_mask(packing.on_host, 0.2, 0.5, generator)
        hidden = model.encode(model.embed(items), packing, masked)[masked]
        targets, sequence = items[masked], packing.sequence[masked]
    return loss(hidden, model.item_embeddings, targets, sequence, histories)


def reach(states, embedded):
    """Which tokens each state depends on, bool [states, tokens]."""
    rows = [torch.autograd.grad(state.norm(), embedded, retain_graph=True)[0] for state in states]
    return torch.stack([row.abs().amax(dim=1) > 1e-12 for row in rows])


@each_model
def test_there_is_a_state_for_each_item_and_one_for_what_follows_each_history(name):
    model = make_model(name)
    items, packing = pack(*HISTORIES)
    assert model.item_embeddings.shape == (N_ITEMS, 12)
    assert model(items, packing).shape == (len(items), 12)
    assert model.encode_last(model.embed(items), packing).shape == (len(HISTORIES), 12)


@each_model
def test_a_state_depends_on_its_own_past_or_where_items_are_masked_on_its_own_sequence(name):
    model = make_model(name)
    items, packing = pack(*HISTORIES)
    embedded = model.embed(items).detach().requires_grad_()
    found = reach(model.encode(embedded, packing), embedded)
    wanted = packing.sequence[:, None] == packing.sequence
    if model.objective == "next":
        wanted &= packing.place[:, None] >= packing.place
    assert torch.equal(found, wanted)


@each_model
def test_what_follows_a_history_depends_on_all_of_it_and_on_no_other(name):
    model = make_model(name)
    histories = [history[: MAX_LENGTH - 1] for history in HISTORIES]
    items, packing = pack(*histories)
    embedded = model.embed(items).detach().requires_grad_()
    together = model.encode_last(embedded, packing)
    assert torch.equal(
        reach(together, embedded), torch.arange(len(histories))[:, None] == packing.sequence
    )
    for state, history in zip(together, histories, strict=True):
        item, alone = pack(history)
        torch.testing.assert_close(model.encode_last(model.embed(item), alone)[0], state)


@each_model
def test_empty_sequences_change_nothing(name):
    model = make_model(name)
    items, packing = pack(*HISTORIES)
    _, with_empty = pack([], HISTORIES[0], [], *HISTORIES[1:], [])
    torch.testing.assert_close(model(items, with_empty), model(items, packing))


@each_model
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_reaches_every_weight(name, loss):
    model = make_model(name)
    value = mean_loss(model, make_loss(loss), torch.Generator().manual_seed(0))
    value.backward()
    assert value > 0
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "ce") for name in MODELS), ("sasrec", "cce_minus"), ("gru4rec", "cce_minus")],
)
def test_a_few_steps_of_adam_learn_what_follows(name, loss):
    steps, rate = (500, 0.003) if name == "bert4rec" else (60, 0.01)
    model, loss = make_model(name, hidden_size=32).float(), make_loss(loss)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        mean_loss(model, loss, generator).backward()
        optimizer.step()
    items, following, packing = walk(500, generator)
    with torch.inference_mode():
        states = model.encode_last(model.embed(items), packing)
        best = (states @ model.item_embeddings.T).argmax(dim=1)
    assert (best == packing.last(following)).double().mean() > 0.8  # by chance 0.03


@each_model
def test_dropout_acts_in_training_only(name):
    model = make_model(name, dropout=0.5)
    items, packing = pack(*HISTORIES)
    assert not torch.equal(model(items, packing), model(items, packing))
    model.eval()
    assert torch.equal(model(items, packing), model(items, packing))


@each_model
@pytest.mark.parametrize("method", ["encode", "encode_last"])
def test_a_history_longer_than_the_longest_is_refused(name, method):
    model = make_model(name)
    items, packing = pack([1, 2], range(9))
    with pytest.raises(ValueError, match="9 items is longer than max_length = 8"):
        getattr(model, method)(model.embed(items), packing)


@each_model
def test_saved_weights_come_back(name):
    parameters = make_parameters(name, dropout=0.1)
    model = build_model(parameters, N_ITEMS, MAX_LENGTH)
    loaded = load_model(parameters, model.state_dict(), MAX_LENGTH)
    items, packing = pack(*HISTORIES)
    assert torch.equal(loaded.eval()(items, packing), model.eval()(items, packing))


@each_model
def test_weights_of_another_backbone_or_size_are_refused(name):
    weights = build_model(make_parameters(name), N_ITEMS, MAX_LENGTH).state_dict()
    for other in MODELS:
        parameters = make_parameters(other, **({"hidden_size": 24} if other == name else {}))
        with pytest.raises(ValueError, match=rf"do not fit training\.model.*name='{other}'"):
            load_model(parameters, weights, MAX_LENGTH)


@each_model
def test_nothing_waits_for_the_device(name):
    """What would wait has no answer where tensors have no values."""
    model = make_model(name, dropout=0.1).to("meta")
    items, packing = pack(*HISTORIES, device="meta")
    assert packing.on_host.device.type == "cpu"
    embedded = model.embed(items)
    assert model.encode(embedded, packing).shape == (len(items), 12)
    assert model.encode_last(embedded, packing).shape == (len(HISTORIES), 12)


def states_and_gradients(name, device, dtype, scale=1.0):
    """States of all tokens and of what follows each history, and derivatives by all weights.

    They are of a sum of random multiples of the states, about as large as ``scale``.
    """
    model = away_from_zero(make_model(name)).to(device, dtype)
    items, packing = pack(*HISTORIES, device=device)
    generator = torch.Generator().manual_seed(2)
    embedded = model.embed(items)
    if model.objective == "masked":
        masked = draw_mask(packing.on_host, 0.2, 0.5, generator).to(device)
        states = model.encode(embedded, packing, masked)
    else:
        states = model.encode(embedded, packing)
    found = [states, model.encode_last(embedded, packing)]
    weights = [torch.randn(part.shape, generator=generator).to(device, dtype) for part in found]
    total = sum((part * w * scale).sum() for part, w in zip(found, weights, strict=True))
    found += torch.autograd.grad(total, list(model.parameters()))
    return [part.detach().double().cpu() for part in found]


@on_gpu
@each_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_states_and_gradients_on_a_gpu_are_those_of_a_cpu(name, dtype, tolerance, monkeypatch):
    # Unless told otherwise, cuDNN computes a recurrence of float32 in TF32, which errs by 1e-3.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = states_and_gradients(name, "cpu", torch.float64)
    for found, wanted in zip(states_and_gradients(name, "cuda", dtype), expected, strict=True):
        assert found.isfinite().all()
        assert float((found - wanted).norm() / wanted.norm()) < tolerance


@on_gpu
@each_model
def test_half_precision_on_a_gpu_stays_close_to_a_cpu(name):
    scale = 1e-7  # of the gradients of a mean over many tokens, which vanish in float16
    expected = states_and_gradients(name, "cpu", torch.float64, scale)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        found = states_and_gradients(name, "cuda", torch.float32, scale)
    for part, wanted in zip(found, expected, strict=True):
        # A bfloat16 number has 8 significant bits, and errors add up over layers and steps.
        assert float((part - wanted).norm() / wanted.norm()) < 0.05
