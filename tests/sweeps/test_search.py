from __future__ import annotations

import sys
import threading

import pytest
from fake_trials import FAILURE, finish, parse, plan, run
from pydantic import ValidationError

from sce_pipeline.sweeps.search import build_search, expand
from sce_pipeline.sweeps.trials import SCORE, Records
from sce_pipeline.sweeps.values import lay_over


def test_a_grid_is_every_combination_and_grids_follow_one_another():
    one = {"seed": [1, 2], "loss": ["sce", "cce"]}
    pairs = {(trial["loss"], trial["seed"]) for trial in expand(parse(search="grid", grid=one))}
    assert pairs == {("sce", 1), ("sce", 2), ("cce", 1), ("cce", 2)}
    grids = [one, {"loss": ["gbce"], "training.loss.t": [0.5, 1.0]}]
    trials = expand(parse(search="grid", grid=grids))
    assert len(trials) == 6
    assert trials[4:] == [{"loss": "gbce", "training.loss.t": t} for t in (0.5, 1.0)]


def test_a_random_search_draws_distinct_combinations_by_its_seed():
    grid = {"a": list(range(10)), "b": list(range(10))}

    def draw(seed, n_trials=20):
        sweep = parse(search="random", grid=grid, n_trials=n_trials, seed=seed)
        return [(trial["a"], trial["b"]) for trial in expand(sweep)]

    assert len(set(draw(1))) == 20
    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1, 1000))) == 100


@pytest.mark.parametrize(
    "sweep",
    [
        {"search": "grid"},
        {"search": "grid", "grid": {"seed": []}},
        {"search": "grid", "grid": {"seed": 1}},
        {"search": "grid", "grid": {"seed": [1]}, "n_trials": 3},
        {"search": "random", "grid": {"seed": [1]}},
        {"search": "grid", "grid": {"seed": [1]}, "pipelines": ["evaluation"]},
        {"search": "grid", "grid": {"seed": [1]}, "pipelines": ["training", "sweep"]},
        {
            "search": "optuna",
            "distributions": {"a": {"low": 2, "high": 1, "log": False}},
            "n_trials": 1,
            "seed": 1,
        },
        {
            "search": "optuna",
            "distributions": {"a": {"low": 0, "high": 1, "log": True}},
            "n_trials": 1,
            "seed": 1,
        },
    ],
    ids=str,
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep):
    with pytest.raises(ValidationError):
        parse(**sweep)


def test_all_bad_combinations_are_listed_at_once(tmp_path):
    sweep = parse(search="grid", grid={"a": [1, "bad"], "b": ["bad", 2]})
    with pytest.raises(ValueError, match="3 of 4 combinations") as caught:
        build_search(sweep, plan, Records(tmp_path), 1)
    text = str(caught.value)
    assert all(f"{values}: that is bad" in text for values in ("a=1,b=bad", "a=bad,b=2"))


def test_the_same_trial_of_two_grids_runs_once(tmp_path):
    sweep = parse(search="grid", grid=[{"a": [1, 2]}, {"a": [2, 3]}])
    ran = []

    def execute(trial):
        ran.append(trial.values["a"])
        return finish()

    done = run(sweep, Records(tmp_path), execute)
    assert ran == [1, 2, 3] == [record["values"]["a"] for record in done]


def test_what_finished_is_never_run_again_and_what_failed_if_asked(tmp_path, caplog):
    caplog.set_level("INFO")
    sweep = parse(search="grid", grid={"a": [1, 2, 3]})
    records = Records(tmp_path)
    ran = []

    def execute(trial):
        ran.append(trial.values["a"])
        return FAILURE if len(ran) == 2 else finish(trial.values["a"] / 10)

    def sweep_once(retry_failed):
        ran_before = len(ran)
        done = run(sweep, records, execute, retry_failed)
        return ran[ran_before:], [record["status"] for record in done]

    assert sweep_once(False) == ([1, 2, 3], ["finished", "failed", "finished"])
    assert "trial 2 of 3: a=2: failed, it broke" in caplog.text
    assert "trial 3 of 3: a=3: validation NDCG@10 0.3000, 0 s, about 0 s left" in caplog.text
    assert sweep_once(False) == ([], ["finished", "failed", "finished"])
    assert sweep_once(True) == ([2], ["finished"] * 3)
    assert sweep_once(True) == ([], ["finished"] * 3)


def test_a_record_is_whole_or_absent(tmp_path):
    records = Records(tmp_path)
    trial = plan({"a": 1})
    assert records.find(trial) is None
    records.save(trial, finish(0.1))
    with pytest.raises(TypeError):
        records.save(trial, {**finish(0.2), "cannot be written": object()})
    assert records.find(trial)[SCORE] == 0.1
    assert records.find(plan({"a": 2})) is None


