"""What the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(LOG2_E · x): exp2 is what the hardware computes."""

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, accumulator):
    """Return ``a @ b + accumulator``, accumulated in float32.

    Factors of float32 keep their precision, in three products of TF32. The interpreter knows no
    products of bfloat16: there, both factors are widened first, which changes no value.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    if a.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision="tf32x3")
    return tl.dot(a, b, accumulator)
