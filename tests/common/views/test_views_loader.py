"""Batches depend only on (seed, epoch, step); errors arrive as one plain message."""

import multiprocessing
import os
import pickle
import signal

import cv2
import numpy as np
import pytest
import torch

from hvp.benchmarks.loading import SLOTS
from hvp.common.data import BadImage
from hvp.common.errors import UserError
from hvp.common.views import MultiViewLoader, ViewBatch, ViewSlot, epoch_order
from hvp.common.views.parameters import COLUMNS, ViewParameters, view_layout
from tests.common.views.view_images import Photographs


def loader_of(slots, source=None, **options) -> MultiViewLoader:
    return MultiViewLoader(source or Photographs(14), slots, **({"batch_size": 4, "seed": 5, "workers": 0} | options))


def flat(steps) -> list[ViewBatch]:
    return [batch for step in steps for batch in step]


def assert_equal(ours: list[ViewBatch], theirs: list[ViewBatch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert len(a.pixels) == len(b.pixels)
        assert all(torch.equal(x, y) for x, y in zip(a.pixels, b.pixels, strict=True))
        assert torch.equal(a.parameters, b.parameters)
        assert torch.equal(a.index, b.index)
        assert a.skipped == b.skipped


def concatenated(batches: list[ViewBatch]) -> ViewBatch:
    """Join the images of all batches into one."""
    pixels = [torch.cat(views, dim=1) for views in zip(*(batch.pixels for batch in batches), strict=True)]
    parameters, index = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("parameters", "index"))
    return ViewBatch(pixels, parameters, index, skipped=[name for batch in batches for name in batch.skipped])


def test_a_batch_has_the_promised_layout(small_slots):
    loader = loader_of(small_slots)
    (batch,) = next(loader.epoch(0))
    assert loader.steps_per_epoch == 3
    assert [list(views.shape) for views in batch.pixels] == [[4, 4, 24, 24, 3], [4, 4, 12, 12, 3]]
    assert all(views.dtype == torch.uint8 and views.is_contiguous() for views in batch.pixels)
    assert batch.parameters.shape == (4, 8, len(COLUMNS))
    assert batch.parameters.dtype == torch.float32
    assert batch.index.dtype == torch.int64
    assert batch.index.tolist() == epoch_order(14, 5, 0)[:4].tolist()
    assert batch.skipped == []
    assert batch.parameters[..., COLUMNS.index("slot")].tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_without_selection_gets_only_the_first_candidates(small_slots, workers):
    whole = flat(loader_of(small_slots, accumulate=2, batch_size=2).epoch(1))
    asked = []

    def selects(step: int) -> bool:
        asked.append(step)
        return step % 2 == 0

    parts = flat(loader_of(small_slots, accumulate=2, batch_size=2, workers=workers, selects=selects).epoch(1))
    assert asked == [3, 4, 5]  # counted over the epochs
    for number, (part, full) in enumerate(zip(parts, whole, strict=True)):
        if number // 2 == 1:  # step 4
            assert_equal([part], [full])
            continue
        assert torch.equal(part.pixels[0], full.pixels[0][[0, 2]])
        assert torch.equal(part.pixels[1], full.pixels[1][[0, 1]])
        assert torch.equal(part.parameters, full.parameters[:, [0, 2, 4, 5]])
        assert torch.equal(part.index, full.index)


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_are_made_for_the_images_that_were_used(small_slots, workers):
    loader = loader_of(small_slots, Photographs(14, bad=(3, 8)), workers=workers, on_bad_image="skip", masks=_numbered)
    batches = flat(loader.epoch(2))
    assert any(batch.skipped for batch in batches)
    for batch in batches:
        assert batch.masks is not None
        assert torch.equal(batch.masks, torch.stack((torch.full((4,), 2), batch.index), dim=1))
        assert batch.to("cpu").masks is batch.masks


def _numbered(keys):
    return torch.tensor(keys)


@pytest.mark.parametrize("pipeline", ["fast", "pil"])
def test_batches_are_the_same_for_any_number_of_workers(small_slots, pipeline):
    runs = []
    for workers in (0, 1, 2):
        loader = loader_of(small_slots, workers=workers, pipeline=pipeline)
        runs.append(flat(loader.epoch(0)) + flat(loader.epoch(1)))
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0].parameters, runs[0][3].parameters)  # the second epoch draws anew


def test_both_pipelines_draw_the_same_views(small_slots):
    (fast,), (pil,) = (next(loader_of(small_slots, pipeline=name).epoch(3)) for name in ("fast", "pil"))
    assert torch.equal(fast.parameters, pil.parameters)
    assert torch.equal(fast.index, pil.index)
    for a, b in zip(fast.pixels, pil.pixels, strict=True):
        assert 0 < (a.int() - b.int()).abs().float().mean() < 1.5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumes_at_any_step(small_slots, workers):
    whole = flat(loader_of(small_slots).epoch(2))
    loader = loader_of(small_slots, workers=workers)
    for start in (0, 2, 1, 3):  # the same workers, after epochs read to the end
        rest = flat(loader.epoch(2, start_step=start))
        assert len(rest) == 3 - start
        if rest:
            assert_equal(rest, whole[start:])


