from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
import yaml
from filelock import FileLock
from kedro.io.core import generate_timestamp

from helpers import ROOT, SMALL_RUN, make_log
from sce_pipeline.pipeline_registry import register_pipelines
from sce_pipeline.pipelines.sweep import process, trial
from sce_pipeline.pipelines.sweep.nodes import choose_sweep, tabulate
from sce_pipeline.pipelines.sweep.planning import Planner
from sce_pipeline.pipelines.sweep.process import TrialProcesses
from sce_pipeline.pipelines.sweep.trial import describe_failure
from sce_pipeline.sweeps.rules import DataSizes
from sce_pipeline.sweeps.search import corners, expand
from sce_pipeline.sweeps.trials import Trial


def write_sweep(project, **sweep):
    text = yaml.safe_dump({"sweeps": {"tiny": {"search": "grid", **sweep}}})
    (project.folder / "conf/local/parameters.yml").write_text(text)


def sweep(project, *before, **parameters):
    return project.run(pipelines=[*before, "sweep"], **{**SMALL_RUN, "sweep": "tiny", **parameters})


def folder_of(project):
    return project.path("08_reporting", "walk", "sweeps", "tiny")


def read_table(project):
    return pl.read_csv(folder_of(project) / "trials.csv").to_dicts()


def make_planner(project, data_sizes=None, pipelines=("training",), **runtime_params):
    request = {
        "project_path": str(project.folder),
        "conf_source": str(project.folder / "conf"),
        "env": "local",
        "runtime_params": runtime_params,
    }
    return Planner(request, data_sizes or DataSizes(100, 9.0, {}), pipelines)


def test_the_default_pipeline_sweeps_nothing(project):
    pipelines = register_pipelines()
    assert {node.name for node in pipelines["sweep"].nodes} & {"sweep.run_sweep"}
    assert not {node.name for node in pipelines["__default__"].nodes} & {
        node.name for node in pipelines["sweep"].nodes
    }


def processes_in(folder):
    """Processes of trials that run in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            here = (path / "cwd").resolve() == folder.resolve()
            if here and b"pipelines.sweep.trial" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue  # it has ended meanwhile, or is not ours
    return found


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
def test_a_sweep_that_is_killed_goes_on_with_what_is_left_and_over_failures(
    project, caplog, monkeypatch
):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    write_sweep(project, grid={"loss": ["ce"], "training.learning_rate": [0.01, 1e30]})
    at_once = {"sweep_options": {"trials_at_once": 2}}
    parameters = {**SMALL_RUN, "sweep": "tiny", **at_once}
    planner = make_planner(project, pipelines=("training", "evaluation"), **parameters)
    second = planner.plan({"loss": "ce", "training.learning_rate": 1e30})
    code = f"""
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
configure_project("sce_pipeline")
with KedroSession.create({str(project.folder)!r}, runtime_params={parameters!r}) as session:
    session.run(pipeline_names=["data_processing", "sweep"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    trials = folder_of(project) / "trials"
    trials.mkdir(parents=True)
    with (
        FileLock(trials / f"{second.digest}.running"),  # so the second lasts longer than the first
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=project.folder, env=environment
        ) as killed,
    ):
        wait_for(lambda: len(processes_in(project.folder)) == 2)
        wait_for(lambda: len(list(trials.glob("*.json"))) == 1)
        assert len(processes_in(project.folder)) == 1
        killed.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes_in(project.folder))
    assert not (folder_of(project) / "trials.csv").exists()
    (first,) = trials.glob("*.json")
    written = first.stat().st_mtime_ns

    write_sweep(project, grid={"loss": ["ce"], "training.learning_rate": [0.01, 1e30, 0.02]})
    sweep(project, **at_once)
    assert first.stat().st_mtime_ns == written
    good, bad, third = read_table(project)
    assert [row["status"] for row in (good, bad, third)] == ["finished", "failed", "finished"]
    assert (good["digest"], bad["digest"]) == (first.stem, second.digest)
    lines = re.findall(r"trial (\d) of 3: .*learning_rate=[^\s:]+(:)?", caplog.text)
    assert lines[:3] == [("1", ":"), ("2", ""), ("3", "")]
    assert sorted(lines[3:]) == [("2", ":"), ("3", ":")]
    assert "NotFiniteError" in bad["error"]
    assert not bad["out_of_memory"]
    assert "1 of 3 trials failed" in caplog.text
    versions = project.versions("06_models", "walk", "ce", "training_history.json")
    assert [path.parent.name for path in versions] == [good["version"], third["version"]]
    history = json.loads(versions[0].read_text())
    assert history["parameters"]["learning_rate"] == good["training.learning_rate"] == 0.01
    assert history["parameters"]["model"]["hidden_size"] == 8
    assert good["validation_ndcg@10"] == max(epoch["ndcg@10"] for epoch in history["epochs"])
    metrics = project.versions("08_reporting", "walk", "ce", "metrics.json")
    assert [row["test_ndcg@10"] for row in (good, third)] == [
        json.loads(path.read_text())["model"]["ndcg@10"]["value"] for path in metrics
    ]

    ran = []

    def finish(processes, trial):
        ran.append(trial.digest)
        return {"status": "finished", "validation_ndcg@10": 0.5, "metrics": {}}

    monkeypatch.setattr(TrialProcesses, "run", finish)
    sweep(project)
    assert not ran
    assert read_table(project) == [good, bad, third]
    sweep(project, sweep_options={"retry_failed": True})
    assert ran == [bad["digest"]]
    assert [row["status"] for row in read_table(project)] == ["finished"] * 3


