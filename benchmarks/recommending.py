"""Times recommendations: from histories in memory to the first items of each user on the host.

    python benchmarks/recommending.py          # on a CUDA device
    python benchmarks/recommending.py --tiny   # anywhere: that every row runs

What is timed is what the pipeline recommendation calls for each of its partitions, with its
parameters but for what the command line says: an untrained SASRec in float32 and histories of
about 50 random items, which are left out, then also every tenth item. The parts of the time:

- encoder: from the items of histories on the device to hidden states;
- ranking: which items are the first k of all but those that are left out, and their order;
- transfer: all the rest, histories checked, brought to the device and cut into blocks, lists
  brought back.

The device is waited for where a part ends, which is a few times a block of thousands of users, each
of which takes many times as long. The floor is the larger of two times: the products of all users
with all items, at the rate of a large product in float32, and the table, the histories and the
lists, each moved once, at the rate of a large copy; both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from presets import read_presets
from timing import CUDA, DEVICE, ceilings, synchronize

from sce_pipeline.models import MODELS, Backbone, network_arguments
from sce_pipeline.recommendation import recommender as room
from sce_pipeline.recommendation.recommender import Recommender

LENGTH = 50
"""Mean length of a history, and most of its items that the model reads."""

DENIED = 10
"""One item in so many is denied."""

ENCODER, RANKING, TRANSFER = PARTS = "encoder", "ranking", "transfer"


class Stopwatch:
    """Shares time out to parts; whatever belongs to no other is transfer."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = TRANSFER, time.perf_counter()

    def turn_to(self, part: str) -> None:
        """Wait for the device, and let what follows count as a part."""
        synchronize()
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls counting as a part."""

        def timed(*arguments: Any) -> Any:
            self.turn_to(part)
            result = function(*arguments)
            self.turn_to(TRANSFER)
            return result

        return timed


def build(arguments: argparse.Namespace) -> Backbone:
    """Return an untrained SASRec of the size that is asked for."""
    preset = read_presets("models")["model_presets"]["sasrec"]
    preset |= {"hidden_size": arguments.hidden_size}
    return MODELS["sasrec"](arguments.items, LENGTH, **network_arguments(preset)).to(DEVICE)


def draw_histories(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return items, int32 [rows], and where each history begins, and the end: int64 [users + 1]."""
    generator = np.random.default_rng(0)
    lengths = generator.poisson(LENGTH, arguments.users).clip(1)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return generator.integers(arguments.items, size=offsets[-1], dtype=np.int32), offsets


def deny(n_items: int) -> np.ndarray:
    """Return which items are denied, bool [n_items]."""
    excluded = np.zeros(n_items, dtype=bool)
    excluded[np.random.default_rng(1).permutation(n_items)[: n_items // DENIED]] = True
    return excluded


def serve(
    model: Backbone,
    histories: tuple[np.ndarray, np.ndarray],
    excluded: np.ndarray | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Recommend to partition after partition, until all users are served or the time is over.

    Returns:
        ``users`` served, ``rows`` of their histories, ``seconds`` of each part, ``peak_mb``.
    """
    items, offsets = histories
    recommender, served, watch = Recommender(model), 0, Stopwatch()
    with (
        patch.object(model, "embed", watch.within(ENCODER, model.embed)),
        patch.object(model, "encode_last", watch.within(ENCODER, model.encode_last)),
        patch.object(room, "find_top_items", watch.within(RANKING, room.find_top_items)),
    ):
        while served < arguments.users and sum(watch.seconds.values()) <= arguments.seconds:
            part = offsets[served : served + arguments.users_per_partition + 1]
            rows = items[part[0] : part[-1]]
            recommender.recommend(rows, part - part[0], arguments.k, True, excluded)
            watch.turn_to(TRANSFER)
            served += len(part) - 1
    return {
        "users": served,
        "rows": int(offsets[served]),
        "seconds": watch.seconds,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if CUDA else 0.0,
    }


def measure(
    model: Backbone,
    histories: tuple[np.ndarray, np.ndarray],
    excluded: np.ndarray | None,
    arguments: argparse.Namespace,
    rates: tuple[float, float],
) -> dict[str, Any]:
    """Return what ``serve`` does, after a few users who are not counted, and the ``floor``."""
    offsets = histories[1][: WARMING_UP + 1]
    few = argparse.Namespace(**{**vars(arguments), "users": len(offsets) - 1})
    serve(model, (histories[0][: offsets[-1]], offsets), excluded, few)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    row = serve(model, histories, excluded, arguments)
    products = 2.0 * row["users"] * arguments.items * arguments.hidden_size
    moved = 4 * (arguments.items * arguments.hidden_size + row["rows"])
    moved += 8 * row["users"] * arguments.k  # an item and its score
    return {**row, "floor": max(products / rates[0], moved / rates[1])}


WARMING_UP = 2_000
"""Users who are served before the clock runs."""

TINY = {"items": 3_000, "users": 500, "hidden_size": 16, "users_per_partition": 200}


def main() -> None:
    """Read the command line, measure and print a table."""
    preset = read_presets("recommendation")["recommendation"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--k", type=int, default=preset["k"])
    parser.add_argument(
        "--seconds", type=float, default=120, help="begin no partition later (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do")
    parser.set_defaults(users_per_partition=preset["users_per_partition"])
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update(TINY)
    elif not CUDA:
        parser.error("there is no CUDA device to measure on; --tiny tries every row")

    rates = ceilings(torch.float32)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{device}, torch {torch.__version__}, copy {rates[1] / 1e12:.2f} TB/s, ", end="")
    print(f"product {rates[0] / 1e12:.1f} TFLOP/s, in bfloat16 {ceilings()[0] / 1e12:.1f}")
    print(f"{arguments.items:,} items x {arguments.hidden_size}, the first {arguments.k} of them")
    print(
        "left out             users        s    users/s  encoder s  ranking s  transfer s"
        "    peak MB  floor s  of the floor"
    )
    model, histories = build(arguments), draw_histories(arguments)
    for name, excluded in {"seen": None, "seen and denied": deny(arguments.items)}.items():
        row = measure(model, histories, excluded, arguments, rates)
        seconds = sum(row["seconds"].values())
        encoder, ranking, transfer = row["seconds"].values()
        print(
            f"{name:15} {row['users']:10,} {seconds:8.2f} {row['users'] / seconds:10,.0f}"
            f"  {encoder:9.2f}  {ranking:9.2f}  {transfer:10.2f} {row['peak_mb']:10,.0f}"
            f" {row['floor']:8.3f}  {row['floor'] / seconds:12.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
