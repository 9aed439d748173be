"""Trains losses on synthetic logs of any number of items, beside the best ranking that there is.

    python benchmarks/at_scale.py --items 100000 --users 100000
    python benchmarks/at_scale.py --items 1000000 --users 500000 --losses cce sce --epochs 3

The log is that of the pipeline synthetic, each user's last item the test target and the one before
it the validation target; all rankings are of the whole catalogue. What a model reaches is told as a
share of the best NDCG@10 from the history, which a ranker has that knows what is planted. A loss
may be given other values: rece:n_rounds=64,n_extra_chunks=8.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from presets import read_loss, read_presets

from sce_pipeline.evaluation.metrics import measure
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.models import load_model
from sce_pipeline.parameters import SyntheticParameters, TrainingParameters
from sce_pipeline.synthetic.histories import draw_histories
from sce_pipeline.synthetic.protocols import measure_best
from sce_pipeline.synthetic.world import World
from sce_pipeline.training.fit import fit

USERS_AT_ONCE = 16_384
Arrays = dict[str, np.ndarray]


def plant(arguments: argparse.Namespace) -> World:
    """Return a world of the size that the command line asks for."""
    values = read_presets("synthetic")["_synthetic"]
    values |= {"seed": arguments.seed, "n_users": arguments.users, "n_items": arguments.items}
    values |= {"n_clusters": arguments.clusters, "oracle_users": arguments.test_users}
    return World(SyntheticParameters.model_validate(values))


def draw_sequences(world: World, n_test_users: int, max_length: int) -> tuple[Arrays, ...]:
    """Draw training, validation and test sequences, as the pipeline's own arrays.

    The held-out users are the first ones: ranking a million users over a million items takes long.
    """
    n_users = world.parameters.n_users
    places, lengths = [], []
    for first in range(0, n_users, USERS_AT_ONCE):
        histories = draw_histories(world, np.arange(first, min(first + USERS_AT_ONCE, n_users)))
        places.append(world.item_ids[histories.places])
        lengths.append(np.diff(histories.offsets))
    items = np.concatenate(places)
    offsets = np.concatenate([[0], np.concatenate(lengths).cumsum()])
    shared = {
        "n_items": np.array([world.parameters.n_items]),
        "max_length": np.array([max_length]),
    }
    kept = np.ones(len(items), dtype=bool)
    kept[offsets[1:] - 1] = kept[offsets[1:] - 2] = False
    ends = np.concatenate([[0], (np.diff(offsets) - 2).cumsum()])
    starts, stops = [], []
    for first, last in pairwise(ends):
        cuts = np.arange(last, first + 1, -max_length)
        stops.append(cuts)
        starts.append(np.maximum(cuts - max_length - 1, first))
    train = {
        "items": items[kept],
        "offsets": ends,
        "users": np.arange(n_users, dtype=np.int32),
        "window_starts": np.concatenate(starts),
        "window_stops": np.concatenate(stops),
        **shared,
    }
    return train, *(hold_out(items, offsets, n_test_users, back) | shared for back in (2, 1))


def hold_out(items: np.ndarray, offsets: np.ndarray, n_users: int, back: int) -> Arrays:
    """Return the first users' histories before their item ``back`` from the end, the target."""
    targets = offsets[1 : n_users + 1] - back
    rows = [items[first:last] for first, last in zip(offsets[:n_users], targets, strict=True)]
    return {
        "users": np.arange(n_users, dtype=np.int32),
        "items": np.concatenate(rows),
        "offsets": np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        "targets": items[targets],
    }


def parameters_for(arguments: argparse.Namespace, loss: str) -> TrainingParameters:
    """Return the project's defaults with a loss, as ``read_loss`` takes it."""
    values = read_presets("training")["_training"]
    model = read_presets("models")["model_presets"]["sasrec"]
    model |= {"hidden_size": arguments.hidden_size, "dropout": arguments.dropout}
    values |= {"seed": arguments.seed, "loss": read_loss(loss), "model": model}
    values |= {"batch_size": arguments.batch_size, "max_epochs": arguments.epochs}
    return TrainingParameters.model_validate(values)


def main() -> None:
    """Read the command line, train and print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "ce_minus", "sce"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--test-users", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    world = plant(arguments)
    train, validation, test = draw_sequences(world, arguments.test_users, arguments.max_length)
    settings = {"cutoffs": [10], "n_bootstrap": 100, "confidence": 0.95, "seed": arguments.seed}
    users = np.arange(arguments.test_users)
    found = measure_best(world, users, None, filter_seen=True, **settings)["leave_one_out"]
    best = found["history"]["ndcg@10"]["value"]
    print(f"{arguments.items:,} items, {arguments.users:,} users, {len(train['items']):,} rows")
    print(f"best NDCG@10 {best:.4f}, knowing the user {found['latent']['ndcg@10']['value']:.4f}")
    print(
        "loss                              NDCG@10  of the best  epoch s  best epoch  MB allocated"
    )
    for loss in arguments.losses:
        parameters = parameters_for(arguments, loss)
        with tempfile.TemporaryDirectory() as folder:
            weights, history = fit(train, validation, Path(folder) / "run", parameters, True)
        memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
        model = load_model(parameters.model, weights, arguments.max_length)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            model = model.cuda()
        rankings = rank_with_model(model, test, 10, True)
        counts = np.bincount(train["items"], minlength=arguments.items).astype(np.int32)
        popularity = {"users": counts, "n_users": np.array([arguments.users])}
        reached = measure(rankings, popularity, **settings)["ndcg@10"]["value"]
        seconds = statistics.median(e["training_seconds"] for e in history["epochs"])
        print(
            f"{loss:32}  {reached:.4f}  {reached / best:11.1%}  {seconds:7.2f}"
            f"  {history['best_epoch']:10}  {memory:12,.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
