"""How long something takes, and how fast the machine multiplies and copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

SLOW_MS = 100
"""From here on a step is timed by itself, a few times in about a second."""


def milliseconds(step: Callable[[], Any]) -> float:
    """Return the median time of a step that ran before."""
    times = [_once(step)]
    if not CUDA:
        return times[0]
    if times[0] < SLOW_MS:
        from triton.testing import do_bench  # noqa: PLC0415 - first is told whether to interpret

        return do_bench(step, warmup=20, rep=120, return_mode="median")
    while sum(times) < 10 * SLOW_MS and len(times) < 5:
        times.append(_once(step))
    return statistics.median(times)


def _once(step: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def ceilings(dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """Return the rates of a product of a type, in operations/s, and of a copy, in bytes/s."""
    size = 8192 if CUDA else 256
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    ms = milliseconds(lambda: a @ b)
    source = torch.randn(4 * size**2, device=DEVICE)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    return 2e3 * size**3 / ms, 2e3 * source.numel() * source.element_size() / copied
