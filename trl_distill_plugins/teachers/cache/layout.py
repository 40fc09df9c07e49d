"""The bytes of one document of a sparse teacher: what a record of the cache holds.

A header, then the integers below as Rice codes (`bits.py`), first the unary parts of all, then the low bits of all:

    header       32 bytes, little endian: see `Header`
    counts       [n]  tokens that the position names, less 1
    masses       [n]  the odds of the mass that the position names (see `codec.py`)
    table        [D]  the D different ids of the document, rising: each one's distance from the one before, less 1
    gaps         [N]  the same of each position's places in that table, position by position
    values       [N]  the log-probs of these tokens (see `codec.py`)
    draws        [N]  how often each of them was drawn, less 1

Masses and values are missing where the teacher's own log-probs are not known, draws where nothing was drawn. The header
names the parameter of each kind; those of table and gaps follow from how many there are (`bits.gap_parameters`).
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache import bits
from trl_distill_plugins.teachers.cache.bits import Ints

SAMPLED, WITH_LOG_PROBS = 1, 2  # flags: one of them or both

_MAGIC = b"TDPd"
_VERSION = 1
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


def write(codes: Codes, flags: int, value_bits: int, vocabulary: int, draws: int) -> bytes:
    """The bytes of a document."""
    everything = np.concatenate([codes.counts, codes.masses, codes.table, codes.gaps, codes.values, codes.draws])
    best = [bits.rice_parameter(kind) for kind in (codes.counts, codes.masses, codes.values, codes.draws)]
    header = Header._make([flags, value_bits, *best, len(codes.counts), vocabulary, len(codes.table), draws, 0])
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
    highs, n = bits.unpack_unary(unary), header.positions
    if len(unary) < header.unary_bytes or len(highs) < n or 8 * len(low) < n * header.count_r:
        raise _broken("it is cut short")
    counts = _joined(highs[:n], low, np.full(n, header.count_r))
    if n and not 0 <= counts.max() < header.distinct <= header.vocabulary:
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
    """How many integers of each kind a document has whose positions name that many tokens, `[n]`."""
    n, total, known, drawn = header.positions, int(named.sum()), header.has_log_probs, header.is_sampled
    return [n, n * known, header.distinct, total, total * known, total * drawn]


def _parameters(header: Header, named: Ints) -> Ints:
    """The Rice parameter of every integer of such a document."""
    sizes = _sizes(header, named)
    table = bits.gap_parameters(np.array([header.vocabulary]), np.array([header.distinct]))
    gaps = np.repeat(bits.gap_parameters(np.array([header.distinct]), named), named)
    fixed = np.array([header.count_r, header.mass_r, table[0], 0, header.value_r, header.draw_r])
    parameters = np.repeat(fixed, sizes)
    start = sum(sizes[:3])
    parameters[start : start + sizes[3]] = gaps
    return parameters


def _broken(what: str) -> DataError:
    return DataError(f"a record of the teacher cache is damaged: {what}")
