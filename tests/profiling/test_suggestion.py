from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.losses.cast_table import CAST_BYTES
from sce_pipeline.profiling.memory import Memory
from sce_pipeline.profiling.steps import Cost
from sce_pipeline.profiling.suggestion import (
    USABLE,
    Need,
    choose_loss,
    explain_sizes,
    settle_sizes,
)

GB = 2**30


def costs(**seconds):
    """Costs of losses whose epochs take so long; None does not fit."""
    memory = Memory(1, 1, 2, 0, 0, 0)
    return {
        name: None if s is None else Cost(s / 10, s / 20, 10, 1000, memory, None, "32-true")
        for name, s in seconds.items()
    }


def make_need(**changes):
    values = {"free": 40 * GB, "table": 2 * GB, "cast": 0, "rest": 0}
    values |= {"activations": 30 * GB, "loss": 10 * GB, "other": 0}
    values |= {"batch": 128, "batch_name": "batch_size", "n_sequences": 128, "n_parts": 1}
    return Need(**{**values, **changes})


@pytest.mark.parametrize(
    ("measured", "loss", "said"),
    [
        (costs(cce=10, sce=1, cce_minus=12), "cce", "no slower than cce_minus here"),
        (costs(cce=15, sce=1, cce_minus=10), "cce", "1.50 times as long as with cce_minus"),
        (costs(cce=40, ce=12, cce_minus=10), "ce", "1.20 times as long as with cce_minus"),
        (costs(cce=None, ce=12, cce_minus=10), "ce", "1.20 times as long as with cce_minus"),
        (costs(cce=15.1, sce=1, cce_minus=10), "cce_minus", "an epoch with cce, which is exact"),
        (costs(cce=15.1, cce_minus=10), "cce_minus", "takes 1.51 times as long as with cce_minus"),
        (costs(cce=None, ce=None, cce_minus=12, sce=1), "cce_minus", "ce does not fit"),
        (costs(cce=30, bce=5, cce_minus=None), "cce", "cce_minus does not fit"),
        (costs(cce=30, sce=5), "cce", "cce_minus was not tried"),
        (costs(bce=5, rece=4), "rece", "cce was not tried"),
        (costs(cce=None, bce=5), "bce", "bce is the fastest loss that fits"),
    ],
    ids=str,
)
def test_exact_while_it_is_worth_it_then_what_ranks_like_it_then_what_fits(measured, loss, said):
    choice = choose_loss(measured, max_slowdown=1.5)
    assert choice.loss == loss
    assert said in choice.reason


def test_the_worth_of_exactness_is_a_parameter_and_nothing_fits_is_no_choice():
    measured = costs(cce=30, cce_minus=10)
    assert choose_loss(measured, max_slowdown=3.0).loss == "cce"
    assert choose_loss(measured, max_slowdown=2.9).loss == "cce_minus"
    assert choose_loss(costs(cce=None, sce=None), max_slowdown=3.0) is None


def test_a_batch_that_is_too_large_is_computed_in_parts_on_the_device_there_is():
    # 36 GB usable, 10 of them for five copies of the table: 40 / 2 fit beside them.
    assert settle_sizes(make_need()) == {"accumulation_steps": 2}
    assert settle_sizes(make_need(activations=90 * GB)) == {"accumulation_steps": 4}
    assert settle_sizes(make_need(n_parts=4)) == {"accumulation_steps": 8}


def test_where_another_gradient_is_too_much_the_batch_is_smaller():
    need = make_need(table=8 * GB)  # 32 GB for four copies, 40 for five
    assert settle_sizes(need) == {"batch_size": 8, "accumulation_steps": 1}
    in_tokens = need._replace(batch=25_600, batch_name="batch_tokens")
    assert settle_sizes(in_tokens) == {"batch_tokens": 1600, "accumulation_steps": 1}


