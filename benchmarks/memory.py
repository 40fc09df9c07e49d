"""How the benchmarks measure memory: each method in a process of its own.

The baseline is the resident size while the inputs AND one set of gradients exist; then the gradients are freed, the
method runs once, and its peak (VmHWM, reset before) minus the baseline is what it needs beyond its result.
"""

import ctypes
import multiprocessing
from pathlib import Path

import torch
from contestants import METHODS, Case, signal_of
from measuring import DTYPES, Inputs, Shape


def memory_above_gradients(method: str, case: Case, shape: Shape, dtype: str) -> float:
    """MB that `method` needs at its peak besides inputs and gradients."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["trl_distill_plugins.losses.chunked"]
    )  # torch is imported once, not in each process
    with context.Pool(1) as pool:
        return pool.apply(_measure, (method, case, shape, dtype))


def _measure(method: str, case: Case, shape: Shape, dtype: str) -> float:
    torch.set_num_threads(1)
    run, small = METHODS[method], Inputs.make((8, 64, 8), DTYPES[dtype])
    run(small, case, signal_of(small, case))
    inputs = Inputs.make(shape, DTYPES[dtype])
    signal = signal_of(inputs, case)
    gradients = [torch.ones_like(inputs.hidden), torch.ones_like(inputs.weight)]
    ctypes.CDLL(None).malloc_trim(0)  # else what making the inputs took, and freed, would be there for the method
    baseline = _status("VmRSS")
    gradients.clear()
    Path("/proc/self/clear_refs").write_text("5")
    run(inputs, case, signal)
    return _status("VmHWM") - baseline


def _status(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
