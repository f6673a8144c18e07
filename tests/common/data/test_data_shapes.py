"""The embedded dataset: reproducible images, no duplicates, and light figures on a dark background."""

import hashlib
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from hvp.common.data import ImageSource, ShapesOptions, open_dataset
from hvp.common.data import shapes as module
from hvp.common.data.shapes import CLASSES, CLUTTER, OUTLINES, Shapes

SPLITS = st.sampled_from(["train", "val"])
SEEDS = st.integers(0, 2**32 - 1)


def digest(source: ImageSource, count: int) -> str:
    return hashlib.sha256(b"".join(source.read(i).tobytes() for i in range(count))).hexdigest()


def luminance(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.299, 0.587, 0.114])


@given(size=st.integers(16, 256), seed=SEEDS, split=SPLITS, index=st.integers(0, 1999))
def test_any_size_gives_a_writable_rgb_image(size, seed, split, index):
    image = Shapes(ShapesOptions(size=size, seed=seed), split).read(index)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable


@given(seed=SEEDS, split=SPLITS, index=st.integers(0, 99), count=st.integers(100, 2**24))
def test_an_image_does_not_depend_on_the_number_of_images(seed, split, index, count):
    few = Shapes(ShapesOptions(size=16, seed=seed, train=100, val=100), split)
    many = Shapes(ShapesOptions(size=16, seed=seed, train=count, val=count), split)
    assert np.array_equal(few.read(index), many.read(index))


def test_images_do_not_depend_on_the_order_of_reading():
    source = Shapes(ShapesOptions(size=16), "train")
    forward = [source.read(i) for i in range(20)]
    backward = [source.read(i) for i in reversed(range(20))][::-1]
    assert np.array_equal(forward, backward)


def test_images_are_the_same_in_another_process():
    script = (
        "import hashlib; from hvp.common.data import open_dataset; s = open_dataset('shapes', 'val');"
        "print(hashlib.sha256(b''.join(s.read(i).tobytes() for i in range(20))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    assert there == digest(open_dataset("shapes", "val"), 20)


def test_no_image_occurs_twice():
    options = [ShapesOptions(size=16, train=300, val=300, seed=seed) for seed in (0, 1)]
    sources = [Shapes(o, split) for o in options for split in ("train", "val")]
    images = {source.read(i).tobytes() for source in sources for i in range(len(source))}
    assert len(images) == 1200


def test_the_scene_does_not_depend_on_the_size():
    small, large = (Shapes(ShapesOptions(size=size), "train") for size in (64, 256))
    for index in range(30):
        shrunk = cv2.resize(large.read(index), (64, 64), interpolation=cv2.INTER_AREA)
        # Noise of up to 10 levels at 64 pixels, a quarter of it after shrinking.
        error = luminance(cv2.blur(shrunk, (5, 5)).astype(float) - cv2.blur(small.read(index), (5, 5)))
        assert np.abs(error).mean() < 3, index


def test_there_are_ten_balanced_classes():
    labels = Shapes(ShapesOptions(), "train").labels()
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [600] * 10
    assert len(CLASSES) == len(set(CLASSES)) == 10


@pytest.mark.parametrize("label", range(10))
def test_the_label_matches_the_drawn_outline(label, monkeypatch):
    drawn = []
    pose = module._pose

    def recorded(outline: list[module.Contour], rng: np.random.Generator) -> list[module.Contour]:
        drawn.append(outline)
        return pose(outline, rng)

    monkeypatch.setattr(module, "_pose", recorded)
    source = Shapes(ShapesOptions(size=16), "val")
    source.read(label + 50)
    assert drawn[0] is OUTLINES[source.classes[source.labels()[label + 50]]]


@given(seed=SEEDS, name=st.sampled_from(CLASSES))
def test_figures_exceed_the_frame_by_a_margin_at_most(seed, name):
    corners = np.concatenate(module._pose(OUTLINES[name], np.random.default_rng(seed)))
    assert corners.min() >= -0.04 - 1e-9
    assert corners.max() <= 1.04 + 1e-9


@given(seed=SEEDS)
def test_clutter_is_smaller_than_any_figure(seed):
    rng = np.random.default_rng(seed)
    clutter = [np.ptp(np.concatenate(draw(rng)), axis=0).max() for draw in CLUTTER]
    figure = min(np.ptp(np.concatenate(module._pose(outline, rng)), axis=0).max() for outline in OUTLINES.values())
    assert max(clutter) < figure


@given(st.floats(0, 1), st.floats(0, 1), st.floats(20, 235))
def test_colours_have_the_requested_luminance(hue, saturation, wanted):
    colour = module._colour(hue, saturation, wanted)
    assert luminance(colour.reshape(3)) == pytest.approx(wanted, abs=1e-3)
    assert colour.min() >= -1e-3
    assert colour.max() <= 255 + 1e-3


def test_figures_are_lighter_than_their_background(monkeypatch):
    masks = []
    coverage = module._coverage

    def recorded(contours: list[module.Contour], size: int) -> module.Field:
        masks.append(coverage(contours, size))
        return masks[-1]

    monkeypatch.setattr(module, "_coverage", recorded)
    source = Shapes(ShapesOptions(), "train")
    for index in range(100):
        masks.clear()
        grey = luminance(cv2.blur(source.read(index), (3, 3)))
        *clutter, figure = masks
        ground = sum(clutter, start=figure) == 0
        assert np.median(grey[figure == 1]) > 145
        assert np.median(grey[ground]) < 105


@given(
    corner=hnp.arrays(np.float64, 2, elements=st.floats(0.05, 0.4)),
    side=hnp.arrays(np.float64, 2, elements=st.floats(0.1, 0.5)),
)
def test_coverage_is_the_area(corner, side):
    box = corner + side * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    area = module._coverage([box], 64).mean()
    # OpenCV also fills the points on the outline, about half a point on every side.
    assert area == pytest.approx(side.prod(), abs=2 * side.sum() / 256)


def test_pixels_alone_do_not_tell_the_classes_apart():
    options = ShapesOptions(size=16, train=2000, val=500)
    (train, train_labels), (val, val_labels) = (
        (np.stack([s.read(i) for i in range(len(s))]).reshape(len(s), -1).astype(np.float32), s.labels())
        for s in (Shapes(options, "train"), Shapes(options, "val"))
    )
    distance = (train**2).sum(axis=1) - 2 * val @ train.T  # [val, train], up to a constant per row
    nearest = np.argpartition(distance, 20, axis=1)[:, :20]
    votes = np.eye(10)[train_labels[nearest]].sum(axis=1)
    accuracy = (votes.argmax(axis=1) == val_labels).mean()
    assert 0.1 < accuracy < 0.45


@pytest.mark.parametrize(("key", "value"), [("size", 7), ("train", 0), ("val", -1), ("seed", -1), ("seed", 2**32)])
def test_messages_name_the_invalid_option(key, value):
    with pytest.raises(ValidationError) as caught:  # which hvp.common.config.resolving turns into a message
        ShapesOptions(**{key: value})
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


def test_names_and_bounds():
    source = open_dataset("shapes", "val", shapes=ShapesOptions(val=30), labels=True)
    assert len(source) == 30
    assert source.name == "shapes (val, 30 images)"
    assert source.describe(17) == "shapes val 17"
    for index in (-1, 30):
        with pytest.raises(IndexError):
            source.read(index)


def test_a_source_can_be_pickled():
    source = Shapes(ShapesOptions(size=32, seed=5), "val")
    assert digest(pickle.loads(pickle.dumps(source)), 3) == digest(source, 3)
