"""The native CPU kernel: values, statistics and gradient of the built-in losses on a tile of logits, in one go.

`tile.cpp` beside this file is compiled once, by the system's C++ compiler, into a per-user cache. Without a compiler
the chunked engine does the same in eager torch.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trl_distill_plugins.losses.kernels.build import load_library
from trl_distill_plugins.losses.kernels.terms import KernelTerm

# In the order of `enum Kind` in tile.cpp.
_KINDS = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")
# A thread takes about 30 us to start, which pays off from about this many logits on.
_LOGITS_PER_THREAD = 1 << 16


class HeadStruct(ctypes.Structure):
    """`struct Head` in logits.hpp."""

    _fields_ = (("scale", ctypes.c_float), ("softcap", ctypes.c_float))


@dataclass(frozen=True)
class HeadShape:
    """How logits follow from raw ones: `softcap * tanh(scale * raw / softcap)`, or `scale * raw` without softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def pack(self) -> HeadStruct:
        """The same, as the kernels take it."""
        return HeadStruct(self.scale, self.softcap or 0.0)


class _Term(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("weight", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("label_smoothing", ctypes.c_float),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("terms", ctypes.POINTER(_Term)),
        ("values", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64),
        ("statistics", ctypes.c_void_p),
        ("student_head", HeadStruct),
        ("teacher_head", HeadStruct),
        ("term_count", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("student_is_bf16", ctypes.c_int32),
        ("teacher_is_bf16", ctypes.c_int32),
        ("want_gradient", ctypes.c_int32),
    )


class TileKernel:
    """The kernel, ready to be called. `load_tile_kernel` makes it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.run_tile
        self._run.argtypes = (ctypes.POINTER(_Tile),)
        self._run.restype = ctypes.c_int

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        token_scale: Tensor,
        terms: Sequence[KernelTerm],
        values: Tensor,
        statistics: Tensor,
        *,
        student_shape: HeadShape,
        teacher_shape: HeadShape,
        want_gradient: bool = True,
    ) -> None:
        """Evaluate `sum_k weight_k loss_k` on n tokens; all tensors on the CPU.

        Args:
            student: raw logits `[n, V]`, fp32 or bf16, contiguous. With `want_gradient` they are overwritten by the
                gradient of `sum_i token_scale_i sum_k weight_k loss_ki` by them; else left alone.
            teacher: raw logits `[n, V]`, fp32 or bf16, contiguous; -inf has no mass. None if no term needs it.
            labels: `[n]`, int64, in 0..V-1 if a term is cross_entropy.
            token_scale: `[n]`, fp32.
            terms: what the objective is made of.
            values: `[len(terms), n]`, fp32, receives the loss of each term at its temperature, without its weight.
            statistics: `[n, 5]`, fp32, receives at T = 1: KL(p || q), the entropies of q and of p, and 1 where the
                most likely token of q is p's, and where it is the label. Without teacher its three are 0.
            student_shape: scale and soft cap of the student's head.
            teacher_shape: the same of the teacher's.
            want_gradient: False to write only values and statistics.

        Raises:
            ValueError: a tensor has another shape, dtype or layout, or a term lacks its teacher or label.
        """
        _check(student, teacher, labels, token_scale, terms, values, statistics)
        tile = _Tile(
            *student.shape,
            student.data_ptr(),
            None if teacher is None else teacher.data_ptr(),
            labels.data_ptr(),
            token_scale.data_ptr(),
            (_Term * len(terms))(*map(_pack_term, terms)),
            values.data_ptr(),
            values.stride(0),
            statistics.data_ptr(),
            student_shape.pack(),
            teacher_shape.pack(),
            len(terms),
            threads_for(student),
            student.dtype == torch.bfloat16,
            teacher is not None and teacher.dtype == torch.bfloat16,
            want_gradient,
        )
        if self._run(tile):
            raise MemoryError(f"the tile kernel got no memory for {tuple(student.shape)} logits")


def threads_for(logits: Tensor) -> int:
    """On how many threads to work on so many logits."""
    return max(1, min(torch.get_num_threads(), logits.numel() // _LOGITS_PER_THREAD))


def _pack_term(term: KernelTerm) -> _Term:
    return _Term(_KINDS.index(term.kind), term.weight, term.temperature, term.beta, term.label_smoothing)


def _check(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    token_scale: Tensor,
    terms: Sequence[KernelTerm],
    values: Tensor,
    statistics: Tensor,
) -> None:
    """Raise ValueError unless the kernel may touch these tensors: it works on bare addresses."""
    n, vocabulary = student.shape
    logits, numbers = (torch.float32, torch.bfloat16), (torch.float32,)
    expected = [
        ("student", student, (n, vocabulary), logits),
        ("labels", labels, (n,), (torch.int64,)),
        ("token_scale", token_scale, (n,), numbers),
        ("statistics", statistics, (n, 5), numbers),
    ]
    if teacher is not None:
        expected.append(("teacher", teacher, (n, vocabulary), logits))
    for name, tensor, shape, dtypes in expected:
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            wanted = f"contiguous {list(shape)} of {' or '.join(map(str, dtypes))}"
            raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)} of {tensor.dtype}")
    if values.shape != (len(terms), n) or values.dtype != torch.float32 or (n > 1 and values.stride(1) != 1):
        raise ValueError(f"values: expected rows [{len(terms)}, {n}] of float32, got {list(values.shape)}")
    kinds = {term.kind for term in terms}
    if teacher is None and kinds - {"cross_entropy"}:
        raise ValueError(f"{', '.join(sorted(kinds - {'cross_entropy'}))} compares with a teacher, which is None")
    if "cross_entropy" in kinds:
        check_labels(labels, vocabulary)


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless a cross-entropy may read these labels."""
    if len(labels) and not (labels.min() >= 0 and labels.max() < vocabulary):
        raise ValueError(f"labels: cross_entropy needs them in 0..{vocabulary - 1}")


@lru_cache(maxsize=1)
def load_tile_kernel() -> TileKernel | None:
    """Return the kernel, built on first use; None, after one logged warning, where it cannot be built."""
    library = load_library()
    return None if library is None else TileKernel(library)
