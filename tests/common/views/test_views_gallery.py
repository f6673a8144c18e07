"""The picture of a selection: chosen views framed in the colour of their slot, the others dimmed."""

from typing import Any

import numpy as np
import pytest
import torch

from hvp.common.views import MultiViewLoader, ViewSlot, ViewTransform, draw_selection
from hvp.common.views.gallery import COLOURS, COLUMN_GAP, HEADER, MARGIN, SCALE, SOURCE_WIDTH, _tiles
from hvp.common.views.parameters import COLUMNS
from tests.common.views.view_images import Photographs

INDEX = torch.tensor([[0, 2, 4, 7], [1, 3, 5, 6]])


def batch_of(slots, size=(60, 80)):
    source = Photographs(6, size=size)
    (batch,) = next(MultiViewLoader(source, slots, batch_size=2, seed=0, workers=0).epoch(0))
    return [source.read(index) for index in batch.index.tolist()], batch


def count(picture, colour) -> int:
    return int((np.asarray(picture) == np.array(colour, dtype=np.uint8)).all(-1).sum())


@pytest.mark.parametrize("size", [(60, 80), (64, 64), (500, 333), (20, 90)])
def test_pictures_of_any_source_size(small_slots, size):
    images, batch = batch_of(small_slots, size)
    picture = draw_selection(images, batch.parameters, batch.pixels, INDEX, small_slots)
    assert picture.mode == "RGB"
    assert 1000 < picture.width < 2200
    assert np.asarray(picture).std() > 20


def test_chosen_views_are_framed_and_the_others_dimmed(small_slots):
    _, batch = batch_of(small_slots)
    white = [np.full((60, 60, 3), 255, dtype=np.uint8)] * 2
    black = [torch.zeros_like(views) for views in batch.pixels]
    picture = np.asarray(draw_selection(white, batch.parameters, black, INDEX, small_slots))
    left_of_views = MARGIN + min(SOURCE_WIDTH, max(top + size for _, top, size in _tiles(small_slots))) + COLUMN_GAP
    for view, (left, top, size) in enumerate(_tiles(small_slots)):
        x, y = round((left_of_views + left) * SCALE), round((HEADER + top) * SCALE)
        centre = picture[y + round(size * SCALE / 2), x + round(size * SCALE / 2)]
        assert tuple(picture[y, x]) == COLOURS[[0, 0, 1, 1, 2, 2, 2, 2][view]]
        inside_frame = tuple(picture[y + 2 * SCALE, x + 2 * SCALE])
        if view in INDEX[0]:
            assert centre.tolist() == [0, 0, 0]
            assert inside_frame == COLOURS[[0, 0, 1, 1, 2, 2, 2, 2][view]]
        else:
            assert centre.min() > 100
            assert inside_frame == tuple(centre)


def test_a_chosen_box_is_bolder_than_a_sampled_one(small_slots):
    images, batch = batch_of(small_slots)
    few = draw_selection(images, batch.parameters, batch.pixels, INDEX[:, :2], small_slots)
    many = draw_selection(images, batch.parameters, batch.pixels, INDEX, small_slots)
    assert count(many, COLOURS[2]) > 2 * count(few, COLOURS[2])


def test_two_view_methods_have_one_resolution():
    slots = [ViewSlot("view", ViewTransform(size=32, scale=(0.2, 1.0), blur=0.5), candidates=4, kept=2)]
    images, batch = batch_of(slots)
    picture = draw_selection(images, batch.parameters, batch.pixels, np.array([[0, 3], [1, 2]]), slots)
    assert count(picture, COLOURS[0]) > 1000


def test_shapes_that_do_not_fit_together_are_refused(small_slots):
    images, batch = batch_of(small_slots)
    cases: list[tuple[Any, Any, Any, Any]] = [
        ([], batch.parameters, batch.pixels, INDEX),
        (images[:1], batch.parameters, batch.pixels, INDEX),
        (images, batch.parameters[:, :3], batch.pixels, INDEX),
        (images, batch.parameters, batch.pixels, INDEX[:1]),
        (images, torch.zeros(2, 8, len(COLUMNS) - 1), batch.pixels, INDEX),
    ]
    for arguments in cases:
        with pytest.raises(ValueError, match="draw_selection"):
            draw_selection(*arguments, small_slots)
