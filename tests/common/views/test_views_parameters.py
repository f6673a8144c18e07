"""Views are distributed like torchvision's, and depend only on (seed, epoch, index, view number)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_1samp, ks_2samp, uniform
from torchvision import transforms

from hvp.common.errors import UserError
from hvp.common.views.parameters import (
    COLUMNS,
    JITTER_ORDERS,
    NUM_UNIFORMS,
    ViewParameters,
    ViewSlot,
    ViewTransform,
    resolutions,
    sample_parameters,
    view_layout,
    view_slots,
)
from hvp.common.views.randomness import random_bits, view_uniforms

ROWS = 100_000


def draw(transform: ViewTransform, size: tuple[int, int], rows: int = ROWS, seed: int = 0) -> Any:
    """Draw independent views: ViewParameters of columns [rows], in float64."""
    uniforms = np.random.default_rng(seed).random((rows, 1, NUM_UNIFORMS))
    parameters = sample_parameters(uniforms, size, [ViewSlot("view", transform, 1, 1)])
    return ViewParameters(*np.moveaxis(parameters[:, 0].astype(np.float64), -1, 0))


@pytest.mark.parametrize(
    ("size", "scale"),
    [((375, 500), (0.4, 1.0)), ((375, 500), (0.05, 0.4)), ((64, 64), (0.14, 1.0)), ((60, 100), (0.8, 1.0))],
)
def test_crops_are_distributed_like_torchvisions(size, scale):
    ours = draw(ViewTransform(size=224, scale=scale, blur=0.0), size)
    image = torch.empty(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(6000)]
        )
    for name, reference in zip(("top", "left", "height", "width"), theirs.T, strict=True):
        assert ks_2samp(getattr(ours, name), reference).pvalue > 1e-3, name
    assert ks_2samp(ours.width / ours.height, theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3
    assert ks_2samp(ours.width * ours.height, theirs[:, 3] * theirs[:, 2]).pvalue > 1e-3


def plain_crop(uniforms: np.ndarray, size: tuple[int, int], transform: ViewTransform) -> tuple[int, int, int, int]:
    """RandomResizedCrop of one view, written out: top, left, height, width."""
    height, width = size
    low, high = math.log(transform.ratio[0]), math.log(transform.ratio[1])
    for attempt in range(10):
        area = height * width * (transform.scale[0] + uniforms[attempt] * (transform.scale[1] - transform.scale[0]))
        ratio = math.exp(low + uniforms[10 + attempt] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(uniforms[20] * (height - h + 1)), math.floor(uniforms[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < transform.ratio[0]:
        h = round(width / transform.ratio[0])
    elif width / height > transform.ratio[1]:
        w = round(height * transform.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (1, 1), (3, 2), (40, 400), (400, 40), (1, 50)])
def test_crops_equal_the_loop_written_out(size):
    transform = ViewTransform(size=8, scale=(0.3, 1.0), blur=0.0)
    uniforms = np.random.default_rng(1).random((500, 1, NUM_UNIFORMS))
    rows = sample_parameters(uniforms, size, [ViewSlot("view", transform, 1, 1)])[:, 0]
    first = COLUMNS.index("top")
    assert rows[:, first : first + 4].tolist() == [list(plain_crop(u[0], size, transform)) for u in uniforms]


@pytest.mark.parametrize("size", [(40, 400), (400, 40), (10, 1000)])
def test_the_fallback_equals_torchvisions(size):
    # No crop of 90 % of such an image has an allowed ratio, so every crop is the central one.
    ours = draw(ViewTransform(size=8, scale=(0.9, 1.0), blur=0.0), size, rows=50)
    box = transforms.RandomResizedCrop.get_params(torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3])
    for column, value in zip((ours.top, ours.left, ours.height, ours.width), box, strict=True):
        assert (column == value).all()


def test_jitter_is_distributed_like_torchvisions():
    strengths: dict[str, Any] = {"brightness": 0.4, "contrast": 1.3, "saturation": 0.2, "hue": 0.1}
    ours = draw(ViewTransform(size=8, scale=(0.4, 1.0), blur=0.0, jitter=1.0, **strengths), (40, 40))
    jitter = transforms.ColorJitter(**strengths)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [
            transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            for _ in range(6000)
        ]
    for number, name in enumerate(strengths):
        assert ks_2samp(getattr(ours, name), [params[1 + number] for params in theirs]).pvalue > 1e-3, name
    assert chisquare(np.bincount(ours.order.astype(int), minlength=24)).pvalue > 1e-3
    assert len(set(JITTER_ORDERS)) == 24
    # They are independent: the order of the factors, and the factors of the box.
    correlations = np.corrcoef([ours.brightness, ours.contrast, ours.saturation, ours.hue, ours.order, ours.top])
    assert np.abs(correlations - np.eye(6)).max() < 0.015


def test_operations_have_their_probabilities_and_blur_is_uniform():
    p: dict[str, Any] = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}
    rows = draw(ViewTransform(size=8, scale=(0.4, 1.0), **p), (40, 40))
    applied = {
        "flip": rows.flip,
        "jitter": rows.jitter,
        "grayscale": rows.grayscale,
        "blur": rows.blur_sigma > 0,
        "solarize": rows.solarize,
    }
    for name, column in applied.items():
        assert set(np.unique(column)) == {0, 1}
        assert abs(column.mean() - p[name]) < 4 * math.sqrt(p[name] * (1 - p[name]) / ROWS), name
    assert np.abs(np.corrcoef(list(applied.values())) - np.eye(5)).max() < 0.015
    assert ks_1samp(rows.blur_sigma[rows.blur_sigma > 0], uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_operations_not_applied_have_neutral_values():
    off: dict[str, Any] = {"flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
    rows = draw(ViewTransform(size=8, scale=(0.4, 1.0), **off), (40, 40), rows=100)
    neutral = {"flip": 0, "jitter": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "grayscale": 0}
    for name, value in (neutral | {"blur_sigma": 0, "solarize": 0}).items():
        assert (getattr(rows, name) == value).all(), name


def test_strengths_of_zero_give_neutral_values():
    zero: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    rows = draw(ViewTransform(size=8, scale=(0.4, 1.0), blur=0.0, jitter=1.0, **zero), (40, 40), rows=100)
    assert (rows.brightness == 1).all()
    assert (rows.contrast == 1).all()
    assert (rows.saturation == 1).all()
    assert (rows.hue == 0).all()


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    scale=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)).map(sorted),
    extreme=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
)
def test_boxes_lie_within_the_image(height, width, scale, extreme):
    slots = [ViewSlot("view", ViewTransform(size=8, scale=tuple(scale), blur=0.5), 1, 1)]
    uniforms = np.random.default_rng(0).random((20, 1, NUM_UNIFORMS))
    uniforms[0], uniforms[1, 0, 20:] = extreme, extreme
    parameters = sample_parameters(uniforms, (height, width), slots)
    rows: Any = ViewParameters(*np.moveaxis(parameters[:, 0].astype(np.float64), -1, 0))
    assert (rows.top >= 0).all()
    assert (rows.left >= 0).all()
    assert (rows.height >= 1).all()
    assert (rows.width >= 1).all()
    assert (rows.top + rows.height <= height).all()
    assert (rows.left + rows.width <= width).all()
    assert ((rows.order >= 0) & (rows.order < 24)).all()
    assert (np.abs(rows.hue) <= 0.5).all()
    for column in (rows.top, rows.left, rows.height, rows.width, rows.order, rows.slot):
        assert (column == np.round(column)).all()


def test_a_view_depends_only_on_its_own_number(dino_slots):
    long, short = view_uniforms(3, 4, 5, 20, NUM_UNIFORMS), view_uniforms(3, 4, 5, 7, NUM_UNIFORMS)
    assert (long[:7] == short).all()
    fewer = (*dino_slots[:2], ViewSlot("local", dino_slots[2].transform, 3, 3))
    np.testing.assert_array_equal(
        sample_parameters(long, (375, 500), dino_slots)[:7], sample_parameters(short, (375, 500), fewer)
    )


def test_a_batch_is_drawn_like_single_images(dino_slots):
    uniforms = np.stack([view_uniforms(0, 0, index, 20, NUM_UNIFORMS) for index in range(4)])
    sizes = np.array([(375, 500), (500, 375), (20, 333), (64, 64)])
    together = sample_parameters(uniforms, sizes, dino_slots)
    for index, size in enumerate(sizes):
        np.testing.assert_array_equal(together[index], sample_parameters(uniforms[index], size, dino_slots))


def test_seed_epoch_and_index_open_different_streams():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (0, 0, 2**40)]
    streams = [random_bits(purpose, *key, 64) for key in keys for purpose in ("views", "order")]
    assert len({bits.tobytes() for bits in streams}) == len(streams)
    assert len(np.unique(np.concatenate(streams))) == 64 * len(streams)  # nor do they overlap
    neighbours = np.stack([view_uniforms(0, 0, index, 20, NUM_UNIFORMS).ravel() for index in range(40)])
    assert np.abs(np.corrcoef(neighbours) - np.eye(40)).max() < 0.17
    assert ks_1samp(neighbours.ravel(), uniform(0, 1).cdf).pvalue > 1e-3


def test_the_random_numbers_never_change():
    # A run that resumes with another numpy must see the same views: these are the numbers of Philox4x64-10.
    assert random_bits("views", 1, 2, 3, 2).tolist() == [13637179162896307606, 3186157565435691869]


def test_layout_goes_slot_by_slot_and_shares_resolutions():
    def slot(name: str, size: int, candidates: int) -> ViewSlot:
        return ViewSlot(name, ViewTransform(size=size, scale=(0.4, 1.0), blur=0.0), candidates, 1)

    slots = [slot("a", 32, 2), slot("b", 16, 1), slot("c", 32, 1)]
    assert view_slots(slots) == [0, 0, 1, 2]
    assert resolutions(slots) == [32, 16]
    assert view_layout(slots) == [(0, 0), (0, 1), (1, 0), (0, 2)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.4)),
        ("scale", (0.5, 1.2)),
        ("ratio", (2.0, 1.0)),
        ("interpolation", "nearest"),
        ("flip", 1.1),
        ("jitter", -0.1),
        ("brightness", -0.4),
        ("hue", 0.6),
        ("blur", math.nan),
        ("blur_sigma", (0.0, 1.0)),
        ("solarize_threshold", 300),
    ],
)
def test_messages_name_the_invalid_field(field, value):
    with pytest.raises(UserError, match=field):
        ViewTransform(**({"size": 8, "scale": (0.4, 1.0), "blur": 0.5} | {field: value}))


@pytest.mark.parametrize(("candidates", "kept"), [(1, 2), (2, 0), (0, 0)])
def test_messages_name_the_invalid_slot(candidates, kept):
    with pytest.raises(UserError, match="local"):
        ViewSlot("local", ViewTransform(size=8, scale=(0.4, 1.0), blur=0.5), candidates, kept)


def test_messages_show_the_wrong_shape(dino_slots):
    with pytest.raises(ValueError, match=r"\[19, 33\]"):
        sample_parameters(np.zeros((19, NUM_UNIFORMS)), (10, 10), dino_slots)
