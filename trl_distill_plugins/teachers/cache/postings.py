"""Which positions of a document name each of its tokens, as small integers.

A token's positions are listed, or those that do not name it where these are fewer. Lists stand one after the other,
token by token, each one rising, as gaps: the distance from the number before in the list, less 1.
"""

import numpy as np
from numpy.typing import NDArray

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.bits import Ints


def listed(total: int, counts: Ints) -> Ints:
    """How many positions are listed of tokens that `counts` out of `total` name."""
    return np.minimum(counts, total - counts)


def to_gaps(numbers: Ints, sizes: Ints) -> Ints:
    """The gaps of lists of `sizes[i]` rising numbers each."""
    before = np.concatenate([[-1], numbers[:-1]])[: len(numbers)]
    starts = np.cumsum(sizes) - sizes
    before[starts[sizes > 0]] = -1
    return numbers - before - 1


def from_gaps(gaps: Ints, sizes: Ints) -> Ints:
    """The numbers of `to_gaps`."""
    sums = np.concatenate([[0], np.cumsum(gaps + 1)])
    return sums[1:] - np.repeat(sums[np.cumsum(sizes) - sizes], sizes) - 1


def pack_positions(positions: Ints, counts: Ints, total: int) -> Ints:
    """The gaps of the positions below `total` that name each token, of which the i-th has `counts[i]`."""
    return to_gaps(_turned(positions, counts, counts > total - counts, total), listed(total, counts))


def unpack_positions(gaps: Ints, counts: Ints, total: int) -> Ints:
    """The positions that `pack_positions` was given. Raises `DataError` where gaps lead out of the document."""
    sizes = listed(total, counts)
    positions = from_gaps(gaps, sizes)
    if len(positions) and not 0 <= positions.min() <= positions.max() < total:
        raise DataError("a record of the teacher cache is damaged: it names tokens at positions it does not have")
    return _turned(positions, sizes, counts > sizes, total)


def _turned(positions: Ints, sizes: Ints, turned: NDArray[np.bool_], total: int) -> Ints:
    """The same lists, each one that is `turned` with all other positions in place of its own."""
    old, new = np.repeat(turned, sizes), np.repeat(turned, np.where(turned, total - sizes, sizes))
    others = np.ones((int(turned.sum()), total), np.bool_)
    others[np.repeat(np.arange(len(others)), sizes[turned]), positions[old]] = False
    out = np.empty(len(new), np.int64)
    out[new], out[~new] = others.nonzero()[1], positions[~old]
    return out
