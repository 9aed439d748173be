"""Looks into what losses keep of the exact cross-entropy, as training goes on.

    kedro run --pipelines data_processing --params dataset=amazon_beauty
    python benchmarks/kept_mass.py --epochs 1 10 100
    python benchmarks/kept_mass.py --trained-with cce --losses sce rece rece:n_rounds=64

For each number of epochs a model is trained with the data set's preset, and the best of its epochs
looked at, without dropout, in one batch of training: which tokens a loss covers, which items are a
negative of any token, and how much of the exact softmax lies on the items that a token is compared
with. For SCE this is that of the bucket where its loss is largest; pooled, that of all its buckets.
The cosines are those of the gradients with the exact ones. A loss may be given other values:
sce:n_buckets=400.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from ablations import ROOT, parameters_for
from presets import read_loss
from safetensors.numpy import load_file

from sce_pipeline.diagnostics import Inspection, inspect_loss
from sce_pipeline.losses import build_loss
from sce_pipeline.models import Backbone, load_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.batches import TrainingBatches
from sce_pipeline.training.fit import fit

LOSSES = ("sce", "sce:n_buckets=400", "sce:bucket_size_y=1024", "sce:mix_x=true", "rece")

Arrays = dict[str, np.ndarray]


def with_loss(arguments: argparse.Namespace, loss: str, **changes: int) -> TrainingParameters:
    """Return the data set's training parameters with a loss, as ``read_loss`` takes it."""
    return parameters_for(arguments.dataset, {"loss": read_loss(loss), **changes}, arguments.seed)


def train(
    arguments: argparse.Namespace, sequences: tuple[Arrays, Arrays], n_epochs: int
) -> Backbone:
    """Return the model of the best of so many epochs."""
    parameters = with_loss(
        arguments, arguments.trained_with, max_epochs=n_epochs, patience=n_epochs
    )
    with tempfile.TemporaryDirectory() as folder:
        weights, history = fit(*sequences, Path(folder) / "run", parameters, True)
    best = max(epoch["ndcg@10"] for epoch in history["epochs"])
    print(f"{arguments.trained_with}, the best of {n_epochs} epochs: validation NDCG@10 {best:.4f}")
    return load_model(parameters.model, weights, int(sequences[0]["max_length"][0]))


def look_into(
    arguments: argparse.Namespace, model: Backbone, train_sequences: Arrays
) -> dict[str, Inspection]:
    """Look into one draw of each of the losses, for the first batch of an epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    batches = TrainingBatches(
        train_sequences,
        device,
        batch_size=arguments.windows,
        seed=arguments.seed,
        with_histories=True,
    )
    batch = next(batches.batches(batches.steps(epoch=1)[0]))
    with torch.no_grad():
        hidden, table = model(batch.items, batch.packing), model.item_embeddings.detach()
    print(f"{len(hidden):,} tokens, {len(table):,} items")
    given = (batch.targets, batch.sequence, batch.histories)
    return {
        name: inspect_loss(
            build_loss(with_loss(arguments, name).loss), hidden, table, *given, seed=1
        )
        for name in arguments.losses
    }


def line(name: str, found: Inspection) -> str:
    """Return a row of the table."""
    coverage, gradients = found
    masses = (mass[coverage.covered].mean() for mass in (coverage.mass, coverage.pooled_mass))
    kept = "  ".join(f"{mass:11.1%}" for mass in masses)
    return (
        f"{name:32}  {coverage.token_share:6.1%}  {coverage.item_share:6.1%}  {kept}"
        f"  {gradients.hidden.cosine:13.3f}  {gradients.table.cosine:12.3f}"
    )


HEADER = f"{'loss':32}  tokens   items  their mass  pooled mass  cosine hidden  cosine table"


def main() -> None:
    """Read the command line, train and print a table for each number of epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="amazon_beauty")
    parser.add_argument("--trained-with", default="sce")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--windows", type=int, default=1024, help="of the batch that is looked at")
    parser.add_argument("--seed", type=int, default=1235)
    arguments = parser.parse_args()
    folder = ROOT / "data/05_model_input" / arguments.dataset
    names = ("train", "validation")
    sequences = tuple(load_file(folder / f"{name}_sequences.safetensors") for name in names)
    for n_epochs in arguments.epochs:
        model = train(arguments, sequences, n_epochs)
        found = look_into(arguments, model, sequences[0])
        print(HEADER)
        for name, inspection in found.items():
            print(line(name, inspection), flush=True)


if __name__ == "__main__":
    main()