def test_an_abandoned_epoch_leaves_nothing_behind(small_slots):
    expected = flat(loader_of(small_slots).epoch(1))
    loader = loader_of(small_slots, workers=2)
    next(loader.epoch(0))
    assert_equal(flat(loader.epoch(1)), expected)


def test_a_closed_loader_has_no_workers_and_starts_again(small_slots):
    others = set(multiprocessing.active_children())
    loader = loader_of(small_slots, workers=2)
    first = flat(loader.epoch(0))
    assert len(set(multiprocessing.active_children()) - others) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= others
    assert_equal(flat(loader.epoch(0)), first)


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), [(4, 3, 1), (2, 2, 3), (3, 1, 4), (1, 6, 2)])
def test_a_global_batch_does_not_depend_on_its_division(small_slots, batch_size, accumulate, world_size):
    source = Photographs(25)
    whole = concatenated(flat(loader_of(small_slots, source, batch_size=12).epoch(0)))
    loaders = [
        loader_of(small_slots, source, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(loader.steps_per_epoch == 2 and loader.global_batch == 12 for loader in loaders)
    steps = zip(*(loader.epoch(0) for loader in loaders), strict=True)
    parts = []
    for ranks in steps:
        assert all(len(step) == accumulate for step in ranks)
        parts += flat(ranks)
    assert_equal([concatenated(parts)], [whole])


def test_a_view_depends_only_on_its_image_and_number(small_slots):
    few = (*small_slots[:2], ViewSlot("local", small_slots[2].transform, 1, 1))
    many = {int(i): (b, n) for b in flat(loader_of(small_slots).epoch(0)) for n, i in enumerate(b.index)}
    for batch in flat(loader_of(few, batch_size=1).epoch(0)):
        if int(batch.index) not in many:
            continue  # in the other loader's incomplete last batch
        other, n = many[int(batch.index)]
        assert torch.equal(batch.parameters[0], other.parameters[n, :5])
        assert torch.equal(batch.pixels[0][:, 0], other.pixels[0][:, n])
        assert torch.equal(batch.pixels[1][:, 0], other.pixels[1][:1, n])


def test_parameters_belong_to_the_pixels(small_slots):
    source = Photographs(14)
    (batch,) = next(loader_of(small_slots, source).epoch(0))
    for b, index in enumerate(batch.index.tolist()):
        image = source.read(index)
        for view, (resolution, place) in enumerate(view_layout(small_slots)):
            p = ViewParameters(*batch.parameters[b, view].tolist())
            assert (p.source_height, p.source_width) == image.shape[:2]
            pixels = batch.pixels[resolution][place, b].float()
            if p.grayscale:
                assert torch.equal(pixels[..., 0], pixels[..., 2])
            if not (p.jitter or p.grayscale or p.solarize):
                top, left = int(p.top), int(p.left)
                crop = image[top : top + int(p.height), left : left + int(p.width)]
                np.testing.assert_allclose(pixels.mean((0, 1)), crop.mean((0, 1)), atol=6)


def test_views_of_one_resolution_share_a_tensor(small_slots):
    split = (small_slots[0], small_slots[2], small_slots[1])
    (batch,) = next(loader_of(split).epoch(0))
    assert [len(views) for views in batch.pixels] == [4, 4]
    (usual,) = next(loader_of(small_slots).epoch(0))
    assert torch.equal(batch.pixels[0][:2], usual.pixels[0][:2])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_state_is_not_changed(small_slots, workers):
    def state() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            str(np.random.get_state(legacy=False)),  # noqa: NPY002
            torch.get_num_threads(),
            cv2.getNumThreads(),
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGCHLD),
        )

    before = state()
    flat(loader_of(small_slots, workers=workers).epoch(0))
    assert state() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_arrives_with_its_plain_message(small_slots, workers):
    others = set(multiprocessing.active_children())
    loader = loader_of(small_slots, Photographs(14, bad=(9,)), batch_size=14, workers=workers)
    with pytest.raises(BadImage) as caught:
        next(loader.epoch(0))
    assert str(caught.value) == str(BadImage("photograph 9", "made bad for a test"))
    assert caught.value.where == "photograph 9"
    assert set(multiprocessing.active_children()) <= others  # the workers have ended


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_takes_the_next_image_that_decodes(small_slots, workers):
    bad = (0, 3, 4, 13)
    options = {"batch_size": 14, "workers": workers, "on_bad_image": "skip"}
    (batch,) = next(loader_of(small_slots, Photographs(14, bad=bad), **options).epoch(0))
    (good,) = next(loader_of(small_slots, Photographs(14), batch_size=14).epoch(0))
    replacement = {0: 1, 3: 5, 4: 5, 13: 1}
    assert batch.index.tolist() == [replacement.get(i, i) for i in good.index.tolist()]
    assert sorted(set(batch.skipped)) == sorted(f"photograph {i}" for i in bad)
    for n, index in enumerate(good.index.tolist()):
        if index not in bad:
            assert torch.equal(batch.pixels[0][:, n], good.pixels[0][:, n])


