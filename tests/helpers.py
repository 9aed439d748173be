from __future__ import annotations

from pathlib import Path

import numpy as np

from sce_pipeline.parameters import DataProcessingParameters, TrainingParameters

ROOT = Path(__file__).parents[1]


SMALL_RUN = {
    "dataset": "walk",
    "split": "leave_one_out",
    "data_processing": {"max_length": 8, "filters": {"min_items_per_user": 2}},
    "training": {
        "model": {"hidden_size": 8, "n_blocks": 1},
        "batch_size": 32,
        "max_epochs": 2,
        "accelerator": "cpu",
    },
    "evaluation": {"accelerator": "cpu", "n_bootstrap": 5},
}
"""Parameters of a run on a log called walk, as short as can be."""


def make_data_processing(**changes):
    values = {
        "columns": {"user": "userid", "item": "itemid", "timestamp": "timestamp"},
        "item_columns": {"item": "itemid", "title": "title"},
        "filters": {"min_users_per_item": 1, "min_items_per_user": 1, "iterate": False},
        "split": {"name": "temporal", "quantile": 0.9, "train_users": "disjoint"},
        "max_length": 4,
        "stride": None,
    }
    return DataProcessingParameters.model_validate({**values, **changes})


def make_training(**changes):
    values = {
        "seed": 5,
        "model": {
            "name": "sasrec",
            "hidden_size": 16,
            "n_blocks": 1,
            "n_heads": 1,
            "dropout": 0.1,
        },
        "loss": {"name": "ce"},
        "batch_size": 16,
        "batch_tokens": None,
        "accumulation_steps": 1,
        "learning_rate": 0.01,
        "betas": (0.9, 0.98),
        "max_epochs": 6,
        "patience": 6,
        "checkpoint_steps": 1000,
        "accelerator": "cpu",
        "devices": 1,
        "item_table": "replicated",
        "precision": "32-true",
        "compile": False,
    }
    return TrainingParameters.model_validate({**values, **changes})


def make_log(n_users=60, n_items=30, length=24, seed=0):
    """Rows of users who walk the catalogue in steps of one, in overlapping stretches of time."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(n_users):
        start = generator.integers(n_items)
        times = np.sort(generator.integers(0, 1000, length)) + 40 * user
        rows += [
            (f"u{user}", f"i{(start + step) % n_items}", int(1_500_000_000 + 60 * time))
            for step, time in enumerate(times)
        ]
    return rows
