"""Strong views: operations, Cutout and crop; they depend only on (seed, epoch, image index)."""

import math
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from hvp.common.data import BadImage, open_dataset
from hvp.common.views import strong
from hvp.common.views.parameters import NUM_UNIFORMS, ViewSlot, ViewTransform, sample_parameters
from hvp.common.views.pil import render
from hvp.common.views.randomness import uniform_stream
from hvp.common.views.strong import GREY, OPERATIONS, StrongTransform, StrongViews, strong_view

VIEW = ViewTransform(size=32, scale=(0.2, 1.0), blur=1.0, solarize=1.0)
FOLDER = [f"image{number}.png" for number in range(6)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number, name in enumerate(FOLDER):
        Image.fromarray(rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def source(folder):
    return open_dataset(str(folder), "train")


def photograph() -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x % 256, 6 * y % 256, (x * y) % 256], axis=-1).astype(np.uint8)


def test_operations_equal_fixmatchs():
    """Source: its Table 12. Posterize ends at 9 and solarize at 257 because their magnitudes are rounded down."""
    assert {name: (op.first, op.last) for name, op in OPERATIONS.items()} == {
        "autocontrast": (0, 0),
        "brightness": (0.05, 0.95),
        "color": (0.05, 0.95),
        "contrast": (0.05, 0.95),
        "equalize": (0, 0),
        "identity": (0, 0),
        "posterize": (4, 9),
        "rotate": (-30, 30),
        "sharpness": (0.05, 0.95),
        "shear_x": (-0.3, 0.3),
        "shear_y": (-0.3, 0.3),
        "solarize": (0, 257),
        "translate_x": (-0.3, 0.3),
        "translate_y": (-0.3, 0.3),
    }


@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.5, 0.75, 0.999])
@pytest.mark.parametrize(
    ("name", "theirs", "magnitude"),
    [
        ("identity", "Identity", lambda m, _: 0.0),
        ("autocontrast", "AutoContrast", lambda m, _: 0.0),
        ("equalize", "Equalize", lambda m, _: 0.0),
        ("brightness", "Brightness", lambda m, _: m - 1),
        ("color", "Color", lambda m, _: m - 1),
        ("contrast", "Contrast", lambda m, _: m - 1),
        ("sharpness", "Sharpness", lambda m, _: m - 1),
        ("posterize", "Posterize", lambda m, _: int(m)),
        ("solarize", "Solarize", lambda m, _: int(m)),
        ("rotate", "Rotate", lambda m, _: m),
        ("shear_x", "ShearX", lambda m, _: m),
        ("shear_y", "ShearY", lambda m, _: m),
        ("translate_x", "TranslateX", lambda m, size: round(m * size[0])),
        ("translate_y", "TranslateY", lambda m, size: round(m * size[1])),
    ],
)
def test_each_operation_equals_torchvisions_randaugment(name, theirs, magnitude, uniform):
    image = Image.fromarray(photograph())
    op = OPERATIONS[name]
    value = magnitude(op.first + (op.last - op.first) * uniform, image.size)
    expected = _apply_op(image, theirs, value, InterpolationMode.NEAREST, None)
    np.testing.assert_array_equal(np.asarray(op(image, uniform)), np.asarray(expected))


def test_without_operations_and_cutout_only_the_crop_is_left():
    image = photograph()
    numbers = np.random.default_rng(0).random(NUM_UNIFORMS)
    plain = ViewTransform(size=32, scale=(0.2, 1.0), jitter=0, grayscale=0, blur=0)
    rows = sample_parameters(numbers[None], image.shape[:2], (ViewSlot("plain", plain, 1, 1),))
    expected = np.empty((1, 32, 32, 3), dtype=np.uint8)
    render(image, rows, plain, expected)
    found = strong_view(image, iter(numbers), StrongTransform(VIEW, num_ops=0, cutout=0))
    np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_array_equal(image, photograph())


def test_every_operation_is_drawn_equally_often(monkeypatch):
    drawn: Counter[str] = Counter()

    def counting(name: str) -> strong.Operation:
        def count(image: Image.Image, _: float) -> Image.Image:
            drawn[name] += 1
            return image

        return strong.Operation(count)

    monkeypatch.setattr(strong, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    image, transform = np.zeros((4, 4, 3), dtype=np.uint8), StrongTransform(VIEW, num_ops=2)
    for index in range(1400):
        strong_view(image, uniform_stream("strong", 0, 0, index, 0), transform)
    assert sum(drawn.values()) == 2800
    assert set(drawn) == set(OPERATIONS)
    assert all(abs(count - 200) < 4 * math.sqrt(200) for count in drawn.values())


@pytest.mark.parametrize("where", [(0.0, 0.0), (0.5, 0.5), (0.999, 0.2)])
def test_cutout_is_a_grey_square_inside_the_image(where):
    white = Image.new("RGB", (60, 40), (255, 255, 255))
    found = np.asarray(strong._cut_out(white, 0.5, *where))
    grey = (found == GREY).all(axis=2)
    assert (found[~grey] == 255).all()
    rows, columns = np.where(grey)
    assert grey.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    if where == (0.5, 0.5):
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 20)
    else:
        assert 0 < grey.sum() < 400
    assert (np.asarray(white) == 255).all()


def views(source, keys, *, seed=0, threads=2) -> torch.Tensor:
    made = StrongViews(source, StrongTransform(VIEW), seed=seed, threads=threads)
    try:
        return made(keys)
    finally:
        made.close()


def test_a_view_depends_only_on_seed_epoch_and_image(source):
    keys = [(1, index) for index in range(6)]
    found = views(source, keys)
    assert (found.shape, found.dtype) == ((6, 32, 32, 3), torch.uint8)
    assert torch.equal(views(source, keys, threads=5), found)
    assert torch.equal(views(source, keys[::-1]).flip(0), found)
    assert torch.equal(views(source, keys[2:3])[0], found[2])
    for other in (views(source, [(2, index) for index in range(6)]), views(source, keys, seed=1)):
        assert all(not torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_messages_name_a_missing_image(source, folder):
    (folder / FOLDER[3]).unlink()
    with pytest.raises(BadImage, match=FOLDER[3]):
        views(source, [(0, 2), (0, 3)])


def test_reading_in_threads_keeps_the_warning_filters(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(source.read, [index % 6 for index in range(200)]))
        assert warnings.filters == before


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
def test_operations_keep_the_size_of_extreme_images(shape):
    """Padding such an image to a square would need gigabytes."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for name, operation in OPERATIONS.items():
        assert operation(Image.fromarray(image), 0.99).size == shape[::-1], name
    for index in range(10):
        view = strong_view(image, uniform_stream("strong", 0, 0, index, 0), StrongTransform(VIEW))
        assert view.shape == (32, 32, 3)