def test_a_source_of_bad_images_alone_is_an_error(small_slots):
    loader = loader_of(small_slots, Photographs(5, bad=(0, 1, 2, 3, 4)), on_bad_image="skip")
    with pytest.raises(UserError, match="none of its 5 images"):
        next(loader.epoch(0))


class Deadly(Photographs):
    """Kills its reader, as happens to a process that runs out of memory."""

    def read(self, index):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_explained(small_slots):
    with pytest.raises(UserError, match=r"/dev/shm") as caught:
        next(loader_of(small_slots, Deadly(14), workers=1).epoch(0))
    assert "Traceback" not in str(caught.value)


class WithoutSharedMemory(Photographs):
    """Raises torch's error for a full /dev/shm."""

    def read(self, index):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_full_shared_memory_is_explained(small_slots):
    with pytest.raises(UserError, match=r"--shm-size") as caught:
        next(loader_of(small_slots, WithoutSharedMemory(14), workers=1).epoch(0))
    assert "Traceback" not in str(caught.value)


class Broken(Photographs):
    """Raises as a bug in the program would."""

    def read(self, index):
        raise RuntimeError("made for a test")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_reported_as_a_user_error(small_slots, workers):
    with pytest.raises(RuntimeError, match="made for a test") as caught:
        next(loader_of(small_slots, Broken(14), workers=workers).epoch(0))
    assert not isinstance(caught.value, UserError)


class Interrupted(Photographs):
    """Sends its reader the Ctrl-C that a terminal sends to every process."""

    def read(self, index):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGINT)
        return super().read(index)


def test_workers_leave_interrupts_to_the_main_process(small_slots):
    assert_equal(
        flat(loader_of(small_slots, Interrupted(14), workers=1).epoch(0)), flat(loader_of(small_slots).epoch(0))
    )


class OneThread(Photographs):
    """Fails if a worker uses more than one thread."""

    def read(self, index):
        assert torch.get_num_threads() == 1
        assert cv2.getNumThreads() <= 1
        return super().read(index)


def test_workers_use_one_thread(small_slots):
    assert len(flat(loader_of(small_slots, OneThread(14), workers=1).epoch(0))) == 3


def test_batches_lie_in_shared_memory(small_slots):
    (batch,) = next(loader_of(small_slots, workers=1).epoch(0))
    assert all(tensor.is_shared() for tensor in (*batch.pixels, batch.parameters, batch.index))


def test_dino_with_hvp_stays_within_its_bytes_per_image():
    (batch,) = next(loader_of(SLOTS, batch_size=1).epoch(0))
    assert sum(tensor.nbytes for tensor in (*batch.pixels, batch.parameters, batch.index)) <= 1.1e6


def test_a_dataset_smaller_than_a_batch_is_refused(small_slots):
    with pytest.raises(UserError, match=r"14 images .* 16"):
        loader_of(small_slots, batch_size=4, accumulate=2, world_size=2)


def test_a_negative_seed_is_refused(small_slots):
    with pytest.raises(UserError, match="seed = -1"):
        loader_of(small_slots, seed=-1)


@pytest.mark.parametrize(
    "option", [{"pipeline": "gpu"}, {"on_bad_image": "ignore"}, {"batch_size": 0}, {"workers": -1}, {"rank": 1}]
)
def test_invalid_options_are_refused(small_slots, option):
    with pytest.raises(ValueError, match="MultiViewLoader"):
        loader_of(small_slots, **option)


@pytest.mark.parametrize(("epoch", "start_step"), [(-1, 0), (0, 4), (0, -1)])
def test_invalid_starts_are_refused(small_slots, epoch, start_step):
    with pytest.raises(ValueError, match="start_step"):
        loader_of(small_slots).epoch(epoch, start_step)


def test_batches_move_and_pickle(small_slots):
    (batch,) = next(loader_of(small_slots, pin_memory=True).epoch(0))
    assert_equal([pickle.loads(pickle.dumps(batch))], [batch])
    moved = batch.to("meta", non_blocking=True)
    assert {tensor.device.type for tensor in (*moved.pixels, moved.parameters, moved.index)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_batches_are_pinned(small_slots):
    (batch,) = next(loader_of(small_slots, workers=1, pin_memory=True).epoch(0))
    assert all(tensor.is_pinned() for tensor in (*batch.pixels, batch.parameters, batch.index))
    assert_equal([batch.to("cuda", non_blocking=True).to("cpu")], [batch])
