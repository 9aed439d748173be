from __future__ import annotations

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sce_pipeline.training.checkpoint import LOCK, WRITING, CheckpointError, Checkpoints, locked

IDENTITY = {"training": {"seed": 5, "model": {"dropout": 0.1}}, "train_sequences": "ab12"}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, IDENTITY)


def test_the_last_state_comes_back_and_two_are_kept(checkpoints):
    assert checkpoints.load() is None
    for epoch in range(1, 5):
        assert checkpoints.save({"epoch": epoch, "weights": torch.full((3,), float(epoch))})
    state = checkpoints.load()
    assert state["epoch"] == 4
    assert state["weights"].tolist() == [4, 4, 4]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["000003", "000004"]


def test_a_run_that_was_cut_off_while_writing_has_the_state_before(checkpoints):
    checkpoints.save({"epoch": 1})
    half = checkpoints.folder / WRITING
    half.mkdir()
    (half / "rank_0.pt").write_bytes(b"half of a state")
    assert checkpoints.load()["epoch"] == 1
    checkpoints.save({"epoch": 2})
    assert checkpoints.load()["epoch"] == 2


@pytest.mark.parametrize("left", [0, 1, 100, 1000, -1])
def test_a_truncated_state_is_passed_over_for_the_one_before(checkpoints, caplog, left):
    for epoch in (1, 2):
        checkpoints.save({"epoch": epoch, "weights": torch.zeros(1000)})
    file = checkpoints.folder / "000002" / "rank_0.pt"
    file.write_bytes(file.read_bytes()[:left])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load()["epoch"] == 1
    assert str(file) in caplog.text


def test_nothing_but_damaged_states_is_an_error_that_says_what_to_do(checkpoints):
    checkpoints.save({"epoch": 1})
    file = checkpoints.folder / "000001" / "rank_0.pt"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"can be read; remove the folder .*rank_0\.pt"):
        checkpoints.load()


def test_a_state_that_holds_code_is_not_run(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    checkpoints.save({"epoch": 1})
    torch.save(Evil(), checkpoints.folder / "000001" / "rank_0.pt")
    with pytest.raises(CheckpointError, match="can be read"):
        checkpoints.load()


def test_a_full_disk_is_a_warning_and_the_last_state_stays(checkpoints, caplog):
    checkpoints.save({"epoch": 1})
    # Every byte written to /dev/full fails as on a full disk.
    full = Checkpoints(checkpoints.folder, IDENTITY, agree=lambda ok: link(checkpoints) or ok)

    def link(checkpoints):
        file = checkpoints.folder / WRITING / "rank_0.pt"
        if not file.is_symlink():
            file.symlink_to("/dev/full")

    with caplog.at_level(logging.WARNING):
        assert not full.save({"epoch": 2, "weights": torch.zeros(10**6)})
    assert "No space left on device" in caplog.text
    assert checkpoints.load()["epoch"] == 1
    assert checkpoints.save({"epoch": 3})
    assert checkpoints.load()["epoch"] == 3


@pytest.mark.parametrize("failing", ["mkdir", "rename"])
def test_ranks_stay_in_step_when_the_folder_fails_the_first(tmp_path, monkeypatch, failing):
    barrier = threading.Barrier(2, timeout=20)
    votes = [True, True]

    def save(rank):
        def agree(true):
            votes[rank] = true
            barrier.wait()
            everybody = all(votes)
            barrier.wait()
            return everybody

        return Checkpoints(tmp_path, IDENTITY, rank, agree).save({"epoch": 1})

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(Path, failing, fail)
            assert list(pool.map(save, range(2))) == [False, False]
        assert list(pool.map(save, range(2))) == [True, True]
    assert Checkpoints(tmp_path, IDENTITY, 1).load() == {"epoch": 1}


def test_other_parameters_and_data_are_refused_with_the_differences(checkpoints):
    checkpoints.save({"epoch": 1})
    other = {"training": {"seed": 6, "model": {"dropout": 0.1}}, "train_sequences": "cd34"}
    with pytest.raises(CheckpointError) as raised:
        Checkpoints(checkpoints.folder, other).load()
    message = str(raised.value)
    assert "training.seed = 5 rather than 6" in message
    assert "train_sequences = 'ab12' rather than 'cd34'" in message
    assert "dropout" not in message
    assert f"{checkpoints.folder}" in message


def test_a_folder_is_one_runs_own(tmp_path):
    folder = tmp_path / "run"
    hold = (
        "import sys; from filelock import FileLock\n"
        f"with FileLock({str(folder / LOCK)!r}): print('held', flush=True); sys.stdin.read()"
    )
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another run trains in"), locked(folder):
            pass
        other.kill()  # the system unlocks what a killed run has locked
        other.wait()
        with locked(folder):
            pass


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    with pytest.raises(CheckpointError, match="cannot be written to"), locked(folder):
        pass