def test_a_state_that_is_too_large_is_shared_by_devices():
    need = make_need(table=16 * GB, activations=3 * GB, loss=GB)  # 64 GB for four copies
    found = settle_sizes(need)
    assert found == {"devices": 2, "item_table": "sharded", "accumulation_steps": 1}
    text = explain_sizes(need, found)
    assert "take 64.0 GB" in text
    assert "each of 2 devices holds 32.0 GB" in text


def test_devices_share_activations_but_each_has_the_loss_of_all_tokens():
    # 72 GB usable, 64 of them for four copies of a 32nd of the table: 8 GB are left for 1.5 GB of
    # activations and 16 of the loss, which are 4.4 in four parts; there is no room for five copies.
    need = make_need(free=80 * GB, table=512 * GB, activations=48 * GB, loss=16 * GB)
    found = settle_sizes(need)
    assert found == {
        "devices": 32,
        "item_table": "sharded",
        "batch_size": 32,
        "accumulation_steps": 1,
    }
    assert "a step's batch about 64.0 GB more" in explain_sizes(need, found)


@pytest.mark.parametrize(("room", "fits"), [(-(2**20), False), (2**20, True)])
def test_the_cast_of_a_large_table_takes_no_more_than_it_may(room, fits):
    free = round((4 * 2 * GB + CAST_BYTES + room) / USABLE)
    need = make_need(free=free, cast=GB, activations=0, loss=0, n_parts=0)
    assert (settle_sizes(need) == {"accumulation_steps": 1}) == fits


@pytest.mark.parametrize(("room", "n_devices"), [(-(2**20), 4), (2**20, 2)])
def test_a_smaller_cast_is_shared_with_the_table(room, n_devices):
    free = round((4 * GB + GB // 16 + room) / USABLE)
    need = make_need(free=free, cast=GB // 8, activations=0, loss=0)
    assert settle_sizes(need)["devices"] == n_devices


def test_what_nothing_makes_less_is_there_on_every_device():
    need = make_need(table=16 * GB, other=5 * GB)
    assert settle_sizes(need)["devices"] == 4
    assert settle_sizes(make_need(other=36 * GB)) is None


def test_what_no_device_can_hold_is_said_with_what_would_help():
    need = make_need(rest=10 * GB)
    assert settle_sizes(need) is None
    assert "lower training.model.hidden_size" in explain_sizes(need, None)
    assert settle_sizes(make_need(table=100 * GB, n_sequences=4)) is None


NUMBER = st.integers(1, 10**6)
SMALL = st.integers(0, 10**5)


@given(NUMBER, NUMBER, SMALL, SMALL, NUMBER, NUMBER, SMALL, st.integers(1, 600), st.integers(1, 8))
def test_what_is_settled_is_the_first_that_fits_of_all_there_is(
    free, table, cast, rest, activations, loss, other, n_sequences, n_parts
):
    sizes = (free, table, cast, rest, activations, loss, other)
    need = Need(*sizes, n_sequences, "batch_size", n_sequences, n_parts)
    powers = [2**n for n in range(10)]
    fitting = []
    for devices, parts, smaller in product(powers, powers, (False, True)):
        gradients = 2 if parts > 1 and not smaller else 1
        needed = (3 + gradients) * table / devices + 4 * rest + other
        needed += activations / devices / parts + loss / parts + cast / devices
        tried = devices == 1 and parts <= n_parts
        if devices * parts <= n_sequences and not tried and needed <= USABLE * free:
            fitting.append((devices, smaller, parts))
    found = settle_sizes(need)
    if not fitting:
        assert found is None
        return
    devices, smaller, parts = min(fitting)
    assert found.get("devices", 1) == devices
    assert found.get("item_table") == ("sharded" if devices > 1 else None)
    assert found["accumulation_steps"] == (1 if smaller else parts)
    assert found.get("batch_size") == (n_sequences // parts if smaller else None)
    assert found.get("batch_size", n_sequences) >= devices * found["accumulation_steps"]
    assert explain_sizes(need, found)
