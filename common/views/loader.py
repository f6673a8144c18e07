"""The multi-view loader: decodes every image once, and makes all its views and their parameters.

A batch depends only on (seed, epoch, step), not on the number of workers, processes or micro-batches, nor on where a
run was resumed: `order.py` chooses the images of a step, and a view depends on (seed, epoch, image index, view number).
Workers hold no state except the dataset.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvp.common.data import BadImage, ImageSource
from hvp.common.data.workers import TIMEOUT, Batches, WatchedSource, shared_empty
from hvp.common.errors import UserError
from hvp.common.views import fast, pil
from hvp.common.views.order import epoch_order, micro_batches, steps_per_epoch
from hvp.common.views.parameters import (
    COLUMNS,
    NUM_UNIFORMS,
    ViewSlot,
    first_views,
    resolutions,
    sample_parameters,
    view_layout,
)
from hvp.common.views.randomness import view_uniforms

PIPELINES = {"fast": fast.render, "pil": pil.render}

Key = tuple[int, int]
"""(epoch, image index), which determine an image's views."""

Part = tuple[list[Key], bool]
"""The task of a worker, one micro-batch: its images, and whether to make all candidates of each."""


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch: B images, V views each, ordered slot by slot."""

    pixels: list[Tensor]
    """One tensor per resolution, in order of first appearance among the slots: [n_views, B, H, W, 3] uint8 RGB."""

    parameters: Tensor
    """Parameters of each view: [B, V, len(COLUMNS)] float32."""

    index: Tensor
    """Dataset index of each image, [B] int64. With `on_bad_image="skip"`, of the image that was actually used."""

    epoch: int = 0
    """Epoch for which the views were drawn."""

    masks: Tensor | None = None
    """Result of `MultiViewLoader(masks=...)` for these images; None without it."""

    skipped: list[str] = field(default_factory=list)
    """Images that did not decode and were replaced."""

    def pin_memory(self) -> "ViewBatch":
        """Return the batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewBatch":
        """Return the batch with its tensors on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "ViewBatch":
        return replace(
            self,
            pixels=[change(pixels) for pixels in self.pixels],
            parameters=change(self.parameters),
            index=change(self.index),
            masks=None if self.masks is None else change(self.masks),
        )


class MultiViewLoader:
    """Batches of views of an image source, one epoch at a time.

    Args:
        source: the images; sent to the workers, so it must be picklable.
        slots: the views, and the number of each.
        batch_size: images in a micro-batch of this process. The global batch of an optimiser step is
            `batch_size * accumulate * world_size`.
        seed: random seed of the order and the views, 0 or more.
        workers: processes that decode and render; 0 does it in this process, without touching its settings.
        pipeline: "fast" (OpenCV) or "pil" (Pillow, as in the upstreams). Both draw the same views.
        on_bad_image: "error" raises the first image that does not decode; "skip" takes the next index that does,
            and names the bad one in `ViewBatch.skipped`.
        accumulate: micro-batches per optimiser step.
        rank, world_size: this process, and the number of processes that train together.
        pin_memory: hand out batches in page-locked memory; without CUDA it has no effect.
        selects: whether an optimiser step, counted over all epochs, selects among the candidates. A step that does not
            gets only the first `kept` of every slot, the same views as among all candidates. None: all steps select.
        masks: makes a tensor from the keys of a micro-batch, (epoch, index of the image that was used), for methods
            that hide parts of views from the network. It runs in the workers, so it must be picklable, and should
            depend only on the keys.
        timeout: seconds to wait for the workers while none of them begins another image; 0: for ever.

    Raises:
        NoBatch: the machine's limits do not allow the workers.
        UserError: the source is smaller than a global batch, or the seed is negative.
        ValueError: a number is out of range, or a name is unknown.
    """

    def __init__(
        self,
        source: ImageSource,
        slots: Sequence[ViewSlot],
        *,
        batch_size: int,
        seed: int,
        workers: int,
        pipeline: Literal["fast", "pil"] = "fast",
        on_bad_image: Literal["error", "skip"] = "error",
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        selects: Callable[[int], bool] | None = None,
        masks: Callable[[Sequence[Key]], Tensor] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if pipeline not in PIPELINES or on_bad_image not in ("error", "skip"):
            raise ValueError(f"MultiViewLoader: pipeline={pipeline!r}, on_bad_image={on_bad_image!r}")
        if min(batch_size, accumulate, world_size, len(slots)) < 1 or workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"MultiViewLoader: batch_size={batch_size}, accumulate={accumulate}, workers={workers}, "
                f"rank={rank}, world_size={world_size}, {len(slots)} slots"
            )
        if seed < 0:
            raise UserError(f"seed = {seed}, but it must be 0 or more.")
        global_batch = batch_size * accumulate * world_size
        if len(source) < global_batch:
            raise UserError(
                f"{source.name}: {len(source)} images are fewer than one batch of {global_batch}.\n"
                "    Use a smaller batch size or more images: an incomplete batch is dropped."
            )
        self.source = source
        self.global_batch = global_batch
        self.accumulate = accumulate
        self.steps_per_epoch = steps_per_epoch(len(source), global_batch)
        self._keys = _Keys(len(source), seed, batch_size, accumulate, rank, world_size, selects)
        watched = WatchedSource(source, workers)
        self._batches: Batches[ViewBatch] = Batches(
            _Renderer(watched, tuple(slots), seed, pipeline, on_bad_image, masks),
            self._keys,
            watched,
            workers=workers,
            pin_memory=pin_memory,
            timeout=timeout,
        )

    def epoch(
        self, epoch: int, start_step: int = 0, *, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[ViewBatch]]:
        """Yield the batches of one epoch from `start_step` on. Only one epoch may be read at a time.

        Args:
            epoch: 0 or more.
            start_step: optimiser steps of this epoch that are already done.
            stopped: called twice a second while waiting for a batch; True ends the wait.

        Yields:
            The `accumulate` micro-batches of each optimiser step.

        Raises:
            UserError: an image does not decode.
            NoBatch: a worker died, hangs, or could not be started.
            WaitInterrupted: `stopped()` was True.
            ValueError: epoch or start_step is out of range.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"epoch: epoch={epoch}, start_step={start_step} of {self.steps_per_epoch}")
        return self._steps(epoch, start_step, stopped)

    def _steps(self, epoch: int, start_step: int, stopped: Callable[[], bool]) -> Iterator[list[ViewBatch]]:
        self._keys.epoch, self._keys.start_step = epoch, start_step
        batches = self._batches.one_pass(stopped)
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self.accumulate)]

    def close(self) -> None:
        """End the workers, which otherwise wait for the next epoch; a further epoch starts new ones."""
        self._batches.close()


