from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if find_spec("triton") is None:  # it is for Linux alone
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def nothing_but_the_arguments_is_touched(monkeypatch):
    """Where kernels are interpreted, check every address that they read or write."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter  # noqa: PLC0415

    spans: list[tuple[int, int]] = []
    collect = interpreter.GridExecutor._init_args_hst

    def collect_spans(self, args, kwargs):
        args, kwargs = collect(self, args, kwargs)
        spans.clear()
        for arg in (*args, *kwargs.values()):
            tensor = getattr(arg, "base", arg)
            if isinstance(tensor, torch.Tensor):
                start = tensor.data_ptr()
                # What is passed are whole tensors, or rows of one: the end of its storage counts.
                storage = tensor.untyped_storage()
                spans.append((start, storage.data_ptr() + storage.nbytes()))
        return args, kwargs

    def check(pointers, mask):
        wanted = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not wanted.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = wanted.min(), wanted.max()
        if any(start <= first and last + size <= stop for start, stop in spans):
            return  # and so is all that lies between, which spares a look at each
        inside = np.zeros(wanted.shape, bool)
        for start, stop in spans:
            inside |= (wanted >= start) & (wanted + size <= stop)
        assert inside.all(), f"{int((~inside).sum())} of {wanted.size} addresses are out of bounds"

    builder = interpreter.InterpreterBuilder
    load, store, update = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw")
    )

    def checked_load(self, pointers, mask, *rest, **options):
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_update(self, operation, pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return update(self, operation, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", collect_spans)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", checked_update)
