"""Random numbers that depend on their purpose, not on earlier draws.

Philox is a counter-based generator: (key, counter) names a stream, and any stream can be opened directly. So a worker
needs no state to draw the views of an image, and neither does a run that resumes. The raw 64-bit output is used
because numpy guarantees that it never changes; the methods of `np.random.Generator` have no such guarantee.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["order", "views", "masks", "strong"]
_STREAMS = {"order": 0, "views": 1, "masks": 2, "strong": 3}

_AT_ONCE = 64
"""Numbers per draw of `uniform_stream`."""


def random_bits(purpose: Purpose, seed: int, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    """Draw the first `count` numbers of the stream of (purpose, seed, epoch, index).

    Args:
        purpose: use of the numbers; each purpose has its own streams.
        seed, epoch, index: 0 to 2^64 - 1.
        count: how many numbers; a longer draw begins with the shorter one.

    Returns:
        [count] uint64.
    """
    return _philox(purpose, seed, epoch, index, 0).random_raw(count)


def view_uniforms(seed: int, epoch: int, index: int, num_views: int, num_uniforms: int) -> NDArray[np.float64]:
    """Draw the uniform random numbers behind the views of one image; row v is the same for any number of views.

    Returns:
        [num_views, num_uniforms] float64 in [0, 1), multiples of 2^-53.
    """
    bits = random_bits("views", seed, epoch, index, num_views * num_uniforms)
    return _uniform(bits).reshape(num_views, num_uniforms)


def uniform_stream(purpose: Purpose, seed: int, epoch: int, index: int, part: int) -> Iterator[float]:
    """Yield uniform random numbers in [0, 1) without end, for one part of (purpose, seed, epoch, index).

    Args:
        purpose, seed, epoch, index: as for `random_bits`, whose numbers are those of part 0.
        part: for example the number of a view; 0 to 2^64 - 1.
    """
    philox = _philox(purpose, seed, epoch, index, part)
    while True:
        yield from _uniform(philox.random_raw(_AT_ONCE)).tolist()


def _philox(purpose: Purpose, seed: int, epoch: int, index: int, part: int) -> np.random.Philox:
    # The generator counts in the first of its four counter words, so streams that differ in the others never meet.
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, part, index, _STREAMS[purpose]], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn every 64 random bits into a multiple of 2^-53 in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(*numbers: int) -> int:
    """Derive a generator seed from a sequence of numbers, such as (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
