"""Random numbers that depend on what they are for, not on what was drawn before.

Philox is a counter-based generator: (key, counter) names a stream and any stream can be opened at once. So a worker
needs no state to draw the views of an image, and neither does a run that resumes. The raw 64-bit output is used
because numpy promises that it never changes, which it does not for the methods of `np.random.Generator`.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

_STREAMS = {"order": 0, "views": 1}


def random_bits(
    purpose: Literal["order", "views"], seed: int, epoch: int, index: int, count: int
) -> NDArray[np.uint64]:
    """The first `count` numbers of the stream that belongs to (purpose, seed, epoch, index).

    Args:
        purpose: what they are for; each has streams of its own.
        seed, epoch, index: 0 to 2^64 - 1.
        count: how many; a longer draw begins with the shorter one.

    Returns:
        [count] uint64.
    """
    # The generator counts up in the first of its four counter words, so streams that differ in the others never meet.
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, index, _STREAMS[purpose]], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=counter)
    return philox.random_raw(count)


def view_uniforms(seed: int, epoch: int, index: int, num_views: int, num_uniforms: int) -> NDArray[np.float64]:
    """The uniform random numbers behind the views of one image; row v is the same for any number of views.

    Returns:
        [num_views, num_uniforms] float64 in [0, 1), multiples of 2^-53.
    """
    bits = random_bits("views", seed, epoch, index, num_views * num_uniforms)
    return (bits >> np.uint64(11)).astype(np.float64).reshape(num_views, num_uniforms) * 2.0**-53
