from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro.validation.type_extractor import TypeExtractor

from helpers import make_data_processing, make_training
from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.models import build_model
from sce_pipeline.parameters import (
    DataProcessingParameters,
    EvaluationParameters,
)
from sce_pipeline.pipelines.evaluation import create_pipeline
from sce_pipeline.pipelines.evaluation.nodes import rank_by_popularity, rank_items
from sce_pipeline.provenance import (
    ITEM_STAMP,
    WEIGHTS_STAMP,
    read_item_stamp,
    stamp,
    stamp_items,
)

N_ITEMS = 20

RANKED_WITH = (
    *("model_weights", "training_history", "test_sequences"),
    *("params:evaluation", "params:data_processing"),
)


@pytest.fixture
def training():
    model = {"name": "sasrec", "hidden_size": 8, "n_blocks": 1, "n_heads": 2, "dropout": 0.1}
    return make_training(model=model)


@pytest.fixture
def evaluation():
    return EvaluationParameters(
        cutoffs=(1, 5),
        filter_seen=True,
        n_bootstrap=50,
        confidence=0.9,
        seed=0,
        accelerator="cpu",
    )


@pytest.fixture
def data_processing():
    return make_data_processing()


@pytest.fixture
def inputs(training, evaluation, data_processing):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, size=30)
    sequences = {
        "users": generator.permutation(30).astype(np.int32),
        "items": generator.integers(N_ITEMS, size=lengths.sum()).astype(np.int32),
        "offsets": np.cumsum([0, *lengths]),
        "targets": generator.integers(N_ITEMS, size=30).astype(np.int32),
        "n_items": np.array([N_ITEMS]),
        "max_length": np.array([4]),
        **stamp(data_processing),
        **stamp_items(f"i{number}" for number in range(N_ITEMS)),
    }
    history = {
        "parameters": training.model_dump(mode="json"),
        "data_processing": data_processing.model_dump(mode="json"),
        ITEM_STAMP: read_item_stamp(sequences),
        "version": "v1",
    }
    users = generator.integers(1, 40, size=N_ITEMS).astype(np.int32)
    return {
        "model_weights": build_model(training.model, N_ITEMS, 4).state_dict(),
        "training_history": history,
        "test_sequences": sequences,
        "item_popularity": {"users": users, "n_users": np.array([40])},
        "params:evaluation": evaluation,
        "params:data_processing": data_processing,
    }


def rank(inputs):
    """Rank by the model alone."""
    return rank_items(**{name.removeprefix("params:"): inputs[name] for name in RANKED_WITH})


def make_again(inputs, **changes):
    """Put test sequences of other parameters in place of those the weights were trained beside."""
    data_processing = make_data_processing(**changes)
    inputs["params:data_processing"] = data_processing
    length = np.array([data_processing.max_length])
    inputs["test_sequences"] |= {"max_length": length, **stamp(data_processing)}


def run(inputs):
    datasets = {name: MemoryDataset(data) for name, data in inputs.items()}
    return SequentialRunner().run(create_pipeline(), DataCatalog(datasets))["metrics"].load()


