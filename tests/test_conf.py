from __future__ import annotations

from itertools import cycle

import pytest
from kedro.config import OmegaConfigLoader
from omegaconf.errors import InterpolationResolutionError
from pydantic import ValidationError

from helpers import ROOT
from sce_pipeline.downloads.sources import SOURCES
from sce_pipeline.losses import LOSSES, build_loss
from sce_pipeline.models import MODELS, build_model
from sce_pipeline.parameters import (
    DataProcessingParameters,
    EvaluationParameters,
    RunParameters,
    SyntheticParameters,
    TrainingParameters,
)
from sce_pipeline.settings import CONFIG_LOADER_ARGS

EXPERIMENTS = sorted(path.name for path in (ROOT / "conf/experiments").iterdir())


def load(env=None, **runtime_params):
    return OmegaConfigLoader(
        str(ROOT / "conf"), env=env, runtime_params=runtime_params, **CONFIG_LOADER_ARGS
    )


def parse(config):
    parameters = config["parameters"]
    DataProcessingParameters.model_validate(parameters["data_processing"])
    EvaluationParameters.model_validate(parameters["evaluation"])
    SyntheticParameters.model_validate(parameters["synthetic"])
    return TrainingParameters.model_validate(parameters["training"])


PRESETS = load()["parameters"]["dataset_presets"]
DATASETS = sorted({str(preset): name for name, preset in PRESETS.items()}.values())
"""One for each preset, as some share theirs."""


def test_every_log_that_can_be_fetched_has_a_preset():
    assert set(SOURCES) <= set(PRESETS)


def test_no_data_set_has_values_of_a_loss():
    assert not any("loss" in preset.get("training", {}) for preset in PRESETS.values())


# So that each loss with one data set, and each data set with one loss, are all that can differ.
@pytest.mark.parametrize(
    ("dataset", "loss"),
    [
        *((DATASETS[0], loss) for loss in LOSSES),
        *zip([*DATASETS[1:], "a_log_without_a_preset"], cycle(LOSSES), strict=False),
    ],
)
def test_every_loss_goes_with_every_data_set(dataset, loss):
    training = parse(load(dataset=dataset, loss=loss, seed=7))
    assert training.loss.name == loss
    assert training.seed == 7
    assert build_loss(training.loss)


