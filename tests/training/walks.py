"""Users who walk through a small catalogue, and runs that learn where they go."""

from __future__ import annotations

import numpy as np

from helpers import make_training
from sce_pipeline.training.fit import fit

N_ITEMS, MAX_LENGTH = 40, 8
SAMPLED = {"n_negatives": 16, "exclude": "history", "impl": "auto"}
CCE_OPTIONS = {
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "logq_correction": False,
    "skip_mass": 0.0,
    "impl": "auto",
}
SCE_OPTIONS = {
    "n_buckets": "auto",
    "bucket_size_x": "auto",
    "bucket_size_y": 16,
    "mix_x": True,
    "impl": "auto",
}
PARAMETERS_OF_LOSSES = [
    {"name": "ce"},
    {"name": "cce", **CCE_OPTIONS},
    {"name": "ce_minus", **SAMPLED, "shared": "sequence", "log_correction": True},
    *(
        {
            "name": "cce_minus",
            "n_negatives": 16,
            "shared": "token",
            "sampling": sampling,
            "log_correction": True,
            "impl": "auto",
        }
        for sampling in ("uniform", "popularity")
    ),
    {"name": "bce", **SAMPLED, "shared": "token"},
    {"name": "gbce", **SAMPLED, "shared": "token", "t": 0.75},
    {"name": "sce", **SCE_OPTIONS},
    {
        "name": "rece",
        "n_buckets": "auto",
        "n_extra_chunks": 1,
        "n_rounds": 4,
        "duplicate_correction": True,
        "impl": "auto",
    },
]


NO_DROPOUT = {
    "name": "sasrec",
    "hidden_size": 16,
    "n_blocks": 1,
    "n_heads": 1,
    "dropout": 0.0,
}


def make_sequences(n_users, seed):
    """Users who walk the catalogue in steps of one: the last item tells the next."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 12, n_users)
    offsets = np.cumsum([0, *lengths])
    starts = generator.integers(0, N_ITEMS, n_users)
    items = np.concatenate(
        [
            (start + np.arange(length)) % N_ITEMS
            for start, length in zip(starts, lengths, strict=True)
        ]
    ).astype(np.int32)
    shared = {
        "users": np.arange(n_users, dtype=np.int32),
        "items": items,
        "offsets": offsets,
        "n_items": np.array([N_ITEMS]),
        "max_length": np.array([MAX_LENGTH]),
    }
    train = {
        **shared,
        "window_starts": np.maximum(offsets[1:] - MAX_LENGTH - 1, offsets[:-1]),
        "window_stops": offsets[1:],
    }
    held_out = {**shared, "targets": (items[offsets[1:] - 1] + 1).astype(np.int32) % N_ITEMS}
    return train, held_out


def train(tmp_path, loss, **changes):
    train_sequences, _ = make_sequences(200, seed=0)
    _, validation_sequences = make_sequences(50, seed=1)
    parameters = make_training(loss=loss, **changes)
    return fit(train_sequences, validation_sequences, tmp_path, parameters, filter_seen=True)
