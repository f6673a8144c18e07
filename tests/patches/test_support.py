"""Helpers that the patched originals import besides `select()` and `rescue()`."""

import argparse
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from hvp.common.views import normalize
from hvp.common.views.randomness import mix
from hvp.patches.patching import load_patch
from hvp.patches.support import (
    IndexedCollate,
    Rescuable,
    Views,
    allow_plain_checkpoints,
    candidate_crops,
    outputs_of,
    step_generator,
)


def test_views_come_in_the_order_of_the_candidates():
    views = Views((lambda image: f"{image} global", 2), (lambda image: f"{image} local", 1), (str.upper, 0))
    assert views("dog") == ["dog global", "dog global", "dog local"]


def test_candidate_crops_are_of_the_transforms_of_the_crops_that_they_may_become():
    class Augmentation:
        global_transfo1, global_transfo2, local_transfo = "first {}".format, "second {}".format, "local {}".format

    crops = candidate_crops(Augmentation(), 2, 3)("dog")
    assert crops == ["first dog"] * 2 + ["second dog"] * 2 + ["local dog"] * 3


def test_views_of_one_each_draw_the_same_numbers_as_a_plain_list():
    """A patched loader with as many candidates as trained views is the original one."""

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


def test_importing_our_lines_in_dino_draws_no_random_numbers():
    """With the flags off, a patched original is to do what it did, bit for bit. DINO alone never seeds `random`."""
    changes = [change for file in load_patch("dino").files for change in file.changes]
    imports = [line for change in changes for line in change.lines.splitlines() if line.startswith("from hvp")]
    code = ["import random, torch, torchvision", "random.seed(0)", "state = random.getstate()"]
    code += [*imports, "assert random.getstate() == state"]
    assert imports
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """Five pictures of one colour each, seen through a transform that makes all black."""
    (tmp_path / "class").mkdir()
    for i in range(5):
        Image.new("RGB", (24, 20), (50 * i, 10, 200)).save(tmp_path / "class" / f"{i}.png")
    return ImageFolder(str(tmp_path), transforms.Lambda(lambda _: [torch.zeros(3, 8, 8)] * 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rescuable_dataset_says_which_images_it_gave(folder, workers):
    dataset = Rescuable(folder, 8, (0.5, 1.0))
    dataset.strong_views(0, torch.tensor([0]))  # its threads do not get in a worker's way
    (views, index), *_ = DataLoader(dataset, batch_size=3, num_workers=workers)
    assert [tuple(view.shape) for view in views] == [(3, 3, 8, 8)] * 2
    assert index.tolist() == [0, 1, 2]
    assert len(dataset) == 5


def test_strong_views_are_of_the_untransformed_images(folder, monkeypatch):
    monkeypatch.setattr("hvp.common.views.strong.strong_view", lambda image, *_: np.ascontiguousarray(image[:8, :8]))
    expected = torch.tensor([[50, 10, 200], [150, 10, 200]], dtype=torch.uint8)[:, None, None].expand(2, 8, 8, 3)
    chosen = torch.tensor([1, 3])
    strong = Rescuable(folder, 8, (0.5, 1.0)).strong_views(0, chosen)
    torch.testing.assert_close(strong, normalize(expected))
    plain = Rescuable(folder, 8, (0.5, 1.0), normalized=False).strong_views(0, chosen)
    torch.testing.assert_close(plain, expected.movedim(-1, 1) / 255)
    assert folder.transform is not None


def test_strong_views_follow_from_seed_epoch_and_index(tmp_path):
    (tmp_path / "class").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 50, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / "class" / f"{i}.png")

    def strong(seed: int, epoch: int, index: list[int]) -> torch.Tensor:
        dataset = Rescuable(ImageFolder(str(tmp_path)), 16, (0.2, 1.0), seed=seed)
        return dataset.strong_views(epoch, torch.tensor(index))

    both = strong(0, 1, [2, 0])
    assert both.shape == (2, 3, 16, 16)
    assert torch.equal(strong(0, 1, [0])[0], both[1])
    assert not torch.equal(strong(1, 1, [0])[0], both[1])
    assert not torch.equal(strong(0, 2, [0])[0], both[1])


def test_a_rescuable_dataset_pickles_after_use(tmp_path):
    (tmp_path / "class").mkdir()
    Image.new("RGB", (24, 20)).save(tmp_path / "class" / "0.png")
    dataset = Rescuable(ImageFolder(str(tmp_path), transforms.ToTensor()), 8, (0.5, 1.0))
    before = dataset.strong_views(0, torch.tensor([0]))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.strong_views(0, torch.tensor([0])), before)


def test_a_collate_function_gets_the_index_added():
    collate = IndexedCollate(lambda samples: {"views": [views for views, _ in samples]})
    batch = collate([("a", 4), ("b", 2)])
    assert batch["views"] == ["a", "b"]
    assert batch["index"].tolist() == [4, 2]


def test_outputs_are_collected_with_gradient_until_closed():
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.rand(4, 3)
    with outputs_of(layer) as outputs:
        model(x)
        model(2 * x)
    model(x)
    assert torch.equal(torch.stack(outputs), torch.stack([layer(x), layer(2 * x)]))
    outputs[0].sum().backward()
    assert layer.weight.grad is not None


def test_checkpoints_with_arguments_and_numbers_are_read(tmp_path):
    content = {"args": argparse.Namespace(lr=0.1), "lr": np.float64(0.1), "weight": torch.ones(2)}
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint.pth")
    try:
        allow_plain_checkpoints()
        assert torch.load(tmp_path / "checkpoint.pth")["args"].lr == 0.1
    finally:
        torch.serialization.clear_safe_globals()
