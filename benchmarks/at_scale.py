"""Trains losses on synthetic logs of any number of items, beside the best ranking that there is.

    python benchmarks/at_scale.py --items 100000 --users 100000
    python benchmarks/at_scale.py --items 1000000 --users 500000 --losses cce sce --epochs 3
    python benchmarks/at_scale.py --users 20000 --history 1000 --max-length 1000 --batch-size 64
    python benchmarks/at_scale.py --models gru4rec --learning-rate 0.005 --output results.jsonl

The log is that of the pipeline synthetic, each user's last item the test target and the one before
it the validation target; all rankings are of the whole catalogue. What a model reaches is told as a
share of the best NDCG@10 from the history, which a ranker has that knows what is planted. A loss
may be given other values: rece:n_rounds=64,n_extra_chunks=8. Seconds are of training alone: the
median of the epochs, and all until the best one. Alike is the mean cosine of the hidden states of
any two test users: near 1, the model tells nobody apart. What fails is told, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted_log import Arrays, draw_sequences, plant
from presets import read_loss, read_presets

from sce_pipeline.evaluation.held_out import UserBlocks
from sce_pipeline.evaluation.metrics import measure
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.models import MODELS, Backbone, load_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.synthetic.protocols import measure_best
from sce_pipeline.training.fit import fit


def parameters_for(arguments: argparse.Namespace, model: str, loss: str) -> TrainingParameters:
    """Return the project's defaults with a backbone and a loss, as ``read_loss`` takes it."""
    values = read_presets("training")["_training"]
    network = read_presets("models")["model_presets"][model]
    network |= {"hidden_size": arguments.hidden_size, "dropout": arguments.dropout}
    values |= {"seed": arguments.seed, "loss": read_loss(loss), "model": network}
    values |= {"batch_size": arguments.batch_size, "max_epochs": arguments.epochs}
    values |= {"learning_rate": arguments.learning_rate}
    return TrainingParameters.model_validate(values)


def train(
    sequences: tuple[Arrays, ...], parameters: TrainingParameters, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train a backbone with a loss, rank the test users and return what both took and gave."""
    log, validation, test = sequences
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()  # what failed before may hold memory yet
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        weights, history = fit(log, validation, Path(folder) / "run", parameters, True)
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
    model = load_model(parameters.model, weights, int(log["max_length"][0]))
    model = model.cuda() if on_gpu else model
    rankings = rank_with_model(model, test, 10, True)
    counts = np.bincount(log["items"], minlength=int(log["n_items"][0])).astype(np.int32)
    popularity = {"users": counts, "n_users": np.array([len(log["users"])])}
    seconds = [epoch["training_seconds"] for epoch in history["epochs"]]
    return {
        "ndcg@10": measure(rankings, popularity, **settings)["ndcg@10"]["value"],
        "alike": mean_cosine(model, test),
        "epoch_seconds": statistics.median(seconds),
        "best_epoch": history["best_epoch"],
        "seconds_to_best": sum(seconds[: history["best_epoch"]]),
        "peak_mb": memory,
        **{fact: history[fact] for fact in ("n_tokens", "device", "precision")},
    }


@torch.inference_mode()
def mean_cosine(model: Backbone, test: Arrays) -> float:
    """Return the mean cosine of the hidden states of any two users, or of one with itself."""
    blocks = UserBlocks(test, filter_seen=False).to(model.item_embeddings.device)
    hidden = [model.encode_last(model.embed(block.items), block.packing) for block in blocks]
    return torch.nn.functional.normalize(torch.cat(hidden), dim=1).mean(dim=0).square().sum().item()


HEADER = (
    "model     loss                              NDCG@10  of the best  epoch s  best epoch"
    "  s to it  MB allocated  alike"
)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{row['model']:8}  {row['loss']:32}"
    if "failed" in row:
        return f"{name}  {row['failed']}"
    return (
        f"{name}  {row['ndcg@10']:7.4f}  {row['ndcg@10'] / row['best_ndcg@10']:11.1%}"
        f"  {row['epoch_seconds']:7.2f}  {row['best_epoch']:10}  {row['seconds_to_best']:7.1f}"
        f"  {row['peak_mb']:12,.0f}  {row['alike']:5.2f}"
    )


def main() -> None:
    """Read the command line, train and print a line for each backbone and loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--history", type=int, default=30, help="items of the median history")
    parser.add_argument("--models", nargs="+", default=["sasrec"], choices=MODELS)
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "ce_minus", "sce"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--test-users", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON lines, to which rows are added")
    arguments = parser.parse_args()
    tried = [
        (model, loss, parameters_for(arguments, model, loss))
        for model, loss in product(arguments.models, arguments.losses)
    ]
    world = plant(arguments)
    sequences = draw_sequences(world, arguments.test_users, arguments.max_length)
    settings = {"cutoffs": [10], "n_bootstrap": 100, "confidence": 0.95, "seed": arguments.seed}
    users = np.arange(arguments.test_users)
    found = measure_best(world, users, None, filter_seen=True, **settings)["leave_one_out"]
    best = found["history"]["ndcg@10"]["value"]
    rows = len(sequences[0]["items"])
    print(f"{arguments.items:,} items, {arguments.users:,} users, {rows:,} rows")
    print(f"best NDCG@10 {best:.4f}, knowing the user {found['latent']['ndcg@10']['value']:.4f}")
    print(HEADER)
    listed = {"models", "losses", "output"}
    asked = {name: value for name, value in vars(arguments).items() if name not in listed}
    for model, loss, parameters in tried:
        row = {"model": model, "loss": loss, **asked, "rows": rows, "best_ndcg@10": best}
        try:
            row |= train(sequences, parameters, settings)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"
        print(line(row), flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