def test_values_are_laid_into_groups_and_clash_with_none():
    asked = {"training": {"loss": {"t": 0.5}}, "seed": 1}
    laid = lay_over(asked, {"training.loss.n_negatives": 4, "loss": "gbce"})
    assert laid == {"training": {"loss": {"t": 0.5, "n_negatives": 4}}, "seed": 1, "loss": "gbce"}
    assert asked == {"training": {"loss": {"t": 0.5}}, "seed": 1}
    with pytest.raises(ValueError, match=r"training\.loss\.t is varied by the sweep"):
        lay_over(asked, {"training.loss.t": 1.0})
    with pytest.raises(ValueError, match="seed, which is 1 and no group"):
        lay_over(asked, {"seed.value": 1})


class Killed(BaseException):
    """What ends a sweep in the middle of a trial."""


def test_optuna_goes_on_where_it_was_cut_off(tmp_path):
    pytest.importorskip("optuna", reason="Optuna is an optional extra")
    sweep = parse(
        search="optuna",
        n_trials=12,
        seed=3,
        distributions={"x": {"low": -1.0, "high": 1.0, "log": False}, "loss": ["sce", None]},
    )
    records = Records(tmp_path)
    ran, killed = [], []

    def execute(trial):
        if len(ran) == 5 and not killed:
            killed.append(dict(trial.values))
            raise Killed
        ran.append(dict(trial.values))
        return FAILURE if len(ran) == 4 else finish(1 - abs(trial.values["x"] - 0.3))

    def sweep_once(retry_failed=False):
        return run(sweep, records, execute, retry_failed)

    with pytest.raises(Killed):
        sweep_once()
    done = sweep_once()
    assert len(done) == len(ran) == 12
    assert ran[5] == killed[0]
    assert [record["values"] for record in done] == ran
    assert all(trial["loss"] in ("sce", None) for trial in ran)
    assert len(sweep_once()) == 12
    assert len(ran) == 12
    again = sweep_once(retry_failed=True)
    assert ran[12:] == [ran[3]]
    assert [record["status"] for record in again] == ["finished"] * 12
    assert len(sweep_once(retry_failed=True)) == 12
    assert len(ran) == 13


def test_optuna_is_asked_for_two_at_once_and_goes_on_with_both(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna", reason="Optuna is an optional extra")
    sampler, liars = optuna.samplers.TPESampler, []

    def make_sampler(**options):
        if options:  # a study makes one of its own before it is given ours
            liars.append(options["constant_liar"])
        return sampler(**options)

    monkeypatch.setattr(optuna.samplers, "TPESampler", make_sampler)
    distributions = {"x": {"low": -1.0, "high": 1.0, "log": False}}
    sweep = parse(search="optuna", n_trials=9, seed=3, distributions=distributions)
    records = Records(tmp_path)
    both = threading.Barrier(2)
    started = []

    def measure(trial):
        started.append(trial.values["x"])
        return finish(1 - abs(trial.values["x"] - 0.3))

    def measure_in_pairs(trial):
        outcome = measure(trial)
        both.wait(60)  # which fails if they run one by one
        if len(list(tmp_path.glob("*.json"))) == 4:
            raise Killed
        return outcome

    with pytest.raises(Killed):
        run(sweep, records, measure_in_pairs, at_once=2)
    cut_off = [x for x in started if records.find(plan({"x": x})) is None]
    assert len(started) == 6
    assert len(cut_off) == 2
    started.clear()
    done = run(sweep, records, measure, at_once=2)
    assert set(started[:2]) == set(cut_off)
    assert len(started) == 5
    assert len({record["digest"] for record in done}) == len(done) == 9
    assert liars == [True, True]

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/optuna.db")
    states = optuna.trial.TrialState
    known = {old.params["x"]: old.value for old in study.get_trials(states=(states.COMPLETE,))}
    assert known == {record["values"]["x"]: record[SCORE] for record in done}
    assert not study.get_trials(states=(states.RUNNING, states.WAITING))


def test_optuna_is_asked_for_by_name_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    sweep = parse(search="optuna", n_trials=1, seed=1, distributions={"a": [1, 2]})
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sce-pipeline\[optuna\]'"):
        build_search(sweep, plan, Records(tmp_path), 1)


def test_optuna_refuses_bad_ends_and_choices_beforehand(tmp_path):
    distributions = {"a": [1, "bad"], "b": {"low": 1, "high": 2, "log": False}}
    sweep = parse(search="optuna", n_trials=1, seed=1, distributions=distributions)
    with pytest.raises(ValueError, match=r"1 of 3 combinations.*\n.*that is bad"):
        build_search(sweep, plan, Records(tmp_path), 1)