def test_a_bad_combination_stops_a_sweep_before_any_trial(project):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    grid = {"loss": ["ce", "sec"], "training.patience": [8, 0], "training.loss.t": [0.5]}
    write_sweep(project, grid=grid, pipelines=["training"])
    with pytest.raises(ValueError, match="4 of 4 combinations") as caught:
        sweep(project, "data_processing")
    text = str(caught.value)
    assert "no preset 'sec'" in text
    assert "training.patience\n  Input should be greater than 0" in text
    assert "training.loss.ce.t\n  Extra inputs are not permitted" in text
    assert not list(folder_of(project).glob("trials/*"))


def test_trials_that_process_data_do_not_run_side_by_side(project):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    write_sweep(project, grid={"seed": [1, 2]}, pipelines=["data_processing", "training"])
    with pytest.raises(ValueError, match=r"trials_at_once is 2, but the trials of the sweep tiny"):
        sweep(project, "data_processing", sweep_options={"trials_at_once": 2})
    assert not project.path("02_intermediate").exists()
    make_planner(project)._check({"sweep_options": {"trials_at_once": 2}})  # as a trial's are


def test_a_sweep_must_be_chosen_and_exist(project):
    project.write_log("walk", make_log(n_users=40, n_items=12, length=8))
    with pytest.raises(ValueError, match="there is no sweep 'dmo'; choose one of demo"):
        project.run(pipelines=["sweep"], sweep="dmo")
    with pytest.raises(ValueError, match="choose a sweep with --params"):
        sweep(project, "data_processing", sweep=None)


def test_rules_are_computed_for_the_trials_own_batch(project):
    parameters = {"dataset": "walk", "loss": "sce"}
    plain = make_planner(project, **parameters)
    made_with = plain._check(parameters).data_processing.model_dump(mode="json")
    planner = make_planner(project, DataSizes(100, 9.0, made_with), **parameters)
    values = {
        "training.batch_size": 100,
        "training.loss.n_buckets": {"rule": "sce_n_buckets", "alpha": 2, "beta": 1},
    }
    trial = planner.plan(values)
    assert trial.values == {"training.batch_size": 100, "training.loss.n_buckets": 60}
    assert trial.runtime_params["training"] == {"batch_size": 100, "loss": {"n_buckets": 60}}
    assert trial.runtime_params["trial"] == trial.digest
    assert planner.plan({**trial.values}).digest == trial.digest
    with pytest.raises(ValueError, match=r"data_processing\.max_length = 200 rather than 10"):
        planner.plan({**values, "data_processing.max_length": 10})
    with pytest.raises(ValueError, match=r"sce_buckets.*does not match any"):
        planner.plan({"training.loss.n_buckets": {"rule": "sce_buckets"}})


