from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from helpers import ROOT
from sce_pipeline.synthetic.histories import draw_histories

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=8)


@pytest.fixture(scope="module")
def benchmark_module():
    """Import a script's module; none of them is called like one that tests import."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_scaling_measures_its_parts_on_two_ranks(tmp_path):
    results = tmp_path / "results.jsonl"
    parts = "parallel,quality,sharded,communication"
    command = ["benchmarks/scaling.py", "--tiny", "--accelerator", "cpu", "--devices", "2"]
    command += ["--parts", parts, "--epochs", "2", "--quality-epochs", "1", "--seeds", "1"]
    command += ["--users", "120", "--interactions", "1800", "--batch-in-all", "12", "--steps", "2"]
    command += ["--quality-users", "100"]
    paths = [str(ROOT / "src"), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, *command, "--output", str(results)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in results.read_text().splitlines()]
    found = [record["part"] for record in records]
    twice = ["parallel", "parallel"], ["communication", "communication"]
    qualities = ["quality", "quality"]
    assert found == ["machine", *twice[0], *qualities, "sharded", *twice[1], "took"]
    assert [record["item_table"] for record in records[3:5]] == ["replicated", "sharded"]
    each, in_all = records[1:3]
    assert (each["batch_size"], in_all["batch_size"]) == (16, 12)
    for record in (each, in_all):
        assert record["tokens_per_second"] == record["all_tokens_per_second"][1] > 0
        assert len(record["peaks"]) == 2
    for record in records[6:8]:
        steps, exposed, exchanges = (np.array(record[k]) for k in ("step", "exposed", "exchanges"))
        assert np.all((exposed <= exchanges) & (exchanges <= steps) & (exchanges > 0))
    for part in parts.split(","):
        assert f"\n{part}\n" in done.stdout


@given(INTERVALS, INTERVALS)
def test_shares_of_a_trace_are_those_of_its_instants(benchmark_module, exchanges, others):
    overlap = benchmark_module("overlap")
    exchanges, others = (
        [(start, start + length) for start, length in each] for each in (exchanges, others)
    )
    if not exchanges + others:
        return
    exchanging, computing = np.zeros((2, 50), dtype=bool)
    for marks, intervals in ((exchanging, exchanges), (computing, others)):
        for start, stop in intervals:
            marks[start:stop] = True
    busy = np.flatnonzero(exchanging | computing)
    assert overlap.shares(exchanges, others) == {
        "step": busy[-1] - busy[0] + 1,
        "exchanges": exchanging.sum(),
        "exposed": (exchanging & ~computing).sum(),
        "others": computing.sum(),
        "idle": busy[-1] - busy[0] + 1 - len(busy),
    }


def test_quality_that_differs_by_more_than_seeds_do_is_told(benchmark_module):
    report = benchmark_module("scaling_report")
    seeds = {1: (0.10, 0.11, 0.12), 2: (0.105, 0.115, 0.12), 4: (0.13, 0.14, 0.15)}
    records = [
        {"devices": devices, "item_table": "replicated", "seed": seed, "ndcg@10": value}
        for devices, values in seeds.items()
        for seed, value in enumerate(values)
    ]
    rows = list(report.table_of_quality(records))
    assert [row["within it"] for row in rows] == ["", "yes", "no"]
    assert rows[0]["NDCG@10"] == "0.1100 ± 0.0100"
    assert rows[2]["against 1"] == "+0.0300"
    single = [record for record in records if record["seed"] == 0]
    assert [row["within it"] for row in report.table_of_quality(single)] == ["", "", ""]


def test_a_process_that_was_killed_is_not_alive_even_before_it_is_waited_for(benchmark_module):
    killed = benchmark_module("killed")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert killed.alive([process.pid]) == [process.pid]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert killed.alive([process.pid]) == []
    assert killed.alive([process.pid]) == []


@pytest.mark.parametrize(("items", "longest"), [(600, 267), (500, 250)])
def test_a_planted_log_is_laid_out_whole_whatever_its_histories(benchmark_module, items, longest):
    planted_log = benchmark_module("planted_log")
    sizes = {"items": items, "users": 30, "clusters": 5, "test_users": 20, "history": 40, "seed": 3}
    world = planted_log.plant(argparse.Namespace(**sizes))
    assert world.parameters.longest_history == longest
    log, validation, test = planted_log.draw_sequences(world, 20, 16)
    drawn = draw_histories(world, np.arange(30))
    ids = np.split(world.item_ids[drawn.places], drawn.offsets[1:-1])
    kept = np.split(log["items"], log["offsets"][1:-1])
    for user in range(20):
        held_out = validation["targets"][user], test["targets"][user]
        np.testing.assert_array_equal(ids[user], [*kept[user], *held_out])
    for held_out, back in ((validation, 2), (test, 1)):
        np.testing.assert_array_equal(
            held_out["items"], np.concatenate([history[:-back] for history in ids[:20]])
        )
    targets = np.zeros(len(log["items"]), dtype=int)
    for start, stop in zip(log["window_starts"], log["window_stops"], strict=True):
        assert stop - start <= 17
        targets[start + 1 : stop] += 1
    firsts = np.isin(np.arange(len(targets)), log["offsets"])
    np.testing.assert_array_equal(targets, ~firsts)


def test_losses_at_scale_are_trained_with_each_backbone_and_put_on_record(
    benchmark_module, monkeypatch, tmp_path, capsys
):
    at_scale, rows = benchmark_module("at_scale"), tmp_path / "rows.jsonl"

    def fit(log, validation, folder, parameters, filter_seen):
        if parameters.loss.name == "ce":
            raise RuntimeError("the GPU's memory does not suffice")
        weights, history = fit_all(log, validation, folder, parameters, filter_seen)
        histories.append(history)
        return weights, history

    fit_all, histories = at_scale.fit, []
    monkeypatch.setattr(at_scale, "fit", fit)
    command = ["at_scale.py", "--items", "200", "--users", "40", "--clusters", "4"]
    command += ["--history", "8", "--max-length", "8", "--test-users", "20", "--hidden-size", "8"]
    command += ["--epochs", "2", "--models", "sasrec", "gru4rec", "bert4rec"]
    command += ["--losses", "ce", "sce:n_buckets=4", "--output", str(rows)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    at_scale.main()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    models = ["sasrec", "gru4rec", "bert4rec"]
    assert [row["model"] for row in found] == [model for model in models for _ in range(2)]
    for row in found[::2]:
        assert row["failed"] == "RuntimeError: the GPU's memory does not suffice"
    for row, history in zip(found[1::2], histories, strict=True):
        assert 0 <= row["ndcg@10"] <= 1
        assert 0 <= row["alike"] <= 1 + 1e-6
        assert row["best_epoch"] == history["best_epoch"]
        until = [
            e["training_seconds"] for e in history["epochs"] if e["epoch"] <= row["best_epoch"]
        ]
        assert row["seconds_to_best"] == pytest.approx(sum(until))
    assert capsys.readouterr().out.count("n_buckets=4") == 3


def test_what_losses_keep_is_told_after_each_number_of_epochs(
    benchmark_module, monkeypatch, tmp_path, capsys
):
    kept_mass, planted_log = benchmark_module("kept_mass"), benchmark_module("planted_log")
    sizes = {"items": 200, "users": 40, "clusters": 4, "history": 8, "seed": 1, "test_users": 20}
    world = planted_log.plant(argparse.Namespace(**sizes))
    folder = tmp_path / "data/05_model_input/amazon_beauty"
    folder.mkdir(parents=True)
    names = ("train", "validation", "test")
    for name, arrays in zip(names, planted_log.draw_sequences(world, 20, 8), strict=True):
        save_file(arrays, folder / f"{name}_sequences.safetensors")
    monkeypatch.setattr(kept_mass, "ROOT", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["kept_mass.py", "--epochs", "1", "2", "--losses", "sce:bucket_size_y=20", "ce"]
    monkeypatch.setattr("sys.argv", [*command, "--windows", "8"])
    kept_mass.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = [row[1:] for row in rows if row[:1] in (["sce:bucket_size_y=20"], ["ce"])]
    assert shares[1] == shares[3] == [*["100.0%"] * 4, "1.000", "1.000"]
    for tokens, items, mass, pooled, *_ in (shares[0], shares[2]):
        kept, pool = float(mass.rstrip("%")), float(pooled.rstrip("%"))
        assert 0 < kept <= pool < 100
        assert all(0 < float(share.rstrip("%")) <= 100 for share in (tokens, items))


def test_recommendations_are_timed_by_parts_until_time_is_over(
    benchmark_module, monkeypatch, capsys
):
    recommending = benchmark_module("recommending")
    monkeypatch.setattr(recommending, "CUDA", False)
    monkeypatch.setattr(recommending, "DEVICE", "cpu")
    monkeypatch.setattr(recommending, "synchronize", lambda: None)
    monkeypatch.setattr("sys.argv", ["recommending.py", "--tiny"])
    recommending.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [line[-9] for line in table] == ["500", "500"]
    sizes = {**recommending.TINY, "k": 5, "seconds": 0}
    arguments = argparse.Namespace(**sizes)
    model, histories = recommending.build(arguments), recommending.draw_histories(arguments)
    start = time.perf_counter()
    row = recommending.measure(model, histories, None, arguments, (1e9, 1e9))
    passed = time.perf_counter() - start
    assert row["users"] == 200
    assert row["rows"] == histories[1][200]
    assert min(row["seconds"].values()) > 0
    assert sum(row["seconds"].values()) < passed
    assert row["floor"] == 2 * 200 * 3_000 * 16 / 1e9
    assert recommending.deny(3_000).sum() == 300
