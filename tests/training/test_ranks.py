from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig
from walks import CCE_OPTIONS, N_ITEMS, NO_DROPOUT, train

from helpers import make_training
from sce_pipeline.models import build_model
from sce_pipeline.models.item_shards import initial_rows
from sce_pipeline.training import fit as fit_module
from sce_pipeline.training import ranks as ranks_module
from sce_pipeline.training.checkpoint import SHARED, CheckpointError, Checkpoints, State, locked
from sce_pipeline.training.item_table import ITEM_TABLE
from sce_pipeline.training.ranks import launch
from sce_pipeline.training.trainer import Trainer

logger = logging.getLogger("sce_pipeline.tests")
CPU = torch.device("cpu")


def talk(ranks, word):
    total = torch.tensor(float(ranks.rank + 1))
    ranks.add(total)
    assert total == 3
    assert ranks.first(ranks.is_first)
    assert not ranks.first(not ranks.is_first)
    assert not ranks.agree(ranks.is_first)
    logger.info("%s from rank %d", word, ranks.rank)


def fail(ranks):
    if ranks.rank == 1:
        raise ValueError("this rank does not want to")
    time.sleep(60)


def die_while_writing_to_the_log(ranks):
    if ranks.rank == 1:
        (handler,) = logging.getLogger("sce_pipeline").handlers
        handler.queue._wlock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def ask_the_launcher_to_end(ranks):
    if ranks.is_first:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def sit(ranks, folder):
    (folder / f"{ranks.rank}").write_text(str(os.getpid()))
    time.sleep(60)


def train_until_asked_apart(ranks, *arguments):
    """Ask the ranks to end, each one step later than the one before, and twice."""
    update = Trainer.update
    steps = []

    def watch(trainer):
        norm = update(trainer)
        steps.append(None)
        if len(steps) == 16 + ranks.rank:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return norm

    Trainer.update = watch
    fit_train(ranks, *arguments)


fit_train = fit_module.train


def build_as_shards_do(parameters, n_items, max_length):
    model = build_model(parameters, 1, max_length)
    rows = initial_rows(range(n_items), n_items, parameters.hidden_size, seed=5)
    model.item_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)
    return model


@pytest.fixture
def forked_ranks(monkeypatch):
    """Ranks begin without the seconds of imports that those launched elsewhere here spend."""

    def configure(**options):
        return LaunchConfig(**{**options, "start_method": "forkserver"})

    monkeypatch.setattr(ranks_module, "LaunchConfig", configure)


def test_ranks_add_agree_and_the_first_one_speaks(caplog):
    before = signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        launch(2, CPU, talk, "hello")
    assert signal.getsignal(signal.SIGINT) is before
    assert "hello from rank 0" in caplog.text
    assert "hello from rank 1" not in caplog.text


@pytest.mark.usefixtures("forked_ranks")
def test_a_failing_rank_ends_all_of_them_with_its_message():
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed: ValueError: this rank does not"):
        launch(2, CPU, fail)
    assert time.perf_counter() - started < 50


@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_killed_while_it_logs_hangs_nobody(monkeypatch):
    monkeypatch.setattr(ranks_module, "LAST_WORDS", 0.5)
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed: Signal 9"):
        launch(2, CPU, die_while_writing_to_the_log)


def test_the_systems_request_to_end_is_passed_on():
    with pytest.raises(SystemExit) as raised:
        launch(2, CPU, ask_the_launcher_to_end)
    assert raised.value.code == 128 + signal.SIGTERM


def test_ranks_end_with_their_launcher(tmp_path):
    code = (
        "import pathlib, torch; from test_ranks import sit\n"
        "from sce_pipeline.training.ranks import launch\n"
        f"launch(2, torch.device('cpu'), sit, pathlib.Path({str(tmp_path)!r}))"
    )
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as launcher:
        wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"))
        launcher.kill()
    found = [int((tmp_path / rank).read_text() or 0) for rank in "01"]
    wait_until(lambda: not any(map(is_running, found)))


def wait_until(true, seconds=30):
    end = time.perf_counter() + seconds
    while not true():
        assert time.perf_counter() < end
        time.sleep(0.05)


def is_running(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


@pytest.mark.usefixtures("forked_ranks")
def test_ranks_asked_in_different_steps_end_after_the_same_and_lose_nothing(tmp_path, monkeypatch):
    loss = {"name": "ce_minus", "n_negatives": 8, "exclude": "target", "impl": "auto"}
    loss |= {"shared": "token", "log_correction": True}
    options = {"devices": 2, "max_epochs": 3, "accumulation_steps": 2}
    weights, history = train(tmp_path / "undisturbed", loss, **options)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "train", train_until_asked_apart)
        with pytest.raises(RuntimeError, match=r"rank \d of 2 failed"):
            train(tmp_path / "asked", loss, **options)
    states = sorted(path for path in (tmp_path / "asked").iterdir() if path.name.isdigit())
    assert len(torch.load(states[-1] / SHARED)["epochs"]) == 1
    for rank in range(2):
        own = torch.load(states[-1] / f"rank_{rank}.pt")
        assert 3 <= len(own["measured"]) <= 4
        random = own["trainer"].pop("random")
        assert not own["best_weights"]
        assert not any(own["trainer"].values())  # all else is the first rank's to write
        assert random["cpu"].numel() > 0
    again, same_history = train(tmp_path / "asked", loss, **options)
    for epoch, other in zip(history["epochs"], same_history["epochs"], strict=True):
        for key in ("loss", "gradient_norm", "ndcg@10"):
            assert epoch[key] == other[key]
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.usefixtures("forked_ranks")
def test_ranks_that_outlive_their_launcher_for_a_moment_keep_the_folder(tmp_path):
    held = tmp_path / "ranks"
    message = f"CheckpointError: another run trains in {held}"
    with locked(held), pytest.raises(RuntimeError, match=message):
        train(tmp_path, {"name": "ce"}, devices=2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"training\.devices is 2, but there are 1 GPUs"):
        launch(2, torch.device("cuda"), fail)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("item_table", ["replicated", "sharded"])
