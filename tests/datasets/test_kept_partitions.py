from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import polars as pl
import pytest

from helpers import ROOT
from sce_pipeline.datasets.kept_partitions import KeptPartitionsDataset
from sce_pipeline.datasets.streamed_table import StreamedTableDataset


def make_dataset(folder):
    return KeptPartitionsDataset(
        path=str(folder), dataset=StreamedTableDataset, filename_suffix=".parquet"
    )


class Partitions:
    """Partitions that note down when they are computed, and one of which can fail."""

    def __init__(self, n, fails=None):
        self.computed = []
        self.fails = fails
        self.partitions = {f"a/part_{number}": partial(self.compute, number) for number in range(n)}

    def compute(self, number):
        if number == self.fails:
            raise KeyboardInterrupt
        self.computed.append(number)
        return pl.DataFrame({"number": [number] * 3})


def load_all(dataset):
    return {name: load().collect()["number"].to_list() for name, load in dataset.load().items()}


def test_what_is_there_is_kept_and_not_computed_again(tmp_path, caplog):
    dataset = make_dataset(tmp_path)
    cut_off = Partitions(4, fails=2)
    with pytest.raises(KeyboardInterrupt):
        dataset.save(cut_off.partitions)
    assert set(load_all(dataset)) == {"a/part_0", "a/part_1"}
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    with caplog.at_level("INFO"):
        again = Partitions(4)
        dataset.save(again.partitions)
    assert again.computed == [2, 3]
    assert "2 of 4 partitions" in caplog.text
    assert load_all(dataset) == {f"a/part_{number}": [number] * 3 for number in range(4)}
    assert times == {file: file.stat().st_mtime_ns for file in times}
    third = Partitions(4)
    dataset.save(third.partitions)
    assert third.computed == []


KILLED_WHILE_WRITING = """
import os, signal, sys
import polars as pl
from sce_pipeline.datasets import whole_files
from sce_pipeline.datasets.streamed_table import StreamedTableDataset as Table
folder = sys.argv[1]
first, second = (Table(filepath=f"{folder}/{name}.parquet") for name in "ab")
first.save(pl.DataFrame({"number": [1]}))
def kill(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
whole_files.os.fsync = kill
second.save(pl.DataFrame({"number": [2]}))
"""


def test_a_kill_while_a_partition_is_written_leaves_no_half_of_it(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
        timeout=60,
    )
    assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.unfinished"))) == 1
    dataset = make_dataset(tmp_path)
    assert load_all(dataset) == {"a": [1]}
    dataset.save({"b": pl.DataFrame({"number": [2]})})
    assert load_all(dataset) == {"a": [1], "b": [2]}


def test_a_table_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    dataset = StreamedTableDataset(filepath=str(tmp_path / "new/a.parquet"))
    assert not dataset.exists()
    dataset.save(pl.DataFrame({"number": [1]}))

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Exception, match="the disk is full"):
        dataset.save(pl.DataFrame({"number": [2]}))
    assert dataset.load().collect()["number"].to_list() == [1]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.parquet"]
