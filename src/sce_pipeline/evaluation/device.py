"""The device to rank on."""

from __future__ import annotations

from typing import Literal

import torch


def choose_device(accelerator: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """Return the device that an ``accelerator`` stands for; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: A GPU is asked for where PyTorch finds none.
    """
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ValueError(
            "evaluation.accelerator is gpu, but PyTorch finds no CUDA device; use auto or cpu"
        )
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")
