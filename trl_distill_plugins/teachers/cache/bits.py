"""Rice codes of whole arrays at once: an unsigned integer v with parameter r is `v >> r` in unary, then r low bits.

The unary parts of all codes lie in one string of bits (that many zeros, then a one), the low bits in another, so that
both are read without a loop. Bits fill each byte from its lowest one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# A field is cut out of the 8 bytes it starts in.
MAX_WIDTH = 57


def rice_parameter(values: Ints) -> int:
    """The r with which Rice codes of `values` take the fewest bits."""
    widest = int(values.max(initial=0)).bit_length()
    sizes = [int((values >> r).sum()) + r * len(values) for r in range(widest + 1)]
    return sizes.index(min(sizes))


def gap_parameters(universe: Ints, chosen: Ints) -> Ints:
    """The r for the gaps of `chosen` sorted integers below `universe`: `floor(log2(ln 2 x mean gap))`, at least 0."""
    scaled = universe * 177 // (256 * np.maximum(chosen, 1))  # 177 / 256 is ln 2
    return np.frexp(np.maximum(scaled, 1).astype(np.float64))[1].astype(np.int64) - 1


def pack_unary(values: Ints) -> bytes:
    """Write each of `values` as that many zeros and a one."""
    ones = np.cumsum(values + 1) - 1
    bits = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_unary(packed: memoryview) -> Ints:
    """Every value that `pack_unary` wrote."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    return np.diff(np.flatnonzero(bits), prepend=-1) - 1


def pack_fields(values: Ints, widths: Ints) -> bytes:
    """Write the lowest `widths[i]` bits of each `values[i]`, one after the other."""
    starts = np.cumsum(widths) - widths
    place = np.arange(int(widths.sum())) - np.repeat(starts, widths)
    bits = (np.repeat(values, widths) >> place) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def unpack_fields(packed: memoryview, widths: Ints) -> Ints:
    """What `pack_fields` wrote with these `widths`, at most `MAX_WIDTH` each; `packed` holds at least their sum."""
    padded = np.zeros(len(packed) + 8, np.uint8)
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    windows: NDArray[Any] = np.ndarray(len(packed) + 1, "<i8", padded, strides=(1,))
    starts = np.cumsum(widths) - widths
    return (windows[starts >> 3] >> (starts & 7)) & ((1 << widths) - 1)