def test_rules_are_not_computed_from_another_data_set_that_was_made_alike(project):
    made_with = make_planner(project)._check({"dataset": "walk"}).data_processing.model_dump()
    planner = make_planner(project, DataSizes(100, 9.0, made_with))
    own = planner._check({}).dataset
    rule = {"training.loss.n_buckets": {"rule": "sce_n_buckets", "alpha": 2, "beta": 1}}
    assert planner.plan({"loss": "sce", "dataset": "walk"}).runtime_params["dataset"] == "walk"
    with pytest.raises(ValueError, match=f"sequences of {own}, .*the trial trains on walk"):
        planner.plan({"loss": "sce", "dataset": "walk", **rule})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sweep_options.trials_at_once", 2),
        ("comparison.n_permutations", 99),
        ("trial", "mine"),
        ("los", "cce"),
    ],
)
def test_what_makes_no_difference_to_a_trial_cannot_be_varied(project, name, value):
    planner = make_planner(project, dataset="walk")
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} makes no difference to a trial"):
        planner.plan({"loss": "ce", name: value})
    varied = {"loss": "cce", "loss_presets.cce.z_loss": 0.5}
    assert planner.plan(varied).digest != planner.plan({"loss": "cce"}).digest


def test_a_trial_is_what_is_in_force_and_no_sweep(project):
    planner = make_planner(project, dataset="walk", sweep="tiny", sweep_options={}, seed=3)
    trial = planner.plan({"loss": "ce"})
    assert trial.runtime_params == {
        "dataset": "walk",
        "seed": 3,
        "loss": "ce",
        "trial": trial.digest,
    }
    spelt_out = planner.plan({"loss": "ce", "training.batch_size": 128})
    assert spelt_out.digest == trial.digest
    assert planner.plan({"loss": "cce"}).digest != trial.digest
    with pytest.raises(ValueError, match="seed is varied by the sweep"):
        planner.plan({"loss": "ce", "seed": 4})


NAMES = yaml.safe_load((ROOT / "conf/base/parameters/sweeps.yml").read_text())["sweeps"]


@pytest.mark.parametrize("name", NAMES)
def test_the_named_sweeps_are_good(project, name):
    chosen = choose_sweep(name, NAMES)
    parameters = {"dataset": chosen.dataset}
    made_with = make_planner(project)._check(parameters).data_processing.model_dump(mode="json")
    planner = make_planner(project, DataSizes(12_101, 8.9, made_with), **parameters)
    combinations = corners(chosen) if chosen.search == "optuna" else expand(chosen)
    numbers = {
        "demo": 2,
        "sce_beauty": 54,
        "rece_beauty": 40,
        "losses_beauty": 24,
        "losses_yelp": 48,
        "sce_beauty_optuna": 4,
        "budget_beauty": 42,
        "budget_temporal": 42,
    }
    assert len(combinations) == (21 if name.startswith("tuned_") else numbers[name])
    some = combinations[::11] + combinations[-1:]  # a plan takes a tenth of a second
    trials = [planner.plan(values) for values in some]
    assert all(
        trial.values["loss"] == values["loss"] for trial, values in zip(trials, some, strict=True)
    )


def make_processes(tmp_path, monkeypatch, script, at_once=1):
    """Processes of trials that are a shell script; its folder of trials is ``tmp_path/trials``."""
    shell = tmp_path / "shell"
    shell.write_text(f"#!/bin/sh\n{script}\n")
    shell.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(shell))
    request = {"project_path": str(tmp_path), "conf_source": "conf", "env": None}
    return TrialProcesses(request, ("training",), tmp_path / "trials", at_once)


def run_script(tmp_path, monkeypatch, script):
    return make_processes(tmp_path, monkeypatch, script).run(Trial({}, {}, "0123"))


def test_a_process_that_dies_without_a_word_is_a_failure(tmp_path, monkeypatch):
    killed = run_script(tmp_path, monkeypatch, "echo so far so good; kill -KILL $$")
    assert killed["status"] == "failed"
    assert killed["error"] == "so far so good\nthe process was ended by SIGKILL"
    assert killed["out_of_memory"]
    crashed = run_script(tmp_path, monkeypatch, "kill -SEGV $$")
    assert crashed["error"].endswith("the process was ended by SIGSEGV")
    assert not crashed["out_of_memory"]
    left = run_script(tmp_path, monkeypatch, "exit 3")
    assert left["error"] == "the process ended with code 3"


@pytest.mark.parametrize("ended", ["kill -TERM $$", "kill -INT $$", "exit 143"])
def test_a_trial_that_is_asked_to_end_ends_the_sweep_and_has_not_failed(
    tmp_path, monkeypatch, ended
):
    with pytest.raises(KeyboardInterrupt):
        run_script(tmp_path, monkeypatch, ended)


def run_all(processes, digests):
    """Run trials side by side; returns outcomes or errors, in futures."""
    pool = ThreadPoolExecutor(len(digests))
    futures = [pool.submit(processes.run, Trial({}, {}, digest)) for digest in digests]
    pool.shutdown(wait=False)
    return futures


