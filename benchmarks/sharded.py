"""Times steps of training an item table that is spread over ranks, beside their floor.

    torchrun --nproc-per-node 2 benchmarks/sharded.py                           # on CUDA devices
    torchrun --nproc-per-node 2 benchmarks/sharded.py --items 2000 --tokens 64  # anywhere

A step looks up input embeddings, takes them for the hidden states, and goes on with the sharded
CCE in bfloat16, its backward, the gradient of the embeddings and fused Adam, all of the table in
float32. Items and targets are uniform. The floor of a rank is the sum of three times: of the
products that the loss cannot do without, at the rate of a large product of bfloat16; of reading
and writing the table, its cast, its gradient and Adam's state no more often than must be, at the
rate of a large copy; and of what is exchanged, at the rate of a link that is assumed. The first
two rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sce_pipeline.collectives import gather_rows
from sce_pipeline.losses.sharded import sharded_cross_entropy
from sce_pipeline.models.item_shards import add_gradient, initial_rows, item_range, lookup

LINK_RATE = 300e9
"""Bytes/s that a GPU is taken to send over NVLink."""

PHASES = ("lookup", "forward", "backward", "add_gradient", "adam")


class Work:
    """A table, a batch and an optimiser on one rank.

    Args:
        n_items: Items of all ranks.
        hidden_size: Size d of a row.
        n_tokens: Tokens of all ranks.
        device: Where this rank computes.
    """

    def __init__(self, n_items: int, hidden_size: int, n_tokens: int, device: torch.device) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        own = item_range(n_items, rank, world)
        self.device = device
        self.place = {
            "first_item": own.start,
            "n_items": n_items,
            "counts": [len(item_range(n_tokens, each, world)) for each in range(world)],
        }
        rows = initial_rows(own, n_items, hidden_size, seed=0)
        self.shard = nn.Parameter(rows.to(device))
        self.optimizer = torch.optim.Adam([self.shard], lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(rank)
        shape = (2, self.place["counts"][rank])
        self.items, self.targets = torch.randint(n_items, shape, generator=generator).to(device)

    def step(self) -> tuple[dict[str, float], Tensor]:
        """Return how long each phase of a step took, in seconds, and the loss."""
        marks = [self._now()]
        self.optimizer.zero_grad(set_to_none=True)
        hidden = lookup(self.shard, self.items, **self.place).requires_grad_()
        marks.append(self._now())
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = sharded_cross_entropy(hidden, self.shard, self.targets, **self.place)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        place = {name: self.place[name] for name in ("first_item", "counts")}
        add_gradient(self.shard.grad, self.items, hidden.grad, **place)
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        taken = (after - before for before, after in pairwise(marks))
        return dict(zip(PHASES, taken, strict=True)), loss.detach()

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(function: Callable[[], object], amount: float, device: torch.device) -> float:
    """Return how much a second ``function`` gets done, of which one call does ``amount``."""
    times = []
    for _ in range(12):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times[2:])


def ceilings(device: torch.device) -> tuple[float, float]:
    """Return the rates of a product of bfloat16, in operations/s, and of a copy, in bytes/s."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).bfloat16()
    source = torch.randn(4 * size, size, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return (
        rate(lambda: a @ a, 2 * size**3, device),
        rate(lambda: target.copy_(source), moved, device),
    )


def floor(work: Work, rates: tuple[float, float]) -> dict[str, float]:
    """Return the least seconds of a rank's products, of its memory and of its exchanges."""
    rows, d = work.shard.shape
    n_tokens, world = sum(work.place["counts"]), len(work.place["counts"])
    table, cast = 4 * rows * d, 2 * rows * d
    # Cast: read, written. Passes: the cast is read in both, the gradient written. Adam: the
    # weights, the gradient and two moments are read, all but the gradient written.
    moved = (table + cast) + (2 * cast + table) + 7 * table
    # Hidden states in bfloat16; their gradients, embeddings and the embeddings' in float32.
    sent = (world - 1) / world * n_tokens * d * (2 + 4 + 4 + 4)
    return {
        "products": 8 * n_tokens * rows * d / rates[0],
        "memory": moved / rates[1],
        "exchanges": sent / LINK_RATE,
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this rank has had: on a GPU allocated, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=50_000_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=25_600, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = arguments.items, arguments.hidden_size, arguments.tokens
    found = measure(*sizes, arguments.steps, device)
    if dist.get_rank() == 0:
        report(found)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    n_items: int, hidden_size: int, n_tokens: int, n_steps: int, device: torch.device
) -> dict[str, Any]:
    """Take steps on every rank of the process group, and return what this one found.

    Args:
        n_items: Items of all ranks.
        hidden_size: Size d of a row.
        n_tokens: Tokens of all ranks.
        n_steps: Steps that are timed, after two that are not.
        device: Where this rank computes.
    """
    rates = ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    work = Work(n_items, hidden_size, n_tokens, device)
    for _ in range(2):  # Triton compiles in the first, and Adam's state comes to be
        work.step()
    steps = [work.step() for _ in range(n_steps)]
    peak = torch.tensor([peak_memory(device)], device=device)
    return {
        "items": n_items,
        "hidden_size": hidden_size,
        "tokens": n_tokens,
        "steps": n_steps,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "operations_per_second": rates[0],
        "bytes_per_second": rates[1],
        "phases": {
            phase: statistics.median(taken[phase] for taken, _ in steps) for phase in PHASES
        },
        "step": statistics.median(sum(taken.values()) for taken, _ in steps),
        "floor": floor(work, rates),
        "loss": float(steps[-1][1]),
        "state": 4 * work.shard.numel() * work.shard.element_size(),
        "peaks": gather_rows(peak, [1] * dist.get_world_size()).tolist(),
    }


def report(found: dict[str, Any]) -> None:
    """Print what ``measure`` found."""
    print(
        f"{found['items']:,} items x {found['hidden_size']}, {found['tokens']:,} tokens, "
        f"{len(found['peaks'])} ranks, {found['device']}, torch {torch.__version__}: "
        f"{found['operations_per_second'] / 1e12:.3g} TFLOP/s, "
        f"{found['bytes_per_second'] / 1e12:.3g} TB/s"
    )
    for phase, seconds in found["phases"].items():
        print(f"{phase:>14} {1e3 * seconds:10.2f} ms")
    step, state, total = found["step"], found["state"], sum(found["floor"].values())
    parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in found["floor"].items())
    print(
        f"{'step':>14} {1e3 * step:10.2f} ms, median of {found['steps']}; loss {found['loss']:.6f}"
    )
    print(f"{'floor':>14} {1e3 * total:10.2f} ms ({parts}): {total / step:.0%} of it reached")
    print(f"table, gradient and Adam's state of a rank: {state / 1e9:.3f} GB")
    for rank, peak in enumerate(found["peaks"]):
        print(
            f"peak of rank {rank}: {peak / 1e9:.3f} GB, {(peak - state) / 1e9:.3f} GB above these"
        )


if __name__ == "__main__":
    main()
