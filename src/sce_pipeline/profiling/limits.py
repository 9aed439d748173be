"""How much memory a device has, and what happens where it does not suffice."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MEMINFO, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
_GROUP_LIMIT, _GROUP_USE = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))

WORDS = (
    "out of memory",  # of CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # of PyTorch's allocator on a CPU
    "not enough memory",
)
"""What libraries say in errors of no class of their own when there is no memory left."""


def free_bytes(device: torch.device) -> int:
    """Return the memory that PyTorch can have on ``device``, with what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _read_kilobytes(_MEMINFO, "MemAvailable")
    limit = _GROUP_LIMIT.read_text().strip() if _GROUP_LIMIT.exists() else "max"
    if limit != "max":
        free = min(free, int(limit) - int(_GROUP_USE.read_text()))
    return free


@contextmanager
def memory_is_finite(device: torch.device) -> Iterator[None]:
    """Let allocations fail on a CPU that would take more than is free.

    Linux grants more than there is and ends the process that makes use of it. Elsewhere, and on a
    GPU, nothing changes.
    """
    if device.type == "cuda" or not _STATUS.exists():
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _read_kilobytes(_STATUS, "VmData") + free_bytes(device)
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that memory did not suffice."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more, so that the device is as it was."""
    gc.collect()
    forget(device)


def forget(device: torch.device) -> None:
    """Give back the blocks that a GPU's allocator keeps for later, and forget its peaks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _read_kilobytes(file: Path, name: str) -> int:
    """Return a figure of a file of the kernel, in bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 2**10
    raise ValueError(f"{file} has no {name}")
