"""The bytes of one document of a sparse teacher: what a record of the cache holds.

A header, then the integers below as Rice codes (`bits.py`), first the unary parts of all, then the low bits of all:

    header       32 bytes, little endian: see `Header`
    counts       [D]  how many positions name each of the D different tokens of the document, less 1
    masses       [n]  the odds of the mass that the position names (see `codec.py`)
    table        [D]  the ids of these tokens, rising: each one's distance from the one before, less 1
    gaps         [S]  the positions that name each of them (see `postings.py`)
    values       [N]  the log-probs of the named tokens, token by token (see `codec.py`)
    draws        [N]  how often each of them was drawn, less 1

Going token by token, a token that is named everywhere takes a bit a position at most, and a rare one little more than
the choice of its positions. Masses and values are missing where the teacher's own log-probs are not known, draws where
nothing was drawn. The header names the parameter of each kind; those of table and gaps follow from how many there are
(`bits.gap_parameters`).
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache import bits
from trl_distill_plugins.teachers.cache.bits import Ints
from trl_distill_plugins.teachers.cache.postings import listed

SAMPLED, WITH_LOG_PROBS = 1, 2  # flags: one of them or both

_MAGIC = b"TDPd"
_VERSION = 2
_MAX_PARAMETER = 32


class Header(NamedTuple):
    """Flags, how log-probs are rounded, Rice parameters, sizes, and the bytes of all unary parts."""

    flags: int
    value_bits: int
    count_r: int
    mass_r: int
    value_r: int
    draw_r: int
    positions: int
    vocabulary: int
    distinct: int
    draws: int
    unary_bytes: int

    @property
    def has_log_probs(self) -> bool:
        return bool(self.flags & WITH_LOG_PROBS)

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)


_START = struct.Struct("<4sH6B5I")


@dataclass(frozen=True)
class Codes:
    """The integers of a document, by kind, in the order of the file; empty where its form has none."""

    counts: Ints
    masses: Ints
    table: Ints
    gaps: Ints
    values: Ints
    draws: Ints


def write(codes: Codes, flags: int, value_bits: int, positions: int, vocabulary: int, draws: int) -> bytes:
    """The bytes of a document."""
    everything = np.concatenate([codes.counts, codes.masses, codes.table, codes.gaps, codes.values, codes.draws])
    best = [bits.rice_parameter(kind) for kind in (codes.counts, codes.masses, codes.values, codes.draws)]
    header = Header._make([flags, value_bits, *best, positions, vocabulary, len(codes.table), draws, 0])
    widths = _parameters(header, codes.counts + 1)
    unary = bits.pack_unary(everything >> widths)
    start = _START.pack(_MAGIC, _VERSION, *header._replace(unary_bytes=len(unary)))
    return start + unary + bits.pack_fields(everything, widths)


def read(blob: memoryview | bytes) -> tuple[Header, Codes]:
    """Header and integers of a document.

    Raises:
        DataError: these bytes are not a whole document.
    """
    blob = memoryview(blob)
    header = _read_header(blob)
    unary, low = blob[_START.size :][: header.unary_bytes], blob[_START.size + header.unary_bytes :]
    highs, distinct = bits.unpack_unary(unary), header.distinct
    if len(unary) < header.unary_bytes or len(highs) < distinct or 8 * len(low) < distinct * header.count_r:
        raise _broken("it is cut short")
    counts = _joined(highs[:distinct], low, np.full(distinct, header.count_r))
    if distinct > header.vocabulary or counts.max(initial=0) >= max(header.positions, not distinct):
        raise _broken("its counts are out of range")
    sizes = _sizes(header, counts + 1)
    if len(highs) != sum(sizes):
        raise _broken("it does not hold what its header says")
    widths = _parameters(header, counts + 1)
    if len(low) != (int(widths.sum()) + 7) // 8:
        raise _broken("its length is not what its header says")
    return header, Codes(*np.split(_joined(highs, low, widths), np.cumsum(sizes)[:-1]))


def _read_header(blob: memoryview) -> Header:
    if len(blob) < _START.size:
        raise _broken("it is cut short")
    magic, version, *fields = _START.unpack_from(blob)
    header = Header._make(fields)
    if magic != _MAGIC:
        raise _broken("it does not start like one")
    if version != _VERSION:
        raise DataError(f"a record of the teacher cache has format {version}; this version reads {_VERSION}")
    if header.flags not in (1, 2, 3) or header.draws < header.is_sampled or max(header[2:6]) > _MAX_PARAMETER:
        raise _broken("its header is out of range")
    return header


def _joined(highs: Ints, low: memoryview, widths: Ints) -> Ints:
    return (highs << widths) + bits.unpack_fields(low, widths)


def _sizes(header: Header, named: Ints) -> list[int]:
    """How many integers of each kind a document has whose tokens are named by that many positions each, `[D]`."""
    total, known, drawn = int(named.sum()), header.has_log_probs, header.is_sampled
    gaps = int(listed(header.positions, named).sum())
    return [header.distinct, header.positions * known, header.distinct, gaps, total * known, total * drawn]


def _parameters(header: Header, named: Ints) -> Ints:
    """The Rice parameter of every integer of such a document."""
    sizes, chosen = _sizes(header, named), listed(header.positions, named)
    table = bits.gap_parameters(np.array([header.vocabulary]), np.array([header.distinct]))
    fixed = np.array([header.count_r, header.mass_r, table[0], 0, header.value_r, header.draw_r])
    parameters = np.repeat(fixed, sizes)
    start = sum(sizes[:3])
    parameters[start : start + sizes[3]] = np.repeat(bits.gap_parameters(np.array([header.positions]), chosen), chosen)
    return parameters


def _broken(what: str) -> DataError:
    return DataError(f"a record of the teacher cache is damaged: {what}")