@dataclass
class _Keys:
    """The parts of one epoch: set `epoch` and `start_step`, then iterate."""

    num_images: int
    seed: int
    batch_size: int
    accumulate: int
    rank: int
    world_size: int
    selects: Callable[[int], bool] | None
    epoch: int = 0
    start_step: int = 0

    def __iter__(self) -> Iterator[Part]:
        epoch = self.epoch
        order = epoch_order(self.num_images, self.seed, epoch)
        steps = steps_per_epoch(self.num_images, self.batch_size * self.accumulate * self.world_size)
        for step in range(self.start_step, steps):
            all_candidates = self.selects is None or self.selects(epoch * steps + step)
            for indices in micro_batches(
                order,
                step,
                batch_size=self.batch_size,
                accumulate=self.accumulate,
                rank=self.rank,
                world_size=self.world_size,
            ):
                yield [(epoch, index) for index in indices.tolist()], all_candidates


@dataclass(frozen=True)
class _Renderer:
    """The workers' function: turns a part into a finished micro-batch."""

    source: ImageSource
    slots: tuple[ViewSlot, ...]
    seed: int
    pipeline: str
    on_bad_image: str
    masks: Callable[[Sequence[Key]], Tensor] | None

    def __call__(self, part: Part) -> ViewBatch:
        keys, all_candidates = part
        slots, num_candidates = self.slots, len(view_layout(self.slots))
        numbers = list(range(num_candidates))
        if not all_candidates:
            numbers = list(first_views(slots))
            slots = tuple(replace(slot, candidates=slot.kept) for slot in slots)
        render, layout = PIPELINES[self.pipeline], view_layout(slots)
        pixels = []
        for resolution, size in enumerate(resolutions(slots)):
            num_views = sum(place[0] == resolution for place in layout)
            pixels.append(shared_empty((num_views, len(keys), size, size, 3), torch.uint8))
        parameters = shared_empty((len(keys), len(layout), len(COLUMNS)), torch.float32)
        index = shared_empty((len(keys),), torch.int64)
        skipped: list[str] = []

        arrays, rows_of_batch = [tensor.numpy() for tensor in pixels], parameters.numpy()
        for b, (epoch, wanted) in enumerate(keys):
            image, used = self._read(wanted, skipped)
            index[b] = used
            uniforms = view_uniforms(self.seed, epoch, used, num_candidates, NUM_UNIFORMS)[numbers]
            rows = rows_of_batch[b] = sample_parameters(uniforms, image.shape[:2], slots)
            view = 0
            for slot in slots:
                resolution, place = layout[view]
                out = arrays[resolution][place : place + slot.candidates, b]
                render(image, rows[view : view + slot.candidates], slot.transform, out)
                view += slot.candidates
        used_keys = [(epoch, used) for (epoch, _), used in zip(keys, index.tolist(), strict=True)]
        masks = None if self.masks is None else self.masks(used_keys)
        return ViewBatch(pixels, parameters, index, keys[0][0], masks, skipped)

    def _read(self, wanted: int, skipped: list[str]) -> tuple[NDArray[np.uint8], int]:
        """Read the image, or the next one that decodes; return it and its index."""
        count = len(self.source)
        for step in range(count):
            used = (wanted + step) % count
            try:
                return self.source.read(used), used
            except BadImage as bad:
                if self.on_bad_image == "error":
                    raise
                skipped.append(bad.where)
        raise UserError(f"{self.source.name}: none of its {count} images can be decoded.")
