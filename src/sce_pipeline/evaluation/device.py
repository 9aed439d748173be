"""The device that an accelerator parameter stands for."""

from __future__ import annotations

from typing import Literal

import torch


def choose_device(accelerator: Literal["auto", "cpu", "gpu"], parameter: str) -> torch.device:
    """Return the device that an ``accelerator`` stands for; ``auto`` is the GPU if there is one.

    Args:
        accelerator: What is asked for.
        parameter: The name of the parameter that asks, for the error.

    Raises:
        ValueError: A GPU is asked for where PyTorch finds none.
    """
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ValueError(f"{parameter} is gpu, but PyTorch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")