def test_two_ranks_train_as_one_does(tmp_path, caplog, monkeypatch, item_table):
    loss = {"name": "cce", **CCE_OPTIONS, "logq_correction": True}
    options = {"max_epochs": 2, "model": NO_DROPOUT, "checkpoint_steps": 5}
    if item_table == "replicated":
        options["accumulation_steps"] = 2
    if item_table == "sharded":  # whose rows are drawn otherwise
        monkeypatch.setattr(fit_module, "build_model", build_as_shards_do)
    _, alone = train(tmp_path / "alone", loss, **options)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        weights, together = train(
            tmp_path / "two", loss, **options, devices=2, item_table=item_table
        )
    assert together["device"].startswith("2 × ")
    assert caplog.text.count("epoch 2  loss") == 1
    assert weights["item_embedding.weight"].shape == (N_ITEMS, 16)
    assert weights["item_embedding.weight"].isfinite().all()
    for epoch, other in zip(alone["epochs"], together["epochs"], strict=True):
        for key in ("loss", "gradient_norm", "ndcg@10"):
            assert other[key] == pytest.approx(epoch[key], rel=1e-3)


@pytest.mark.usefixtures("forked_ranks")
def test_a_damaged_shard_takes_all_ranks_back_to_the_state_before_and_loses_nothing(
    tmp_path, caplog
):
    loss = {"name": "cce", **CCE_OPTIONS}
    options = {"devices": 2, "item_table": "sharded", "max_epochs": 2, "checkpoint_steps": 5}
    weights, history = train(tmp_path, loss, **options)
    before, last = sorted(path for path in tmp_path.iterdir() if path.name.isdigit())
    shards = [torch.load(last / f"rank_{rank}.pt")["trainer"]["model"] for rank in range(2)]
    assert [len(shard[ITEM_TABLE]) for shard in shards] == [N_ITEMS // 2] * 2
    assert ITEM_TABLE not in torch.load(last / SHARED)["trainer"]["model"]
    file = last / "rank_1.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        again, same_history = train(tmp_path, loss, **options)
    assert f"passed over: {file}" in caplog.text
    assert f"which is whole, is taken: {before}" in caplog.text
    assert "going on after epoch 1 and 10 steps" in caplog.text
    for epoch, other in zip(history["epochs"], same_history["epochs"], strict=True):
        for key in ("loss", "gradient_norm", "ndcg@10"):
            assert epoch[key] == other[key]
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def leave_states(rank, folder, n_epochs):
    """Leave a state after each of some epochs, all of whose numbers are the epoch's."""
    checkpoints = Checkpoints(folder, {}, rank, ranks_module.Ranks(rank, 3, CPU).agree)
    for number in range(1, n_epochs + 1):
        epochs = [{"epoch": epoch, "ndcg@10": 1 / epoch} for epoch in range(1, number + 1)]
        rest = {"weight": torch.full((3,), float(number))}
        rows = {ITEM_TABLE: torch.full((2, 1), float(number))}
        shared = {"epochs": epochs, "best_weights": rest, "facts": {}}
        checkpoints.save(State(shared, {"best_weights": rows}))


@pytest.mark.parametrize("damaged", [SHARED, "rank_0.pt", "rank_2.pt"])
def test_shards_of_different_states_are_never_joined(tmp_path, three_ranks, damaged):
    changes = {"loss": {"name": "cce", **CCE_OPTIONS}, "devices": 3, "item_table": "sharded"}
    parameters = make_training(**changes, max_epochs=4)
    three_ranks.run(leave_states, tmp_path, 5)
    task = fit_module.Task({}, {}, tmp_path, {}, parameters, True)
    assert joined_numbers(task) == {5.0}
    (tmp_path / "000005" / damaged).unlink()
    assert joined_numbers(task) == {4.0}
    unfinished = task._replace(parameters=parameters.model_copy(update={"max_epochs": 5}))
    with pytest.raises(CheckpointError, match=r"its last state could not be left in .* or is dam"):
        fit_module._collect(unfinished)
    (tmp_path / "000004" / "rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; remove"):
        fit_module._collect(task)


def joined_numbers(task):
    weights, _ = fit_module._collect(task)
    assert weights[ITEM_TABLE].shape == (6, 1)
    return {float(number) for weight in weights.values() for number in weight.flatten()}
