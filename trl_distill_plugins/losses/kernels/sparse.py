"""The native passes over a student's raw logits that a sparse teacher needs: what losses and statistics read of a row,
and the gradient over it. The source is `sparse.cpp`; `losses.sparse_tiles` puts the losses in between."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trl_distill_plugins.losses.kernels.build import load_library
from trl_distill_plugins.losses.kernels.cpu import HeadShape, HeadStruct, threads_for

# Columns of `struct RowFigures` in sparse.hpp.
_FIGURES = 5


class _SparseTile(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "named")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "student", "ids", "labels", "temperatures", "logits", "rest", "mass", "figures", "top", "of_named",
                "of_rest", "token_scale",
            )
        ),
        *((name, ctypes.c_float) for name in ("on_label", "everywhere")),
        ("head", HeadStruct),
        *((name, ctypes.c_int32) for name in ("temperature_count", "threads", "is_bf16", "want_mean")),
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What `SparseKernel.read` found in n rows. Logits are after scale and soft cap, less the row's maximum.

    Args:
        raw: the rows, `[n, V]`.
        ids: the named tokens, `[n, k]`.
        labels: `[n]`.
        temperatures: `[J]`, the first is 1.
        named: logits of the named tokens, `[n, k]`; -1e30 for an id of -1.
        rest: logsumexp of all others at each temperature, `[J, n]`; -1e30 where there are none.
        mass: the same before the logarithm, less the largest of them, `[J, n]`.
        figures: `[n, 5]`; the properties name its columns.
        top: the token of the largest logit, `[n]`.
        shape: scale and soft cap.
    """

    raw: Tensor
    ids: Tensor
    labels: Tensor
    temperatures: Tensor
    named: Tensor
    rest: Tensor
    mass: Tensor
    figures: Tensor
    top: Tensor
    shape: HeadShape

    @property
    def log_z(self) -> Tensor:
        """Logsumexp of all logits, `[n]`."""
        return self.figures[:, 0]

    @property
    def entropy(self) -> Tensor:
        """Entropy of the student at T = 1, `[n]`, in nats."""
        return self.figures[:, 1]

    @property
    def label(self) -> Tensor:
        """The label's logit, `[n]`."""
        return self.figures[:, 2]

    @property
    def mean(self) -> Tensor:
        """Mean of the logits over the vocabulary, `[n]`; 0 unless it was asked for."""
        return self.figures[:, 3]


class SparseKernel:
    """The two passes, ready to be called. `load_sparse_kernel` makes it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._read, self._spread = library.read_sparse, library.spread_sparse
        for function in (self._read, self._spread):
            function.argtypes, function.restype = (ctypes.POINTER(_SparseTile),), ctypes.c_int

    def read(
        self,
        raw: Tensor,
        ids: Tensor,
        labels: Tensor,
        temperatures: Sequence[float],
        shape: HeadShape,
        *,
        want_mean: bool = False,
    ) -> Rows:
        """Read raw logits `[n, V]`, fp32 or bf16, contiguous, on the CPU.

        Args:
            raw: written to while it runs, and then as before.
            ids: the tokens the teacher names, `[n, k]`, int64, different ones in a row; -1 names none.
            labels: `[n]`, int64.
            temperatures: those at which the rest is wanted; the first is 1.
            shape: scale and soft cap of the head.
            want_mean: whether `Rows.mean` is needed.

        Raises:
            ValueError: a tensor has another shape, dtype or layout, an id is no token, or the first temperature
                is not 1.
        """
        _check(raw, ids, labels, temperatures)
        (n, k), count = ids.shape, len(temperatures)
        rows = Rows(
            raw, ids, labels, torch.tensor(temperatures, dtype=torch.float32), torch.empty(n, k), torch.empty(count, n),
            torch.empty(count, n), torch.empty(n, _FIGURES), torch.empty(n, dtype=torch.int64), shape,
        )  # fmt: skip
        self._run(self._read, _SparseTile(**_fields(rows), want_mean=want_mean))
        return rows

    def spread(
        self,
        rows: Rows,
        of_named: Tensor,
        of_rest: Tensor,
        token_scale: Tensor,
        *,
        on_label: float = 0.0,
        everywhere: float = 0.0,
    ) -> None:
        """Overwrite `rows.raw` by the gradient of an objective by it.

        Args:
            rows: what `read` returned.
            of_named: the objective's gradient by the logits of the named tokens, `[n, k]`, fp32.
            of_rest: its gradient by `rest` times 1 / T, `[J, n]`, fp32: what all other tokens get in sum.
            token_scale: factor on all that a row gets, `[n]`, fp32.
            on_label: what the label's logit gets beside it.
            everywhere: what each logit gets beside it.

        Raises:
            ValueError: a gradient has another shape, dtype or layout.
        """
        expected = [("of_named", of_named, rows.named), ("of_rest", of_rest, rows.rest)]
        for name, tensor, like in [*expected, ("token_scale", token_scale, rows.log_z)]:
            if tensor.shape != like.shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                wanted = f"contiguous {list(like.shape)} of float32"
                raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)} of {tensor.dtype}")
        addresses = {"of_named": of_named.data_ptr(), "of_rest": of_rest.data_ptr()}
        tile = _SparseTile(**_fields(rows), **addresses, token_scale=token_scale.data_ptr())
        tile.on_label, tile.everywhere = on_label, everywhere
        self._run(self._spread, tile)

    @staticmethod
    def _run(function: "ctypes._FuncPointer", tile: _SparseTile) -> None:
        if function(tile):
            raise MemoryError(f"the sparse kernel got no memory for rows of {tile.vocabulary} logits")


def _fields(rows: Rows) -> dict[str, object]:
    names = ("ids", "labels", "temperatures", "rest", "mass", "figures", "top")
    return {
        "rows": rows.raw.shape[0],
        "vocabulary": rows.raw.shape[1],
        "named": rows.ids.shape[1],
        "student": rows.raw.data_ptr(),
        "logits": rows.named.data_ptr(),
        **{name: getattr(rows, name).data_ptr() for name in names},
        "head": rows.shape.pack(),
        "temperature_count": len(rows.temperatures),
        "threads": threads_for(rows.raw),
        "is_bf16": rows.raw.dtype == torch.bfloat16,
    }


def _check(raw: Tensor, ids: Tensor, labels: Tensor, temperatures: Sequence[float]) -> None:
    """Raise ValueError unless the kernel may touch these tensors: it works on bare addresses."""
    n, vocabulary = raw.shape
    integers = (torch.int64,)
    for name, tensor, shape, dtypes in (
        ("raw", raw, (n, vocabulary), (torch.float32, torch.bfloat16)),
        ("ids", ids, (n, *ids.shape[1:2]), integers),
        ("labels", labels, (n,), integers),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            wanted = f"contiguous {list(shape)} of {' or '.join(map(str, dtypes))}"
            raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)} of {tensor.dtype}")
    if ids.numel() and not (ids.min() >= -1 and ids.max() < vocabulary):
        raise ValueError(f"ids: expected -1 to {vocabulary - 1}, got {ids.min().item()} to {ids.max().item()}")
    if not temperatures or temperatures[0] != 1.0:
        raise ValueError(f"temperatures: expected 1 first, got {list(temperatures)}")


@lru_cache(maxsize=1)
def load_sparse_kernel() -> SparseKernel | None:
    """Return the kernel, built on first use; None, after one logged warning, where it cannot be built."""
    library = load_library()
    return None if library is None else SparseKernel(library)
