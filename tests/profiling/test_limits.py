from __future__ import annotations

import resource
import sys

import pytest
import torch

from sce_pipeline.profiling.limits import free_bytes, is_out_of_memory, memory_is_finite

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux grants more than there is")
def test_what_is_more_than_is_free_fails_at_once_and_only_within():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_is_finite(CPU):
        assert torch.zeros(1000).sum() == 0
        with pytest.raises(RuntimeError) as caught:
            torch.empty(free_bytes(CPU) + 2**30, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
    ids=str,
)
def test_memory_that_does_not_suffice_is_told_from_what_it_leads_to(error):
    assert is_out_of_memory(error)
    led_to = RuntimeError("operation failed due to a previous error during capture")
    led_to.__context__ = error
    assert is_out_of_memory(led_to)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory of mine")]
)
def test_another_error_is_another_error(error):
    assert not is_out_of_memory(error)
