"""Nodes of the pipeline of exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from sce_pipeline import __version__
from sce_pipeline.parameters import ExportParameters
from sce_pipeline.provenance import fingerprint_texts
from sce_pipeline.recommendation.bundle import Bundle
from sce_pipeline.recommendation.card import write_card
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.index_quality import index_items
from sce_pipeline.training_record import TrainingRecord

Partitions = dict[str, Callable[[], Any]]


def describe_model(
    model_weights: dict[str, Tensor],
    training_history: dict[str, Any],
    measured_versions: Partitions,
    items: pl.DataFrame,
    dataset: str,
) -> dict[str, Any]:
    """Put together what is known of the weights that are loaded.

    Raises:
        ValueError: They were trained on other items.
    """
    record = TrainingRecord(training_history)
    record.check_items(fingerprint_texts(items.sort("item")["itemid"]), "items")
    measured = measured_versions.get(record.version)
    return {
        "dataset": dataset,
        "weights_version": record.version,
        "sce_pipeline": __version__,
        "model": training_history["parameters"]["model"],
        "max_length": record.max_length,
        "training": training_history["parameters"],
        "data_processing": training_history["data_processing"],
        "best_epoch": training_history["best_epoch"],
        "n_parameters": sum(values.numel() for values in model_weights.values()),
        "metrics": measured() if measured else None,
    }


def bundle_recommender(
    model_weights: dict[str, Tensor],
    items: pl.DataFrame,
    model_facts: dict[str, Any],
    export: ExportParameters,
    held_out_sequences: Partitions,
) -> Bundle:
    """Put weights, items, facts and the card together, and what else is asked for.

    Raises:
        ModuleNotFoundError: An index needs faiss, which is not installed.
        ValueError: There are no held-out histories to measure an index on.
    """
    items = items.sort("item")
    catalogue = Catalogue(items["itemid"].to_list(), items["title"].to_list())
    facts = {**model_facts, "n_items": len(items)}
    index = None
    if export.index is not None:
        model = Bundle(model_weights, catalogue, facts, card="").build()
        index, facts["index"] = index_items(model, _test_users(held_out_sequences), export.index)
    card = write_card(facts, export.onnx)
    return Bundle(model_weights, catalogue, facts, card, export.onnx, index)


def _test_users(held_out_sequences: Partitions) -> dict[str, np.ndarray]:
    if "test" not in held_out_sequences:
        raise ValueError(
            "export.index is measured on the histories of test users, but there is no "
            "test_sequences.safetensors: run the pipeline data_processing, or set it to null"
        )
    return held_out_sequences["test"]()