def test_the_stage_ranks_and_measures_model_and_popularity(inputs, evaluation, caplog):
    with caplog.at_level(logging.INFO, logger="sce_pipeline.pipelines.evaluation.nodes"):
        metrics = run(inputs)
    sequences = inputs["test_sequences"]
    by_model = rank(inputs)
    by_popularity = rank_by_popularity(inputs["item_popularity"], sequences, evaluation)
    assert by_model["top_items"].shape == by_popularity["top_items"].shape == (30, 5)
    for rankings, name in ((by_model, "model"), (by_popularity, "popularity")):
        hits = (rankings["target_ranks"] <= 5).mean()
        assert metrics[name]["hr@5"]["value"] == pytest.approx(hits)
        in_top = (rankings["top_items"] == rankings["targets"][:, None]).any(axis=1)
        np.testing.assert_array_equal(in_top, rankings["target_ranks"] <= 5)
    assert metrics["model"]["ndcg@5"] != metrics["popularity"]["ndcg@5"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    (message,) = (record.getMessage() for record in caplog.records if record.name.endswith("nodes"))
    assert f"NDCG@5 {metrics['model']['ndcg@5']['value']:.4f}" in message
    assert f"{metrics['model']['n_repeated_targets']} of them" in message
    assert "[" not in message


def test_the_order_of_the_users_changes_no_metric(inputs):
    metrics = run(inputs)
    sequences = inputs["test_sequences"]
    order = np.random.default_rng(1).permutation(30)
    histories = np.split(sequences["items"], sequences["offsets"][1:-1])
    inputs["test_sequences"] = sequences | {
        "users": sequences["users"][order],
        "targets": sequences["targets"][order],
        "items": np.concatenate([histories[row] for row in order]),
        "offsets": np.cumsum([0, *(len(histories[row]) for row in order)]),
    }
    assert run(inputs) == metrics


def test_seen_items_come_back_without_the_filter(inputs, evaluation):
    inputs["params:evaluation"] = evaluation.model_copy(update={"filter_seen": False})
    assert run(inputs)["model"]["n_repeated_targets"] == 0


def test_weights_of_another_catalogue_are_an_error(inputs, training):
    inputs["model_weights"] = build_model(training.model, N_ITEMS + 1, 4).state_dict()
    with pytest.raises(ValueError, match="the sequences are of 20 items, but 21"):
        rank(inputs)


def test_sequences_made_with_other_parameters_are_an_error(inputs):
    inputs["params:data_processing"] = make_data_processing(max_length=5)
    with pytest.raises(ValueError, match=r"data_processing\.max_length = 4 rather than 5; run"):
        rank(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 5}, "max_length = 4 rather than 5"),
        (
            {"split": {"name": "temporal", "quantile": 0.8, "train_users": "disjoint"}},
            "split.quantile = 0.9 rather than 0.8",
        ),
        (
            {"filters": {"min_users_per_item": 1, "min_items_per_user": 3, "iterate": False}},
            "filters.min_items_per_user = 1 rather than 3",
        ),
        (
            {"columns": {"user": "account", "item": "itemid", "timestamp": "timestamp"}},
            "columns.user = 'userid' rather than 'account'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_that_may_know_the_targets_are_an_error(inputs, changes, message):
    make_again(inputs, **changes)
    with pytest.raises(ValueError, match="trained on data with data_processing") as error:
        rank(inputs)
    for part in (
        "the weights v1 of loss ce were trained",
        f"{message} as in test_sequences",
        "run the pipeline data_processing with the parameters of the weights",
    ):
        assert part in str(error.value)


def test_other_training_windows_and_titles_leave_test_users_as_they_are(inputs):
    before = rank(inputs)["target_ranks"]
    make_again(inputs, stride=2, item_columns={"item": "id", "title": "name"})
    np.testing.assert_array_equal(rank(inputs)["target_ranks"], before)


def test_rankings_say_which_items_they_number(inputs):
    assert read_item_stamp(rank(inputs)) == read_item_stamp(inputs["test_sequences"])


def test_rankings_say_which_weights_ranked(inputs):
    assert rank(inputs)[WEIGHTS_STAMP].tobytes() == b"v1"


def test_weights_of_other_items_are_an_error(inputs):
    trained = read_item_stamp(inputs["test_sequences"])
    others = stamp_items(f"i{number}" for number in reversed(range(N_ITEMS)))
    inputs["test_sequences"] |= others
    with pytest.raises(ValueError, match="trained on other items than those of now") as error:
        rank(inputs)
    for part in (
        "the weights v1 of loss ce",
        f"{trained} in training_history.json of the version v1",
        f"{read_item_stamp(others)} in test_sequences",
        "train again, or restore the log",
    ):
        assert part in str(error.value)


def test_kedro_checks_the_parameters_and_names_stay_plain():
    pipeline = create_pipeline()
    types = TypeExtractor({"evaluation": pipeline}).extract_types_from_pipelines()
    assert types == {
        "evaluation": EvaluationParameters,
        "data_processing": DataProcessingParameters,
    }
    assert pipeline.inputs() == {
        "model_weights",
        "training_history",
        "test_sequences",
        "item_popularity",
        "params:evaluation",
        "params:data_processing",
    }
    assert pipeline.outputs() == {"metrics"}
    assert {node.namespace for node in pipeline.nodes} == {"evaluation"}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_device_is_the_one_asked_for(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device("cpu", "evaluation.accelerator").type == "cpu"
    assert choose_device("auto", "evaluation.accelerator").type == ("cuda" if has_gpu else "cpu")
    if has_gpu:
        assert choose_device("gpu", "evaluation.accelerator").type == "cuda"
    else:
        with pytest.raises(ValueError, match=r"evaluation\.accelerator is gpu"):
            choose_device("gpu", "evaluation.accelerator")
