"""Each purpose has its own stream of random numbers."""

from itertools import islice, product

import numpy as np

from hvp.common.views.randomness import Purpose, random_bits, uniform_stream, view_uniforms


def first(count: int, *names: int, purpose: Purpose = "masks") -> list[float]:
    return list(islice(uniform_stream(purpose, *names), count))


def test_a_stream_does_not_depend_on_how_it_is_read() -> None:
    bits = random_bits("masks", 3, 1, 7, 1000)
    expected = ((bits >> np.uint64(11)) * 2.0**-53).tolist()
    assert first(1000, 3, 1, 7, 0) == expected
    stream = uniform_stream("masks", 3, 1, 7, 0)
    assert [next(stream) for _ in range(1000)] == expected
    assert 0 <= min(expected) < max(expected) < 1


def test_all_streams_differ() -> None:
    streams = [tuple(first(3, *names)) for names in product((0, 1), repeat=4)]
    streams.append(tuple(first(3, 0, 0, 0, 0, purpose="order")))
    streams.append(tuple(first(3, 0, 0, 0, 0, purpose="views")))
    assert len(set(streams)) == len(streams)


def test_views_use_the_stream_of_their_image() -> None:
    uniforms = view_uniforms(3, 1, 7, 4, 5)
    assert uniforms.flatten().tolist() == first(20, 3, 1, 7, 0, purpose="views")
    assert (view_uniforms(3, 1, 7, 2, 5) == uniforms[:2]).all()
