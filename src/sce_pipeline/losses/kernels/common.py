"""What the kernels share: their launch, and their products."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(LOG2_E · x): exp2 is what the hardware computes."""

LN_2 = tl.constexpr(0.6931471805599453)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}


def cdiv(n: int, size: int) -> int:
    """Return ``n / size``, rounded up; ``triton.cdiv`` would take twenty times as long."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """Return the least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def padded(d: int) -> int:
    """Return the columns of a tile that holds ``d``: a power of two, at least 16."""
    return max(16, power_of_2(d))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch ``kernel`` as ``kernel[grid](*arguments, **constants)`` would, in less time.

    Triton looks at every argument of every launch, which takes longer than some of our kernels run.
    Here a launch like an earlier one goes to what was compiled for that at once, and past the hooks
    that profilers of Triton's may have set.

    Args:
        kernel: A function of ``triton.jit`` whose constants come last.
        grid: Number of programs along up to three axes.
        arguments: All its arguments but the constants, one tensor at least.
        constants: Its constants, and options such as ``num_warps``.
    """
    if INTERPRETED.value:
        kernel[grid](*arguments, **constants)
        return
    key: list[Any] = [id(kernel), *constants, *constants.values()]
    values = []
    device = -1
    for argument in arguments:
        if isinstance(argument, Tensor):
            # An address is taken as it is; about a tensor the launcher would ask the driver.
            address = argument.data_ptr()
            values.append(address)
            key.append(argument.dtype)
            key.append(address % 16 == 0)
            if device < 0:
                device = argument.get_device()
        else:
            values.append(argument)
            key.append(_kind(argument))
    if device != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
        return
    place = (device, *key)
    known = _compiled.get(place)
    if known is not None:
        run, what, last_values = known
        stream = driver.active.get_current_stream(device)
        run(*(*grid, 1, 1)[:3], stream, *what, *values, *last_values)
        return
    compiled = kernel[grid](*arguments, **constants)
    no_hooks = (None, None, None)
    names = kernel.arg_names[len(arguments) :]
    _compiled[place] = (
        compiled.run,
        (compiled.function, compiled.packed_metadata, *no_hooks),
        tuple(constants[name] for name in names),
    )


def _kind(argument: Any) -> Any:
    """Return all that Triton compiles anew for, of what is no tensor."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, float):
        return float
    if argument is None:
        return None
    return argument.base.dtype, tuple(argument.block_shape)


@triton.jit
def dot(a, b, accumulator):
    """Return ``a @ b + accumulator``, accumulated in float32.

    Factors of float32 keep their precision, in three products of TF32. The interpreter knows no
    products of bfloat16: there, both factors are widened first, which changes no value.
    """
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    elif a.dtype == tl.float32:
        result = tl.dot(a, b, accumulator, input_precision="tf32x3")
    else:
        result = tl.dot(a, b, accumulator)
    return result


@triton.jit
def log1p(x):
    """Return log(1 + x) for x >= 0, to the last bits also where x is small."""
    rounded = 1.0 + x
    # Where 1 + x was rounded, the logarithm is off by the same share as x is.
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / (rounded - 1.0)))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp2(-tl.abs(x) * LOG2_E))


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    small = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)
