"""What the patched originals import besides `select()`."""

import torch

from hvp.common.engine.run import mix
from hvp.common.upstream import Views, step_generator


def test_views_come_in_the_order_of_the_candidates():
    views = Views((lambda image: f"{image} global", 2), (lambda image: f"{image} local", 1), (str.upper, 0))
    assert views("dog") == ["dog global", "dog global", "dog local"]


def test_views_of_one_each_draw_the_same_numbers_as_a_plain_list():
    """So that a patched loader whose candidates are no more than the trained views is the original one."""

    def draw(image: int) -> float:
        return image + torch.rand(()).item()

    torch.manual_seed(0)
    plain = [draw(1), draw(1), draw(1)]
    torch.manual_seed(0)
    assert Views((draw, 1), (draw, 2))(1) == plain


def test_a_step_has_the_generator_of_our_trainers():
    expected = torch.rand(3, generator=torch.Generator().manual_seed(mix(7, 100)))
    assert torch.equal(torch.rand(3, generator=step_generator(7, 100)), expected)
    assert not torch.equal(torch.rand(3, generator=step_generator(7, 101)), expected)