@pytest.mark.parametrize("dataset", [*DATASETS, "a_log_without_a_preset"])
def test_every_data_set_has_a_folder_for_each_loss(dataset):
    catalog = load(dataset=dataset, loss="gbce")["catalog"]
    assert f"/{dataset}/gbce/" in catalog["metrics"]["filepath"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", [*DATASETS, "a_log_without_a_preset"])
def test_every_model_goes_with_every_data_set(dataset, model):
    parameters = load(dataset=dataset, model=model)["parameters"]
    training = TrainingParameters.model_validate(parameters["training"])
    assert training.model.name == parameters["model"] == model
    assert type(build_model(training.model, 10, 5)) is MODELS[model]


def test_there_is_a_preset_for_each_model_and_the_first_is_the_default():
    parameters = load()["parameters"]
    assert list(parameters["model_presets"]) == list(MODELS)
    assert parameters["model"] == parameters["training"]["model"]["name"] == next(iter(MODELS))


@pytest.mark.parametrize("model", MODELS)
def test_a_models_values_are_its_presets_the_data_sets_and_the_command_lines(model):
    preset = load()["parameters"]["model_presets"][model]
    plain = parse(load(model=model, dataset="yelp")).model
    assert plain.model_dump() == preset
    beauty = parse(load(model=model, dataset="amazon_beauty")).model
    assert beauty.model_dump() == {**preset, "dropout": 0.6}
    changed = parse(
        load(model=model, dataset="amazon_beauty", training={"model": {"dropout": 0.2}})
    ).model
    assert changed.model_dump() == {**preset, "dropout": 0.2}


@pytest.mark.parametrize(
    ("name", "chosen", "elsewhere"),
    [
        ("model", "gru4rec", {"model": "bert4rec"}),
        ("loss", "bce", {"loss": "ce"}),
        ("seed", 3, {"seed": 4}),
    ],
)
def test_what_is_selected_must_be_what_is_in_force(name, chosen, elsewhere):
    def check(parameters):
        RunParameters.model_validate(
            {key: value for key, value in parameters.items() if not key.startswith("_")}
        )

    parameters = load(**{name: chosen})["parameters"]
    check(parameters)
    message = f"{name} is {elsewhere[name]!r} but training.{name} has {chosen!r}"
    with pytest.raises(ValidationError, match=message):
        check({**parameters, **elsewhere})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_the_loss_it_is_named_after(name):
    config = load(env=f"experiments/{name}")
    training = parse(config)
    globals_ = config["globals"]
    assert globals_["dataset"] in PRESETS
    assert name.removesuffix("_lean") == f"{globals_['dataset']}_{training.loss.name}"
    assert training.loss.name == globals_["loss"]
    assert f"/{globals_['dataset']}/{globals_['loss']}/" in config["catalog"]["metrics"]["filepath"]


def test_the_papers_amazon_beauty_experiment_has_its_parameters():
    config = load(env="experiments/amazon_beauty_sce")
    training = parse(config)
    assert training.loss.model_dump() == {
        "name": "sce",
        "n_buckets": 202,
        "bucket_size_x": 202,
        "bucket_size_y": 256,
        "mix_x": False,
        "impl": "auto",
    }
    assert (training.batch_size, training.patience, training.max_epochs) == (1024, 50, 300)
    assert (training.model.dropout, training.model.hidden_size, training.model.n_blocks) == (
        0.6,
        64,
        2,
    )
    assert (training.learning_rate, training.betas) == (0.001, (0.9, 0.98))
    assert config["parameters"]["data_processing"]["split"] == {"name": "leave_one_out"}
    assert config["parameters"]["data_processing"]["max_length"] == 200


def test_the_rece_papers_amazon_beauty_experiment_has_its_parameters():
    training = parse(load(env="experiments/amazon_beauty_rece"))
    assert training.loss.model_dump() == {
        "name": "rece",
        "n_buckets": 907,
        "n_extra_chunks": 8,
        "n_rounds": 64,
        "duplicate_correction": True,
        "impl": "auto",
    }
    assert (training.batch_size, training.patience, training.max_epochs) == (4096, 10, 300)
    assert (training.model.dropout, training.model.hidden_size) == (0.5, 256)


def test_the_command_line_wins_over_an_experiment_over_a_preset_over_the_defaults():
    assert parse(load(dataset="unknown")).batch_size == 128
    assert parse(load(dataset="amazon_beauty")).batch_size == 1024
    assert parse(load(env="experiments/yelp_bce")).batch_size == 256
    changed = load(
        env="experiments/yelp_bce", training={"batch_size": 3, "loss": {"shared": "batch"}}
    )
    training = parse(changed)
    assert (training.batch_size, training.loss.n_negatives, training.loss.shared) == (
        3,
        256,
        "batch",
    )


def test_every_data_set_can_be_split_every_way():
    for dataset in DATASETS:
        for split in ("temporal", "temporal_disjoint", "leave_one_out"):
            parse(load(dataset=dataset, split=split))


@pytest.mark.parametrize("selection", [{"loss": "sec"}, {"model": "gru"}, {"split": "random"}])
def test_an_unknown_preset_is_refused_with_those_that_exist(selection):
    (name,) = selection.values()
    with pytest.raises(InterpolationResolutionError, match=f"no preset '{name}'; choose one of"):
        load(**selection)["parameters"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"learning_rat": 0.1}},
        {"training": {"learning_rate": -1}},
        {"training": {"batch_size": 0}},
        {"training": {"loss": {"n_negatives": 4}}},
        {"training": {"loss": {"n_buckets": "many"}}},
        {"training": {"model": {"dropout": 1.0}}},
        {"training": {"model": {"n_heads": 5}}},
        {"training": {"model": {"n_layers": 2}}},
        {"model": "gru4rec", "training": {"model": {"n_layers": 0}}},
        {"model": "gru4rec", "training": {"model": {"n_heads": 1}}},
        {"model": "bert4rec", "training": {"model": {"n_heads": 5}}},
        {"model": "bert4rec", "training": {"model": {"mask_probability": 0}}},
        {"model": "bert4rec", "training": {"model": {"last_mask_probability": 1.1}}},
        {"training": {"batch_size": 7, "devices": 4, "accumulation_steps": 2}},
        {"data_processing": {"stride": 51}},
        {"data_processing": {"split": {"quantile": 1.5}}},
        {"data_processing": {"filters": {"min_users_per_item": 0}}},
        {"evaluation": {"cutoffs": []}},
        {"evaluation": {"confidence": 95}},
        {"evaluation": {"cutoffs": [10, 5, 10]}},
        {"evaluation": {"cutoffs": [10**9]}},
    ],
    ids=str,
)
def test_a_misspelt_or_senseless_parameter_is_refused(changes):
    with pytest.raises(ValidationError):
        parse(load(**changes))


def test_a_validation_cut_must_precede_the_test_cut():
    temporal = {"split": "temporal", "dataset": "a_log_without_a_preset"}
    with pytest.raises(ValidationError, match=r"between 0 and quantile = 0\.95, got 0\.97"):
        parse(load(**temporal, data_processing={"split": {"validation_quantile": 0.97}}))
    with pytest.raises(ValidationError, match=r"set it when quantile is 0\.5 or less"):
        parse(load(**temporal, data_processing={"split": {"quantile": 0.4}}))
