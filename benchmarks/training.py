"""Times training: the backbone by itself, and whole epochs on a synthetic log.

    python benchmarks/training.py --backbone                    # 128 full sequences of 200
    python benchmarks/training.py                               # a log of Gowalla's size, with CCE
    python benchmarks/training.py --devices 2 --batch-size 256  # on two GPUs

Users take items by a power law of popularity; all their items train, in windows of 200. The memory
is the peak above weights, gradients and Adam's state. Times of parts are the GPU's own; where it
waits for the host, that counts to the part it waits for.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from presets import read_presets

from sce_pipeline.interactions.sequences import cut_windows
from sce_pipeline.models import Packing, build_model
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.encoder import Encoder, ReplayedEncoder
from sce_pipeline.training.fit import fit

MAX_LENGTH = 200


def synthetic_log(
    n_users: int, n_items: int, n_interactions: int
) -> tuple[dict[str, np.ndarray], ...]:
    """Draw training and validation sequences, as the pipeline's own arrays."""
    generator = np.random.default_rng(0)
    weights = generator.lognormal(0, 1, n_users)
    lengths = np.maximum(3, weights / weights.sum() * n_interactions).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    popularity = (np.arange(n_items) + 10.0) ** -0.8
    items = generator.choice(n_items, offsets[-1], p=popularity / popularity.sum()).astype(np.int32)
    starts, stops = cut_windows(offsets, MAX_LENGTH, stride=MAX_LENGTH)
    shared = {
        "items": items,
        "offsets": offsets,
        "users": np.arange(n_users, dtype=np.int32),
        "n_items": np.array([n_items]),
        "max_length": np.array([MAX_LENGTH]),
    }
    windows = {"window_starts": starts, "window_stops": stops}
    targets = generator.integers(0, n_items, n_users).astype(np.int32)
    return {**shared, **windows}, {**shared, "targets": targets}


def parameters_for(arguments: argparse.Namespace, **changes: Any) -> TrainingParameters:
    """Return the project's defaults with what the command line says, and ``changes`` to that."""
    values: dict[str, Any] = read_presets("training")["_training"]
    losses = read_presets("losses")["loss_presets"]
    values["model"] = {
        "name": "sasrec",
        "hidden_size": arguments.hidden_size,
        "n_blocks": 2,
        "n_heads": 1,
        "dropout": 0.3,
    }
    values |= {"seed": 1, "loss": losses[arguments.loss], "max_epochs": arguments.epochs}
    values |= {"batch_size": arguments.batch_size, "devices": arguments.devices}
    values |= {"compile": arguments.compile, "item_table": arguments.item_table}
    return TrainingParameters.model_validate(values | changes)


def time_epochs(arguments: argparse.Namespace) -> None:
    """Train on a synthetic log and print what each epoch took."""
    train, validation = synthetic_log(arguments.users, arguments.items, arguments.interactions)
    parameters = parameters_for(arguments)
    with tempfile.TemporaryDirectory() as folder:
        weights, history = fit(train, validation, Path(folder) / "run", parameters, False)
    state = 4 * sum(weight.nbytes for weight in weights.values()) / 2**20
    print(f"{history['n_windows']:,} windows, {history['n_tokens']:,} tokens, {history['device']}")
    print("epoch  training s  validation s  tokens/s  MB over the state  share of each part")
    for epoch in history["epochs"]:
        parts = {k: v for k, v in epoch["seconds_by_part"].items() if k != "validation"}
        total = sum(parts.values())
        shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items())
        print(
            f"{epoch['epoch']:5}  {epoch['training_seconds']:10.3f}"
            f"  {epoch['validation_seconds']:12.3f}  {epoch['tokens_per_second']:10,.0f}"
            f"  {epoch['memory_mb'] - state:17,.0f}  {shares}"
        )


def time_backbone(arguments: argparse.Namespace) -> None:
    """Print the time of lookup, backbone forward and backward, and the lookup's gradient."""
    device = torch.device("cuda")
    model = build_model(parameters_for(arguments).model, arguments.items, MAX_LENGTH).to(device)
    others = [p for p in model.parameters() if p is not model.item_embeddings]
    for weight in others:
        weight.grad = torch.zeros_like(weight)
    table = model.item_embeddings.detach()
    table_gradient = torch.zeros_like(table)
    packing = Packing.from_lengths(torch.full((arguments.batch_size,), MAX_LENGTH), device)
    items = torch.randint(arguments.items, (packing.n_tokens,), device=device)
    gradient = torch.randn(packing.n_tokens, arguments.hidden_size, device=device)

    def in_half(encode: Any) -> Any:
        def run(*args: Any) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                return encode(*args)

        return run

    compiled = torch.compile(model.encode, dynamic=True)
    encoders = {
        "as it comes": Encoder(in_half(model.encode)),
        "replayed": ReplayedEncoder(in_half(model.encode), others, MAX_LENGTH),
        "as it comes, float32": Encoder(model.encode),
        "compiled and replayed": ReplayedEncoder(in_half(compiled), others, MAX_LENGTH),
    }
    for name, encoder in encoders.items():

        def step(encoder: Encoder = encoder) -> None:
            encoder.forward(table.index_select(0, items), packing, None)
            table_gradient.index_add_(0, items, encoder.backward(gradient))

        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        print(f"{name:22} {median_milliseconds(step):6.3f} ms  (first call {first:.1f} s)")


def median_milliseconds(step: Any) -> float:
    """Return the median time of a step on the GPU."""
    for _ in range(5):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(50)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", action="store_true")
    parser.add_argument("--loss", default="cce")
    parser.add_argument("--users", type=int, default=27_500)
    parser.add_argument("--items", type=int, default=173_511)
    parser.add_argument("--interactions", type=int, default=5_000_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--item-table", default="replicated")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"{hardware}, PyTorch {torch.__version__}, Python {platform.python_version()}")
    time_backbone(arguments) if arguments.backbone else time_epochs(arguments)


if __name__ == "__main__":
    main()
