from __future__ import annotations

import logging
import signal
import time

import pytest
import torch
from walks import CCE_OPTIONS, N_ITEMS, NO_DROPOUT, train

from sce_pipeline.models import build_model
from sce_pipeline.models.item_shards import initial_rows
from sce_pipeline.training import fit as fit_module
from sce_pipeline.training.ranks import launch

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


def build_as_shards_do(parameters, n_items, max_length):
    model = build_model(parameters, 1, max_length)
    rows = initial_rows(range(n_items), n_items, parameters.hidden_size, seed=5)
    model.item_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)
    return model


def test_ranks_add_agree_and_the_first_one_speaks(caplog):
    before = signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        launch(2, CPU, talk, "hello")
    assert signal.getsignal(signal.SIGINT) is before
    assert "hello from rank 0" in caplog.text
    assert "hello from rank 1" not in caplog.text


def test_a_failing_rank_ends_all_of_them_with_its_message():
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed: ValueError: this rank does not"):
        launch(2, CPU, fail)
    assert time.perf_counter() - started < 50


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"training\.devices is 2, but there are 1 GPUs"):
        launch(2, torch.device("cuda"), fail)


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
