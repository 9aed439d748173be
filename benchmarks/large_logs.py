"""Times data processing of logs of any size, and the memory it takes, beside the same in pandas.

    python benchmarks/large_logs.py --rows 1000000 10000000 --engines polars duckdb pandas
    python benchmarks/large_logs.py --rows 200000000 --engines duckdb --output large.jsonl
    python benchmarks/large_logs.py --table large.jsonl

A log has 100 rows a user, who is there for a tenth of the time, half as many items as users, drawn
by a law of popularity, and times that follow one another; it is drawn a few million rows at a time,
and kept for the next engine. Ours is the pipeline data_processing, from the file to the sequences,
with the temporal split whose test users do not train. In pandas the same steps are taken as the
papers' notebooks take them: both filters, the quantile of time, the split, numbers for ids, and a
list of items for each user. A run is a process of its own; the peak is its largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2_000_000
SCHEMA = pa.schema([(name, pa.int64()) for name in ("userid", "itemid", "timestamp")])
FIRST, SPAN = 1_300_000_000, 300_000_000
"""The first second of a log, and how many there are."""

SPLIT = "data_processing.split.train_users=disjoint"
ENVIRONMENTS = {"polars": [], "duckdb": ["--env", "duckdb"], "spark": ["--env", "spark"]}


def draw_log(n_rows: int, file: Path) -> None:
    """Draw a log, part after part."""
    generator = np.random.default_rng(0)
    n_users = max(10, n_rows // 100)
    n_items = max(10, n_users // 2)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with pq.ParquetWriter(unfinished, SCHEMA) as writer:
        for start in range(0, n_rows, AT_ONCE):
            size = min(AT_ONCE, n_rows - start)
            places = (start + np.arange(size)) / n_rows
            # A user is there for a tenth of the time; what lies beyond either end is reflected.
            users = np.abs(places + (generator.random(size) - 0.5) / 10)
            users = (np.minimum(users, 2 - users) * n_users).astype(np.int64) % n_users
            items = (n_items * generator.random(size) ** 3).astype(np.int64)
            times = FIRST + (places * SPAN).astype(np.int64)
            writer.write_table(pa.table([users, items, times], schema=SCHEMA))
    unfinished.replace(file)


def process_in_pandas(file: Path) -> dict[str, int]:
    """Take the steps of data processing in pandas, and return what came out."""
    import pandas as pd  # noqa: PLC0415 - the other engines are measured without it

    log = pd.read_parquet(file)
    users_of = log.groupby("itemid")["userid"].nunique()
    log = log[log["itemid"].isin(users_of.index[users_of >= 5])]
    items_of = log.groupby("userid")["itemid"].nunique()
    log = log[log["userid"].isin(items_of.index[items_of >= 20])]
    cut = log["timestamp"].quantile(0.95, interpolation="nearest")
    later = log["userid"].isin(log.loc[log["timestamp"] >= cut, "userid"].unique())
    train, test = log[~later], log[later & (log["timestamp"] >= cut)]
    test = test[test["itemid"].isin(train["itemid"].unique())]
    numbers = pd.Index(np.sort(train["itemid"].unique()))
    sequences = []
    for part in (train, test):
        encoded = part.assign(itemid=numbers.get_indexer(part["itemid"]))
        encoded = encoded.sort_values(["userid", "timestamp"], kind="stable")
        sequences.append(encoded.groupby("userid", sort=True)["itemid"].agg(list))
    return {"train_rows": len(train), "train_users": len(sequences[0]), "items": len(numbers)}


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its time, its peak and how it ended."""
    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - what is run is this file or Kedro
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None  # noqa: S101
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if " took " in line or "Running node" in line:
            print(f"  [{time.perf_counter() - started:6.0f} s] {line.strip()[:100]}", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }
    if process.returncode:
        found |= {"failed": process.returncode, "last_lines": lines[-15:]}
    return found


def run(n_rows: int, engine: str) -> dict[str, Any]:
    """Process a log with an engine, from scratch."""
    name = f"large_{n_rows}"
    file = ROOT / f"data/01_raw/{name}/interactions.parquet"
    if not file.is_file():
        draw_log(n_rows, file)
    for folder in ("02_intermediate", "03_primary", "05_model_input"):
        shutil.rmtree(ROOT / "data" / folder / name, ignore_errors=True)
    if engine == "pandas":
        command = [sys.executable, __file__, "--in-pandas", str(file)]
    else:
        command = [sys.executable, "-m", "kedro", "run", "--pipelines", "data_processing"]
        command += [*ENVIRONMENTS[engine], "--params", f"dataset={name},{SPLIT}"]
    found = measure(command, {**os.environ, "PYTHONUNBUFFERED": "1"})
    report = ROOT / f"data/03_primary/{name}/split_report.json"
    if engine == "pandas" and "failed" not in found:
        found |= json.loads((file.parent / "pandas.json").read_text())
    elif report.is_file():
        train = json.loads(report.read_text())["parts"]["train"]
        found |= {"train_rows": train["rows"], "train_users": train["users"]}
        found |= {"items": train["items"]}
    return {"rows": n_rows, "engine": engine, **found}


def print_table(file: Path) -> None:
    """Print what was measured."""
    print("| rows | engine | time | CPU time | peak | training rows, users, items |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in file.read_text().splitlines():
        row = json.loads(line)
        kept = ", ".join(f"{row.get(name, 0):,}" for name in ("train_rows", "train_users", "items"))
        ended = f"failed with {row['failed']}" if "failed" in row else f"{row['seconds']:,.0f} s"
        print(
            f"| {row['rows']:,} | {row['engine']} | {ended} | {row['cpu_seconds']:,.0f} s "
            f"| {row['peak_gb']:.1f} GB | {kept} |"
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    engines = [*ENVIRONMENTS, "pandas"]
    parser.add_argument("--engines", nargs="+", choices=engines, default=["polars", "duckdb"])
    parser.add_argument("--output", type=Path, default=Path("large_logs.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    parser.add_argument("--in-pandas", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_pandas:
        found = process_in_pandas(arguments.in_pandas)
        (arguments.in_pandas.parent / "pandas.json").write_text(json.dumps(found))
        return
    if not arguments.table:
        for n_rows in arguments.rows:
            for engine in arguments.engines:
                print(f"{n_rows:,} rows, {engine}", flush=True)
                with arguments.output.open("a") as file:
                    file.write(json.dumps(run(n_rows, engine)) + "\n")
    print_table(arguments.table or arguments.output)


if __name__ == "__main__":
    main()
