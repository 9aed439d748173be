from __future__ import annotations

import logging

import pytest
import torch
from pydantic import TypeAdapter

from sce_pipeline.losses import LOSSES, build_loss
from sce_pipeline.losses.cce import CCE
from sce_pipeline.losses.ce import CE
from sce_pipeline.losses.sce import SCE
from sce_pipeline.parameters import LossParameters

PRESETS = [
    {"name": "ce"},
    {
        "name": "ce_minus",
        "n_negatives": 4,
        "shared": "sequence",
        "exclude": "history",
        "log_correction": True,
        "impl": "torch",
    },
    {
        "name": "cce_minus",
        "n_negatives": 4,
        "shared": "tile",
        "sampling": "popularity",
        "log_correction": False,
        "impl": "torch",
    },
    {"name": "bce", "n_negatives": 4, "shared": "batch", "exclude": "target", "impl": "auto"},
    {
        "name": "gbce",
        "n_negatives": 4,
        "shared": "token",
        "exclude": "target",
        "t": 0.5,
        "impl": "triton",
    },
    {
        "name": "sce",
        "n_buckets": "auto",
        "bucket_size_x": 7,
        "bucket_size_y": 8,
        "mix_x": True,
        "impl": "torch",
    },
    {
        "name": "rece",
        "n_buckets": 6,
        "n_extra_chunks": 2,
        "n_rounds": 3,
        "duplicate_correction": False,
        "impl": "torch",
    },
]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset["name"])
def test_parameters_build_the_loss_they_name_with_their_values(preset):
    loss = build_loss(TypeAdapter(LossParameters).validate_python(preset))
    assert type(loss) is LOSSES[preset["name"]]
    for name, value in preset.items():
        if name != "name":
            assert getattr(loss, name) == value


def test_every_kind_of_parameters_has_a_loss():
    schema = TypeAdapter(LossParameters).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(LOSSES)


def test_no_tokens_give_zero_with_a_gradient_of_zero(loss, make_batch):
    batch = make_batch((0, 0), n_items=5, dtype=torch.float32)
    with torch.no_grad():
        batch.item_embeddings[3] = torch.inf
    result = loss(*batch)
    assert result.item() == 0
    assert result.dtype == torch.float32
    result.backward()
    hidden, items = batch.gradients
    assert hidden.shape == (0, 4)
    assert items.shape == (5, 4)
    assert not items.any()


def test_items_that_are_only_targets_get_gradient(loss, make_batch):
    batch = make_batch((6, 6), n_items=400)
    if isinstance(loss, SCE):
        loss.bucket_size_x = 12  # no token without a bucket
    loss(*batch).backward()
    assert batch.gradients[1][batch.targets].any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_loss_is_a_scalar_in_float32_at_least(loss, make_batch, dtype):
    batch = make_batch((3, 5), n_items=9, dtype=dtype)
    result = loss(*batch)
    assert result.shape == ()
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    result.backward()
    assert all(gradient.dtype == dtype for gradient in batch.gradients)


def test_a_seed_settles_value_and_gradient(loss, make_batch):
    batch = make_batch((20, 30, 7), n_items=50, dtype=torch.float32)
    results = []
    for seed in (1, 1, 2):
        again = batch.like()
        torch.manual_seed(seed)
        result = loss(*again)
        result.backward()
        results.append((result, *again.gradients))
    assert all(torch.equal(one, other) for one, other in zip(*results[:2], strict=True))
    if not isinstance(loss, (CE, CCE)):
        assert not torch.equal(results[0][2], results[2][2])


def test_forward_and_backward_never_ask_the_device_for_a_value(loss, make_batch):
    # Tensors on "meta" have no values: whatever would make a host wait for one is an error.
    batch = make_batch((3, 1, 6), n_items=13, dtype=torch.float32).to("meta")
    result = loss(*batch)
    assert result.device.type == "meta"
    result.backward()
    assert [gradient.shape for gradient in batch.gradients] == [(10, 4), (13, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_hidden", [False, True])
def test_autocast_stays_close_to_float32(loss, make_batch, dtype, half_hidden):
    if isinstance(loss, SCE):  # buckets of all tokens and items, so that none can differ
        loss.bucket_size_x, loss.bucket_size_y = 40, 21
    batch = make_batch((12, 25, 3), n_items=21, dtype=torch.float32)
    torch.manual_seed(0)
    expected = loss(*batch)
    expected.backward()

    other = batch.like()
    hidden = other.hidden.to(dtype) if half_hidden else other.hidden
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        result = loss(hidden, *other[1:])
    assert result.dtype == torch.float32
    result.backward()
    # A bfloat16 number has 8 significant bits; logits of about 2 err by about 2^-8.
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0.01)
    for gradient, expected_gradient in zip(other.gradients, batch.gradients, strict=True):
        assert gradient.dtype == torch.float32
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, atol=0.02 * scale, rtol=0.02)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_give_no_nan(loss, make_batch, scale):
    batch = make_batch((5, 4), n_items=9, dtype=torch.float32)
    with torch.no_grad():
        batch.hidden.mul_(scale)
    result = loss(*batch)
    result.backward()
    assert result.isfinite()
    assert all(gradient.isfinite().all() for gradient in batch.gradients)


