"""The Rescue loss against the formula, and the choice of images over several processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from hvp.common import rescue
from hvp.common.rescue import easiest
from hvp.common.training.distributed import World
from tests.processes import in_two_processes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_cosines(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Make two features for each image, with the given cosines."""
    angle = cosines.acos()
    return torch.tensor([[1.0, 0.0]]).expand(len(cosines), -1), torch.stack((angle.cos(), angle.sin()), dim=1)


def never_called(_: Tensor) -> Tensor:
    raise AssertionError("nothing to make")


@given(st.integers(1, 12), st.data())
def test_easiest_images_equal_a_plain_sort(num_images, data):
    levels = data.draw(st.lists(st.integers(-8, 8), min_size=num_images, max_size=num_images))  # with ties
    k = data.draw(st.integers(1, num_images))
    by_hand = sorted(range(num_images), key=lambda image: (-levels[image], image))
    chosen, values = easiest(*with_cosines(torch.tensor(levels) / 10), k), by_hand[:k]
    assert chosen[0].tolist() == values
    torch.testing.assert_close(chosen[1], torch.tensor([levels[image] / 10 for image in values]))
    assert chosen[1].dtype == torch.float32


def test_non_finite_similarities_come_last():
    z_a, z_b = noise(4, 3), noise(4, 3, seed=1)
    z_a[1, 0], z_b[2, 1] = torch.nan, torch.inf
    assert set(easiest(z_a, z_b, 2)[0].tolist()) == {0, 3}
    assert easiest(z_a, z_b, 4)[0].tolist()[2:] == [1, 2]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_the_batch_is_an_error(k):
    with pytest.raises(ValueError, match=rf"k = {k} of 4 images"):
        rescue(noise(4, 3), noise(4, 3), never_called, never_called, k)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"\[4, 3\] and z_b \[4, 2\]"):
        rescue(noise(4, 3), noise(4, 2), never_called, never_called, 1)
    with pytest.raises(ValueError, match=r"encode made \[2, 5\] of 2 views, but z_a is \[B, 3\]"):
        rescue(noise(4, 3), noise(4, 3), lambda index: index, lambda index: noise(len(index), 5), 2)


def test_the_loss_equals_the_papers_formula():
    """Strong views are made only for the two of six images whose views are most alike."""
    z_a, z_b, z_strong = noise(6, 4), noise(6, 4, seed=1), noise(6, 4, seed=2)
    asked = []

    def strong(index: Tensor) -> Tensor:
        asked.append(index.tolist())
        return index

    found = rescue(z_a, z_b, strong, lambda index: z_strong[index], 2)
    similarity = [float(normalize(a, dim=0) @ normalize(b, dim=0)) for a, b in zip(z_a, z_b, strict=True)]
    top = sorted(range(6), key=lambda image: -similarity[image])[:2]
    assert asked == [top]
    assert found.index.tolist() == top
    towards = [float(normalize(z_a[i], dim=0) @ normalize(z_strong[i], dim=0)) for i in top]
    assert found.loss.item() == pytest.approx(-np.mean(towards), abs=1e-6)
    assert found.similarity.tolist() == pytest.approx([similarity[i] for i in top], abs=1e-6)
    assert found.strong_similarity.tolist() == pytest.approx(towards, abs=1e-6)
    pushed = rescue(z_a, z_b, strong, lambda index: z_strong[index], 2, direction="push")
    assert pushed.loss.item() == -found.loss.item()


def plain_loss(z_a: np.ndarray, z_b: np.ndarray, strong: np.ndarray, *, k: int) -> float:
    """Rescue loss written out in float64."""

    def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))

    top = np.argsort(-cosine(z_a, z_b), kind="stable")[:k]
    return float(-cosine(z_a[top], strong[top]).mean())


def test_the_gradient_equals_finite_differences():
    tensors = [noise(5, 3, seed=seed).requires_grad_() for seed in range(3)]
    z_a, z_b, z_strong = tensors
    rescue(z_a, z_b, lambda index: index, lambda index: z_strong[index], 2).loss.backward()
    arrays = [tensor.detach().double().numpy() for tensor in tensors]
    step = 1e-6
    for tensor, array in zip(tensors, arrays, strict=True):
        slopes = np.zeros_like(array)
        for entry in np.ndindex(array.shape):
            kept = array[entry]
            array[entry] = kept + step
            above = plain_loss(*arrays, k=2)
            array[entry] = kept - step
            slopes[entry] = (above - plain_loss(*arrays, k=2)) / (2 * step)
            array[entry] = kept
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-4, atol=1e-6)
    assert z_a.grad is not None
    assert z_a.grad.abs().sum() > 0
    assert z_b.grad is None  # it only takes part in the choice


def test_stop_gradient_pulls_the_strong_view_only():
    z_a, z_strong = noise(4, 3).requires_grad_(), noise(4, 3, seed=1).requires_grad_()
    free = rescue(z_a, noise(4, 3, seed=2), lambda i: i, lambda i: z_strong[i], 2)
    held = rescue(z_a, noise(4, 3, seed=2), lambda i: i, lambda i: z_strong[i], 2, stop_gradient=True)
    assert held.loss.item() == free.loss.item()
    held.loss.backward()
    assert z_a.grad is None
    assert z_strong.grad is not None


def test_cosines_are_float32_under_autocast():
    z = noise(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rescue(z.bfloat16(), z.bfloat16(), lambda i: i, lambda i: z[i].bfloat16(), 4)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(-1, abs=1e-6)


KS = (1, 2, 3, 8)


def of_batch(k: int, world: World = World()) -> tuple[list[Tensor], list[int]]:
    """Rescue eight images, or this process's four: loss, gradients of weight and features; the rescued images."""
    z_a, z_b, strong = noise(8, 4), noise(8, 4, seed=1), noise(8, 4, seed=2)
    z_b[[1, 2, 6]] = z_a[[1, 2, 6]]  # the easiest, most of them in the first process
    z_a, z_b = (z.chunk(world.size)[world.rank].clone().requires_grad_() for z in (z_a, z_b))
    weight = torch.eye(4).requires_grad_()
    encoded: list[int] = []

    def encode(x: Tensor) -> Tensor:
        encoded.append(len(x))
        return x @ weight

    done = rescue(z_a, z_b, lambda index: strong[index], encode, k, world=world)
    done.loss.backward()
    assert encoded == [-(-k // world.size)]
    assert z_b.grad is None
    assert len(done.strong_similarity) == len(range(world.rank, k, world.size))
    assert weight.grad is not None
    assert z_a.grad is not None
    return [done.loss.detach(), weight.grad, z_a.grad, done.similarity], done.index.tolist()


def _rescue_batches(world: World, report: Callable[[Any], None]) -> None:
    for k in KS:
        report(of_batch(k, world))


def test_processes_rescue_the_easiest_of_all_and_share_the_work(tmp_path):
    ranks = in_two_processes(_rescue_batches, tmp_path)
    for k, *results in zip(KS, *ranks, strict=True):
        (loss, weight, z_a, similarity), index = of_batch(k)
        for tensors, chosen in results:
            assert chosen == index
            torch.testing.assert_close(tensors[3], similarity)
        mean = [torch.stack([tensors[i] for tensors, _ in results]).mean(0) for i in (0, 1)]
        torch.testing.assert_close(mean, [loss, weight])
        # each process's loss covers its own images, so feature gradients are averaged like those of the weights
        torch.testing.assert_close(torch.cat([tensors[2] for tensors, _ in results]) / 2, z_a)
