from __future__ import annotations

import importlib
import os
import re
import signal
import threading

import pytest
from fake_trials import FAILURE, FakeRunner, finish, parse, plan, run

from sce_pipeline.parameters import SweepOptions
from sce_pipeline.sweeps import run as running
from sce_pipeline.sweeps.run import run_trials
from sce_pipeline.sweeps.search import Proposal
from sce_pipeline.sweeps.trials import SCORE, Records

PATIENCE = 60
"""Seconds after which what should have happened side by side has not."""


def grid_of(n_trials):
    return parse(search="grid", grid={"a": list(range(1, n_trials + 1))})


def test_so_many_trials_run_side_by_side_and_no_more(tmp_path):
    three = threading.Barrier(3)
    lock = threading.Lock()
    running_now, most = set(), []

    def execute(trial):
        with lock:
            running_now.add(trial.digest)
            most.append(len(running_now))
        three.wait(PATIENCE)
        with lock:
            running_now.remove(trial.digest)
        return finish()

    done = run(grid_of(9), Records(tmp_path), execute, at_once=3)
    assert len(done) == 9
    assert max(most) == 3


def test_trials_start_in_the_order_of_the_search_and_are_returned_in_it(tmp_path, caplog):
    caplog.set_level("INFO")
    records = Records(tmp_path)
    sweep = grid_of(6)
    others = threading.Event()
    ended = []

    def execute(trial):
        number = trial.values["a"]
        if number == 1:  # ends last: the others take the second place in turn
            assert others.wait(PATIENCE)
        ended.append(number)
        if number == 6:
            others.set()
        return FAILURE if number == 3 else finish(number / 10)

    done = run(sweep, records, execute, at_once=2)
    assert ended == [2, 3, 4, 5, 6, 1]
    assert [record["values"]["a"] for record in done] == [1, 2, 3, 4, 5, 6]
    assert [record["status"] for record in done].index("failed") == 2
    starts = re.findall(r"trial (\d) of 6: a=\d$", caplog.text, flags=re.MULTILINE)
    assert starts == ["1", "2", "3", "4", "5", "6"]
    assert "trial 3 of 6: a=3: failed, it broke, 0 s, about 0 s left" in caplog.text

    ended.clear()
    again = run(sweep, records, execute, at_once=2)
    assert not ended
    assert again == done
    assert run(sweep, records, execute, retry_failed=True, at_once=2) == [
        {**record, "seconds": again[2]["seconds"]} if number == 2 else record
        for number, record in enumerate(done)
    ]
    assert ended == [3]


def test_the_time_that_is_left_counts_what_runs_side_by_side(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    clock = [0.0]
    ends = {number: threading.Event() for number in range(1, 7)}
    script = [(10.0, 1), (14.0, 2), (20.0, 3), (24.0, 4), (30.0, 5), (34.0, 6)]

    def wait(futures, timeout, return_when):
        clock[0], number = script.pop(0)
        ends[number].set()
        return real_wait(futures, PATIENCE, return_when)

    def execute(trial):
        assert ends[trial.values["a"]].wait(PATIENCE)
        return finish()

    real_wait = running.wait
    monkeypatch.setattr(running, "wait", wait)
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])
    run(grid_of(6), Records(tmp_path), execute, at_once=2)
    lines = re.findall(r"trial (\d) of 6: .* (\d+) s, about (\d+) s left", caplog.text)
    assert [tuple(map(int, line)) for line in lines] == [
        (1, 10, 20),  # the second, which has run so long, is about to end; four are left
        (2, 14, 22),  # a mean of 12 s: 8 of the third, which started at 10, and three more
        (3, 10, 14),  # a mean of 34 / 3: 16 / 3 of the fourth, and two more
        (4, 10, 9),  # a mean of 11: 7 of the fifth, and one more
        (5, 10, 5),  # a mean of 54 / 5: 24 / 5 of the last, alone
        (6, 10, 0),
    ]


@pytest.fixture
def heard():
    """Ctrl-C is heard here, as it is not by what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_ends_a_sweep_ends_the_trials_that_run_and_keeps_what_they_bring(tmp_path, error):
    started = threading.Barrier(3)
    ran = []

    def execute(trial):
        ran.append(trial.values["a"])
        started.wait(PATIENCE)
        if trial.values["a"] == 2:
            raise error
        assert runner.closed.wait(PATIENCE)
        if trial.values["a"] == 1:
            raise KeyboardInterrupt
        return finish(0.25)

    runner = FakeRunner(execute)
    records = Records(tmp_path)
    with pytest.raises(error):
        run(grid_of(5), records, runner, at_once=3)
    assert sorted(ran) == [1, 2, 3]
    assert [records.find(plan({"a": a})) is None for a in (1, 2, 3)] == [True, True, False]
    assert records.find(plan({"a": 3}))[SCORE] == 0.25


@pytest.mark.usefixtures("heard")
def test_ctrl_c_ends_the_trials_that_run(tmp_path, monkeypatch):
    importlib.import_module("polars")  # whose handler of signals lets what waits go on
    real_wait = running.wait
    waits = threading.Event()
    in_time = []

    def wait(*args):
        waits.set()
        return real_wait(*args)

    monkeypatch.setattr(running, "wait", wait)

    def execute(trial):
        assert waits.wait(PATIENCE)
        if trial.values["a"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        in_time.append(runner.closed.wait(PATIENCE / 2))
        raise KeyboardInterrupt

    runner = FakeRunner(execute)
    with pytest.raises(KeyboardInterrupt):
        run(grid_of(3), Records(tmp_path), runner, at_once=2)
    assert in_time == [True, True]
    assert not list(tmp_path.glob("*.json"))


def test_a_trial_that_is_the_same_as_one_that_runs_waits_for_it(tmp_path):
    trial, other = plan({"a": 1}), plan({"a": 2})
    told, ran = [], []
    both = threading.Barrier(2)

    class Twice:
        n_trials = 3

        def propose(self):
            for number, proposed in enumerate([trial, other, trial]):
                yield Proposal(proposed, lambda record, number=number: told.append(number))

    def execute(proposed):
        ran.append(proposed.digest)
        both.wait(PATIENCE)
        return finish()

    options = SweepOptions(retry_failed=False, trials_at_once=3)
    done = run_trials(Twice(), Records(tmp_path), FakeRunner(execute), options)
    assert sorted(ran) == sorted([trial.digest, other.digest])
    assert sorted(told) == [0, 1, 2]
    assert told.index(0) < told.index(2)
    assert [record["digest"] for record in done] == [trial.digest, other.digest, trial.digest]
