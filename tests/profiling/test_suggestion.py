from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    values = {"table": 2 * GB, "rest": 0, "working": 40 * GB, "batch": 128, "n_sequences": 128}
    values |= {"free": 40 * GB, "batch_name": "batch_size", "n_parts": 1}
    return Need(**{**values, **changes})


@pytest.mark.parametrize(
    ("measured", "loss", "said"),
    [
        (costs(cce=10, sce=11, cce_minus=12), "cce", "no other loss is faster"),
        (costs(cce=15, sce=10, cce_minus=12), "cce", "1.50 times as long as with sce"),
        (costs(cce=14, ce=10), "cce", "1.40 times as long as with ce"),
        (costs(cce=40, ce=12, sce=10), "ce", "1.20 times as long as with sce"),
        (costs(cce=15.1, sce=10, cce_minus=12), "sce", "cce takes 1.51 times as long as sce"),
        (costs(cce=30, sce=12, cce_minus=10), "cce_minus", "faster here than sce"),
        (costs(cce=30, bce=5, sce=12), "sce", "cce takes 6.00 times as long as bce"),
        (costs(cce=None, ce=None, sce=12), "sce", "cce does not fit and ce does not fit"),
        (costs(cce=30, bce=5, sce=None), "cce", "neither cce_minus nor sce fits"),
        (costs(bce=5, rece=4), "rece", "cce was not tried"),
        (costs(cce=None, bce=5), "bce", "bce is the fastest loss that fits"),
    ],
    ids=str,
)
def test_exact_while_it_is_worth_it_then_what_scales_then_what_fits(measured, loss, said):
    choice = choose_loss(measured, max_slowdown=1.5)
    assert choice.loss == loss
    assert said in choice.reason


def test_the_worth_of_exactness_is_a_parameter_and_nothing_fits_is_no_choice():
    measured = costs(cce=30, sce=10)
    assert choose_loss(measured, max_slowdown=3.0).loss == "cce"
    assert choose_loss(measured, max_slowdown=2.9).loss == "sce"
    assert choose_loss(costs(cce=None, sce=None), max_slowdown=3.0) is None


def test_a_batch_that_is_too_large_is_computed_in_parts_on_the_device_there_is():
    # 36 GB usable, 10 of them for five copies of the table: 40 / 2 fit beside them.
    assert settle_sizes(make_need()) == {"accumulation_steps": 2}
    assert settle_sizes(make_need(working=100 * GB)) == {"accumulation_steps": 4}
    assert settle_sizes(make_need(n_parts=4)) == {"accumulation_steps": 8}


def test_where_another_gradient_is_too_much_the_batch_is_smaller():
    need = make_need(table=8 * GB)  # 32 GB for four copies, 40 for five
    assert settle_sizes(need) == {"batch_size": 8, "accumulation_steps": 1}
    in_tokens = need._replace(batch=25_600, batch_name="batch_tokens")
    assert settle_sizes(in_tokens) == {"batch_tokens": 1600, "accumulation_steps": 1}


def test_a_state_that_is_too_large_is_shared_by_devices():
    need = make_need(table=16 * GB, working=4 * GB)  # 64 GB for four copies
    found = settle_sizes(need)
    assert found == {"devices": 2, "item_table": "sharded", "accumulation_steps": 1}
    text = explain_sizes(need, found)
    assert "take 64.0 GB" in text
    assert "each of 2 devices holds 32.0 GB" in text


def test_what_no_device_can_hold_is_said_with_what_would_help():
    need = make_need(rest=10 * GB)
    assert settle_sizes(need) is None
    assert "lower training.model.hidden_size" in explain_sizes(need, None)
    assert settle_sizes(make_need(table=100 * GB, n_sequences=4)) is None


NUMBER = st.integers(1, 10**6)


@given(NUMBER, NUMBER, st.integers(0, 10**5), NUMBER, st.integers(1, 600), st.integers(1, 8))
def test_what_is_settled_is_the_first_that_fits_of_all_there_is(
    free, table, rest, working, n_sequences, n_parts
):
    need = Need(free, table, rest, working, n_sequences, "batch_size", n_sequences, n_parts)
    powers = [2**n for n in range(10)]
    fitting = []
    for devices, parts, smaller in product(powers, powers, (False, True)):
        gradients = 2 if parts > 1 and not smaller else 1
        needed = (3 + gradients) * table / devices + 4 * rest + working / devices / parts
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