def test_trials_that_run_end_with_the_sweep_and_have_not_failed(tmp_path, monkeypatch):
    # Its input ends, and it fails by that; it is in a session that no terminal's Ctrl-C reaches.
    script = "read message; echo $$; read more; exit 3"
    processes = make_processes(tmp_path, monkeypatch, script)
    futures = run_all(processes, ["a", "b"])
    logs = [tmp_path / f"trials/{digest}.log" for digest in "ab"]
    wait_for(lambda: all(log.exists() and log.read_text().strip() for log in logs))
    numbers = [int(log.read_text()) for log in logs]
    assert os.getsid(0) not in [os.getsid(number) for number in numbers]
    assert not any(future.done() for future in futures)
    processes.close()
    for future in futures:
        with pytest.raises(KeyboardInterrupt):
            future.result(timeout=60)
    with pytest.raises(KeyboardInterrupt, match="the sweep ends"):
        processes.run(Trial({}, {}, "c"))
    assert not (tmp_path / "trials/c.log").read_text()


def test_a_trial_that_is_done_when_the_sweep_ends_has_finished(tmp_path, monkeypatch):
    script = f"""read message; echo started; read more
echo '{{"status": "finished"}}' > {tmp_path}/trials/a.outcome"""
    processes = make_processes(tmp_path, monkeypatch, script)
    (future,) = run_all(processes, ["a"])
    log = tmp_path / "trials/a.log"
    wait_for(lambda: log.exists() and log.read_text())
    processes.close()
    assert future.result(timeout=60) == {"status": "finished"}


@pytest.mark.parametrize(
    ("at_once", "said", "threads"), [(1, None, "-"), (2, None, "3"), (9, None, "1"), (2, "5", "5")]
)
def test_trials_side_by_side_share_the_cores(tmp_path, monkeypatch, at_once, said, threads):
    monkeypatch.setattr(process, "_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    script = "echo ${OMP_NUM_THREADS:--}; exit 3"
    make_processes(tmp_path, monkeypatch, script, at_once).run(Trial({}, {}, "a"))
    assert (tmp_path / "trials/a.log").read_text() == f"{threads}\n"


def test_trials_that_start_at_once_have_versions_of_their_own(tmp_path, monkeypatch):
    def create(*args, **kwargs):
        return SimpleNamespace(session_id=generate_timestamp())

    monkeypatch.setattr(trial.KedroSession, "create", create)
    message = {
        **dict.fromkeys(("project_path", "env", "conf_source", "runtime_params")),
        "starting": str(tmp_path / "starting"),
    }
    with ThreadPoolExecutor(4) as pool:
        sessions = list(pool.map(trial.create_session, [message] * 40))
    assert len({session.session_id for session in sessions}) == 40


def test_memory_that_does_not_suffice_is_recognised():
    def fail(cause):
        try:
            raise RuntimeError("the GPU's memory does not suffice") from cause
        except RuntimeError as error:
            return describe_failure(error)

    assert fail(torch.OutOfMemoryError("CUDA out of memory"))["out_of_memory"]
    assert fail(MemoryError())["out_of_memory"]
    assert fail(RuntimeError("DefaultCPUAllocator: can't allocate memory"))["out_of_memory"]
    assert fail(ValueError("rank 1 of 2 failed: OutOfMemoryError: CUDA"))["out_of_memory"]
    other = fail(KeyError("n_items"))
    assert not other["out_of_memory"]
    assert other["error"] == "RuntimeError: the GPU's memory does not suffice\nKeyError: 'n_items'"


def test_the_table_takes_what_trials_differ_in():
    base = {"status": "finished", "metrics": {"ndcg@10": 0.5}, "digest": "a"}
    failed = {"status": "failed", "metrics": {}, "error": "x", "digest": "b"}
    table = tabulate(
        [
            {**base, "values": {"loss": "sce", "training.loss.n_buckets": "auto"}},
            {**base, "values": {"loss": "sce", "training.loss.n_buckets": 8}},
            {**failed, "values": {"loss": "ce", "training.betas": [0.9, 0.98]}},
        ]
    )
    assert table["training.loss.n_buckets"].to_list() == ["auto", "8", None]
    assert table["training.betas"].to_list() == [None, None, "[0.9, 0.98]"]
    assert table["test_ndcg@10"].to_list() == [0.5, 0.5, None]
    assert pl.read_csv(table.write_csv().encode()).height == 3
