from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT

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
