from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sce_pipeline.training.checkpoint import (
    LOCK,
    SHARED,
    WRITING,
    CheckpointError,
    Checkpoints,
    State,
    locked,
)
from sce_pipeline.training.ranks import Ranks

IDENTITY = {"training": {"seed": 5, "model": {"dropout": 0.1}}, "train_sequences": "ab12"}


def state_of(epoch, **own):
    return State({"epoch": epoch, "weights": torch.full((1000,), float(epoch))}, own)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, IDENTITY)


def test_the_last_state_comes_back_and_two_are_kept(checkpoints):
    assert checkpoints.load() is None
    for epoch in range(1, 5):
        assert checkpoints.save(state_of(epoch, random=torch.tensor([epoch])))
    shared, own = checkpoints.load()
    assert shared.keys() == {"epoch", "weights"}
    assert shared["epoch"] == 4
    assert torch.equal(shared["weights"], torch.full((1000,), 4.0))
    assert own == {"random": torch.tensor([4])}
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["000003", "000004"]


def test_a_run_that_was_cut_off_while_writing_has_the_state_before(checkpoints):
    checkpoints.save(state_of(1))
    half = checkpoints.folder / WRITING
    half.mkdir()
    (half / "rank_0.pt").write_bytes(b"half of a state")
    assert checkpoints.load().shared["epoch"] == 1
    checkpoints.save(state_of(2))
    assert checkpoints.load().shared["epoch"] == 2


@pytest.mark.parametrize("name", [SHARED, "rank_0.pt"])
@pytest.mark.parametrize("left", [0, 1, 100, 1000, -1])
def test_a_truncated_state_is_passed_over_for_the_one_before(checkpoints, caplog, left, name):
    for epoch in (1, 2):
        checkpoints.save(state_of(epoch, random=torch.zeros(1000)))
    file = checkpoints.folder / "000002" / name
    file.write_bytes(file.read_bytes()[:left])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load().shared["epoch"] == 1
    assert str(file) in caplog.text
    assert f"is taken: {checkpoints.folder / '000001'}" in caplog.text


@pytest.mark.parametrize("name", [SHARED, "rank_0.pt"])
def test_nothing_but_damaged_states_is_an_error_that_says_what_to_do(checkpoints, name):
    checkpoints.save(state_of(1))
    file = checkpoints.folder / "000001" / name
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"can be read; remove the folder .*{name}"):
        checkpoints.load()


@pytest.mark.parametrize("name", [SHARED, "rank_0.pt"])
def test_a_state_that_holds_code_is_not_run(checkpoints, name):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    checkpoints.save(state_of(1))
    torch.save(Evil(), checkpoints.folder / "000001" / name)
    with pytest.raises(CheckpointError, match="can be read"):
        checkpoints.load()


def test_a_full_disk_is_a_warning_and_the_last_state_stays(checkpoints, caplog):
    checkpoints.save(state_of(1))
    # Every byte written to /dev/full fails as on a full disk.
    full = Checkpoints(checkpoints.folder, IDENTITY, agree=lambda ok: link(checkpoints) or ok)

    def link(checkpoints):
        file = checkpoints.folder / WRITING / "rank_0.pt"
        if not file.is_symlink():
            file.symlink_to("/dev/full")

    with caplog.at_level(logging.WARNING):
        assert not full.save(State({"epoch": 2}, {"weights": torch.zeros(10**6)}))
    assert "No space left on device" in caplog.text
    assert checkpoints.load().shared["epoch"] == 1
    assert checkpoints.save(state_of(3))
    assert checkpoints.load().shared["epoch"] == 3


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

        return Checkpoints(tmp_path, IDENTITY, rank, agree).save(state_of(1))

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(Path, failing, fail)
            assert list(pool.map(save, range(2))) == [False, False]
        assert list(pool.map(save, range(2))) == [True, True]
    for rank in range(2):
        assert Checkpoints(tmp_path, IDENTITY, rank).load().shared["epoch"] == 1


def checkpoints_of(rank, folder):
    ranks = Ranks(rank, 3, torch.device("cpu"))
    return Checkpoints(folder, IDENTITY, rank, ranks.agree)


def save_two(rank, folder):
    checkpoints = checkpoints_of(rank, folder)
    return [checkpoints.save(state_of(epoch, rows=10 * epoch + rank)) for epoch in (1, 2)]


def load_last(rank, folder):
    """The last state's epoch and this rank's rows, or the error, and what was logged."""
    with log_of("sce_pipeline.training.checkpoint") as log:
        try:
            shared, own = checkpoints_of(rank, folder).load()
        except CheckpointError as error:
            return str(error), log
    return (shared["epoch"], own["rows"]), log


@contextmanager
def log_of(name):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def put_in_the_one_before(file):
    shutil.copy(file.parents[1] / "000001" / file.name, file)


def test_the_first_rank_writes_what_is_shared_and_each_what_is_its_own(three_ranks, tmp_path):
    assert three_ranks.run(save_two, tmp_path) == [[True, True]] * 3
    files = {file.name: file.stat().st_size for file in (tmp_path / "000002").iterdir()}
    assert files.keys() == {SHARED, "rank_0.pt", "rank_1.pt", "rank_2.pt"}
    shared = files.pop(SHARED)
    assert all(size < shared / 2 for size in files.values())
    for rank, (found, log) in enumerate(three_ranks.run(load_last, tmp_path)):
        assert found == (2, 20 + rank)
        assert log == []


@pytest.mark.parametrize("name", [SHARED, "rank_0.pt", "rank_1.pt"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, put_in_the_one_before])
def test_all_ranks_take_the_newest_state_that_is_whole_on_all(three_ranks, tmp_path, damage, name):
    three_ranks.run(save_two, tmp_path)
    file = tmp_path / "000002" / name
    damage(file)
    answers = three_ranks.run(load_last, tmp_path)
    assert [found for found, _ in answers] == [(1, 10), (1, 11), (1, 12)]
    for rank, (_, log) in enumerate(answers):
        blames = [f"passed over: {file}" in message for message in log]
        assert any(blames) == (name in (SHARED, f"rank_{rank}.pt"))
        older = f"an older checkpoint, which is whole, is taken: {tmp_path / '000001'}"
        assert (older in log) == (rank == 0)


def test_no_state_that_all_ranks_can_read_is_an_error_on_all(three_ranks, tmp_path):
    three_ranks.run(save_two, tmp_path)
    truncate(tmp_path / "000002" / "rank_1.pt")
    (tmp_path / "000001" / "rank_2.pt").unlink()
    messages = [found for found, _ in three_ranks.run(load_last, tmp_path)]
    expected = f"no checkpoint in {tmp_path} can be read; remove the folder to start afresh"
    assert all(message.startswith(expected) for message in messages)
    assert f"{tmp_path / '000002'}: unreadable on another rank" in messages[0]
    assert f"{tmp_path / '000002' / 'rank_1.pt'}: " in messages[1]
    assert f"{tmp_path / '000001' / 'rank_2.pt'}: " in messages[2]


def test_other_parameters_and_data_are_refused_with_the_differences(checkpoints):
    checkpoints.save(state_of(1))
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