def test_table_and_hidden_states_must_agree_in_width(loss, make_batch):
    hidden, items, *rest = make_batch((3, 2), n_items=9)
    with pytest.raises(ValueError, match=r"hidden \(5, 4\), item_embeddings \(9, 3\)"):
        loss(hidden, items[:, :3], *rest)


@pytest.mark.parametrize("name", ["targets", "sequence"])
def test_there_is_a_target_and_a_sequence_for_each_token(loss, make_batch, name):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(ValueError, match=rf"hidden \(5, 4\).*{name} \(4,\)"):
        loss(*batch._replace(**{name: getattr(batch, name)[:4]}))


@pytest.mark.parametrize("name", ["targets", "sequence"])
def test_numbers_are_int64(loss, make_batch, name):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(TypeError, match=rf"expected int64 {name}, got torch.int32"):
        loss(*batch._replace(**{name: getattr(batch, name).int()}))


def test_dtypes_must_agree_without_autocast(loss, make_batch):
    batch = make_batch((3, 2), n_items=9, dtype=torch.float32)
    message = "one floating dtype, got torch.bfloat16 and torch.float32"
    with pytest.raises(TypeError, match=message):
        loss(*batch._replace(hidden=batch.hidden.bfloat16()))


def test_float64_must_agree_even_under_autocast(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"got torch.float32 and torch.float64"),
    ):
        loss(*batch._replace(hidden=batch.hidden.float()))


def test_whole_numbers_are_no_hidden_states(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(TypeError, match=r"got torch.int64 and torch.int64"):
        loss(batch.hidden.long(), batch.item_embeddings.long(), *batch[2:])


def test_devices_must_agree(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(ValueError, match="on cpu, cpu, meta, cpu"):
        loss(*batch._replace(targets=batch.targets.to("meta")))


def test_a_catalogue_has_items(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(ValueError, match=r"at least one item, got .*item_embeddings \(0, 4\)"):
        loss(*batch._replace(item_embeddings=batch.item_embeddings[:0]))


@pytest.mark.parametrize("wrong", [-1, 9])
def test_targets_out_of_range_are_errors(loss, make_batch, wrong):
    batch = make_batch((3, 2), n_items=9)
    batch.targets[2] = wrong
    with pytest.raises(IndexError, match=rf"targets between 0 and 8, got .*{wrong}"):
        loss(*batch)


def test_sequence_numbers_do_not_decrease(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(IndexError, match="never decrease"):
        loss(*batch._replace(sequence=batch.sequence.flip(0)))


def test_sequences_may_have_no_token(loss, make_batch):
    assert loss(*make_batch((0, 0, 1, 0), n_items=9)).isfinite()


def test_sequence_numbers_are_in_range(make_batch):
    loss = LOSSES["bce"](n_negatives=2, shared="token", exclude="history")
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(IndexError, match="between 0 and 1, one for each history, got 1 to 2"):
        loss(*batch._replace(sequence=batch.sequence + 1))


def test_losses_do_without_histories_unless_they_need_them(loss, make_batch):
    batch = make_batch((3, 2), n_items=9)._replace(histories=None)
    if loss.needs_histories:
        with pytest.raises(ValueError, match="needs histories here, got None"):
            loss(*batch)
    else:
        assert loss(*batch).isfinite()


@pytest.mark.parametrize(
    ("shared", "exclude", "needed"),
    [
        ("token", "history", True),
        ("sequence", "history", True),
        ("batch", "history", True),
        ("token", "target", False),
        ("sequence", "target", True),
        ("batch", "target", False),
    ],
)
def test_who_needs_histories(shared, exclude, needed):
    loss = LOSSES["bce"](n_negatives=2, shared=shared, exclude=exclude)
    assert loss.needs_histories is needed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: h._replace(items=h.items.int()), TypeError, "int64 histories.items"),
        (lambda h: h._replace(offsets=h.offsets[None]), ValueError, r"got \(1, 3\)"),
        (lambda h: h._replace(offsets=h.offsets[:0]), ValueError, "n_sequences"),
        (lambda h: h._replace(items=h.items.to("meta")), ValueError, "histories.items on cpu"),
    ],
)
def test_histories_that_do_not_fit_are_errors(make_batch, change, error, message):
    loss = LOSSES["bce"](n_negatives=2, shared="token", exclude="history")
    batch = make_batch((3, 2), n_items=9)
    with pytest.raises(error, match=message):
        loss(*batch._replace(histories=change(batch.histories)))


def test_an_object_warns_once_of_a_thing(make_batch, caplog):
    batch = make_batch((3, 2), n_items=9)
    arguments = {"n_buckets": 2, "bucket_size_x": 6, "bucket_size_y": 10, "mix_x": False}
    with caplog.at_level(logging.WARNING):
        loss = LOSSES["sce"](**arguments)
        loss(*batch)
        loss(*batch)
        assert [record.getMessage() for record in caplog.records] == [
            "SCE has bucket_size_x = 6, more than the 5 tokens there are: all of them are taken",
            "SCE has bucket_size_y = 10, more than the 9 items there are: all of them are taken",
        ]
        LOSSES["sce"](**arguments)(*batch)
        assert len(caplog.records) == 4
