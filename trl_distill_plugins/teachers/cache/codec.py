"""A document of a sparse teacher to bytes and back. `layout.py` draws the bytes.

Ids and draws are exact. With `step = 2^-value_bits` nats, a position's values are `(log p - its smallest log p) / step`
and its mass m, the sum of its p, is `(16 - log(m / (1 - m))) / step`, all rounded. The odds keep both m and what is
left of 1 right to half a step. They end at e^16: beyond that, fp32 log-probs do not tell what is left. Decoded
log-probs are the values shifted to sum to m, so that the named mass stays below 1 and no log-prob is off by more than
1.5 steps.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.cache import layout
from trl_distill_plugins.teachers.cache.bits import Ints
from trl_distill_plugins.teachers.cache.layout import Codes
from trl_distill_plugins.teachers.cache.postings import pack_positions, unpack_positions

DEFAULT_VALUE_BITS = 2

_MAX_VALUE_BITS = 12
_MAX_LOG_ODDS = 16.0
_MIN_LOG_PROB = -1e5
_SLACK = 1e-3  # by which a mass may exceed 1: the rounding of whoever summed it

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_NONE: Ints = np.zeros(0, np.int64)


def encode(
    signal: SparseSignal, vocabulary: int, value_bits: int = DEFAULT_VALUE_BITS, draws: int | None = None
) -> bytes:
    """Write a document.

    Args:
        signal: N positions, each naming at least one token. Of a sampled one, log-probs that are `weights.log()` are
            not stored.
        vocabulary: all ids are below it.
        value_bits: log-probs are rounded to multiples of `2^-value_bits` nats, 0 to 12.
        draws: of a sampled signal, how many tokens were drawn at each position.

    Raises:
        DataError: a position names no token, or one twice or outside the vocabulary; probabilities that are none, or
            sum to more than 1; weights that are not shares of `draws`.
    """
    if not 0 <= value_bits <= _MAX_VALUE_BITS:
        raise ValueError(f"value_bits is {value_bits}; it must be 0 to {_MAX_VALUE_BITS}")
    if (draws is None) != (signal.weights is None):
        raise ValueError("draws must be given for a sampled signal, and for no other")
    ids, log_probs, weights = _sorted_rows(signal)
    named = ids >= 0
    table, places = np.unique(ids[named], return_inverse=True)
    if len(table) and table[-1] >= vocabulary:
        raise DataError(f"the teacher names token {table[-1]}, and its vocabulary has {vocabulary}")
    by_token = places.argsort(kind="stable")
    counts = np.bincount(places, minlength=len(table))
    counted = _NONE if weights is None or draws is None else _counts(weights, named, draws)[by_token]
    masses, values = _NONE, _NONE
    if log_probs is not None:
        masses, values = _quantise(log_probs, named, value_bits)
        values = values[by_token]
    gaps = pack_positions(named.nonzero()[0][by_token], counts, len(named))
    codes = Codes(counts - 1, masses, np.diff(table, prepend=-1) - 1, gaps, values, counted)
    flags = layout.SAMPLED * (draws is not None) + layout.WITH_LOG_PROBS * (log_probs is not None)
    return layout.write(codes, flags, value_bits, len(named), vocabulary, draws or 0)


def decode(blob: memoryview | bytes) -> SparseSignal:
    """Read a document: each position's tokens by rising id, `[N, k]` for the largest k; int64 ids, fp32 log-probs.

    Where a position names fewer, its last id is repeated, at log-prob -inf and weight 0.

    Raises:
        DataError: these bytes are not a whole document.
    """
    header, codes = layout.read(blob)
    table, counts = np.cumsum(codes.table + 1) - 1, codes.counts + 1
    if len(table) and table[-1] >= header.vocabulary:
        raise DataError("a record of the teacher cache is damaged: it names tokens outside the vocabulary")
    positions = unpack_positions(codes.gaps, counts, header.positions)
    sizes = np.bincount(positions, minlength=header.positions)
    if not sizes.all():
        raise DataError("a record of the teacher cache is damaged: it names no token at some position")
    by_position = positions.astype(np.min_scalar_type(header.positions)).argsort(kind="stable")
    named = np.arange(sizes.max(initial=0)) < sizes[:, None]
    rows = np.full(named.shape, -1)
    rows[named] = np.repeat(table, counts)[by_position]
    ids, weights = torch.from_numpy(np.maximum.accumulate(rows, 1)), None
    if header.is_sampled:
        weights = torch.from_numpy((_spread(codes.draws[by_position] + 1, named, 0) / header.draws).astype(np.float32))
        if not header.has_log_probs:
            return SparseSignal(ids, weights.log(), weights)
    step = np.float64(2.0**-header.value_bits)
    log_probs = _log_probs(_spread(codes.values[by_position] * step, named, -np.inf), codes.masses[:, None] * step)
    return SparseSignal(ids, torch.from_numpy(_rounded_down(log_probs)), weights)


def _sorted_rows(signal: SparseSignal) -> tuple[Ints, Floats | None, Floats | None]:
    """Ids, log-probs and weights, `[N, k]`, by rising id; ids of -1 fill up the rows. No log-probs if the weights say
    it all."""
    log_probs, weights = _floats(signal.log_probs), None if signal.weights is None else _floats(signal.weights)
    named = log_probs != -np.inf if weights is None else weights > 0
    if not named.any(1).all():
        raise DataError(f"the teacher names no token at position {int(named.any(1).argmin())} of a document")
    ids: Ints = signal.ids.cpu().numpy()
    if (ids[named] < 0).any():
        raise DataError(f"the teacher names token {ids[named].min()}")
    order = np.where(named, ids, np.iinfo(np.int64).max).argsort(axis=1)
    ids, log_probs = (np.take_along_axis(rows, order, 1) for rows in (np.where(named, ids, -1), log_probs))
    if (np.diff(ids)[ids[:, 1:] >= 0] == 0).any():
        raise DataError("the teacher names a token twice at one position")
    if weights is None or signal.weights is None:
        return ids, log_probs, None
    told = not torch.equal(signal.log_probs, signal.weights.log())
    return ids, log_probs if told else None, np.take_along_axis(weights, order, 1)


def _counts(weights: Floats, named: Mask, draws: int) -> Ints:
    """How often each named token was drawn, less 1, `[named]`."""
    shares = np.where(named, weights, 0) * draws
    counts = np.rint(shares).astype(np.int64)
    if (np.abs(shares - counts) > 0.01).any() or (counts.sum(1) != draws).any():
        raise DataError(f"the weights of a sampled teacher are not the shares of {draws} draws")
    return counts[named] - 1


def _quantise(log_probs: Floats, named: Mask, value_bits: int) -> tuple[Ints, Ints]:
    """Masses `[N]` and values `[named]` in steps."""
    kept = log_probs[named]
    if not ((kept >= _MIN_LOG_PROB) & (kept <= _SLACK)).all():
        raise DataError(f"the teacher's log-probs of named tokens must be {_MIN_LOG_PROB:g} to 0")
    inside = _log_sum(np.where(named, log_probs, -np.inf))
    if (inside > _SLACK).any():
        raise DataError(f"the teacher's probabilities sum to {np.exp(inside.max()):.6g} at one position")
    inside = np.minimum(inside, -1e-9)
    odds = np.minimum(inside - np.log(-np.expm1(inside)), _MAX_LOG_ODDS)
    scale = 2.0**value_bits
    values = log_probs - np.where(named, log_probs, np.inf).min(1, initial=np.inf, keepdims=True)
    return _rounded((_MAX_LOG_ODDS - odds[:, 0]) * scale), _rounded(values[named] * scale)


def _log_probs(values: Floats, masses: Floats) -> Floats:
    """`[N, k]`, -inf where `values` are; `masses` is `[N, 1]`, both in nats."""
    return values - _log_sum(values) - np.logaddexp(0, masses - _MAX_LOG_ODDS)


def _log_sum(log_probs: Floats) -> Floats:
    """Log of the sum of each row's probabilities, `[N, 1]`."""
    largest = log_probs.max(1, initial=-np.inf, keepdims=True)
    return largest + np.log(np.exp(log_probs - largest).sum(1, keepdims=True))


def _rounded_down(numbers: Floats) -> NDArray[np.float32]:
    """The next fp32 below each, so that a sum of probabilities stays below theirs."""
    rounded = numbers.astype(np.float32)
    return np.where(rounded > numbers, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _spread(flat: NDArray[Any], named: Mask, filling: float) -> NDArray[Any]:
    """One value for each that is `named`, as rows `[N, k]`."""
    rows = np.full(named.shape, filling, flat.dtype)
    rows[named] = flat
    return rows


def _floats(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()


def _rounded(numbers: Floats) -> Ints:
    return np.rint(numbers).astype(np.int64)
