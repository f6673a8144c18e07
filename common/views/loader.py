"""The multi-view loader: every image decoded once, all its views with the parameters they were made with.

What a batch holds follows from (seed, epoch, step) alone, not from the number of workers, of processes or of
micro-batches, nor from where a run was resumed: `order.py` says which images a step sees, and a view depends on
(seed, epoch, image index, view number). Workers hold no state but the data set.
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
"""(epoch, image index): what an image's views follow from."""

Part = tuple[list[Key], bool]
"""A micro-batch: its images, and whether all candidates of each are made. All that a worker must be told."""


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch: B images, V views each, ordered slot by slot."""

    pixels: list[Tensor]
    """One tensor a resolution, in order of first appearance among the slots: [n_views, B, H, W, 3] uint8 RGB."""

    parameters: Tensor
    """How each view was made: [B, V, len(COLUMNS)] float32."""

    index: Tensor
    """Data-set index of each image, [B] int64. With `on_bad_image="skip"` the one that was really used."""

    epoch: int = 0
    """In which the views were drawn."""

    masks: Tensor | None = None
    """What `MultiViewLoader(masks=...)` made for these images; None without it."""

    skipped: list[str] = field(default_factory=list)
    """Images that did not decode and were replaced."""

    def pin_memory(self) -> "ViewBatch":
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return replace(
            self,
            pixels=[pixels.pin_memory() for pixels in self.pixels],
            parameters=self.parameters.pin_memory(),
            index=self.index.pin_memory(),
            masks=None if self.masks is None else self.masks.pin_memory(),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewBatch":
        """The same batch with its tensors on a device."""
        return replace(
            self,
            pixels=[pixels.to(device, non_blocking=non_blocking) for pixels in self.pixels],
            parameters=self.parameters.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=non_blocking),
        )


class MultiViewLoader:
    """Batches of views of an image source, an epoch at a time.

    Args:
        source: the images; sent to the workers, so it must be picklable.
        slots: which views, and how many of each.
        batch_size: images in a micro-batch of this process. The global batch, what one optimiser step sees, is
            `batch_size * accumulate * world_size`.
        seed: of the order and of the views, 0 or more.
        workers: processes that decode and render; 0 does it in this process, without touching its settings.
        pipeline: "fast" (OpenCV) or "pil" (Pillow, as the upstreams do it). Both draw the same views.
        on_bad_image: "error" raises the first image that does not decode; "skip" takes the next index that does,
            and names the bad one in `ViewBatch.skipped`.
        accumulate: micro-batches per optimiser step.
        rank, world_size: this process, and how many train together.
        pin_memory: hand out batches in page-locked memory; without CUDA it has no effect.
        selects: says of an optimiser step, counted over all epochs, whether it chooses among the candidates. One that
            does not gets the first `kept` of every slot alone, the same views as among all candidates; None: all do.
        masks: makes a tensor for a micro-batch of its keys, (epoch, index of the image that was used), for methods that
            hide parts of views from the network. Runs in the workers, so it must be picklable, and should depend on
            nothing but the keys.
        timeout: seconds that a wait for the workers lasts although none of them gets on to another image; 0: for ever.

    Raises:
        NoBatch: the machine's limits leave no room for workers.
        UserError: the source is smaller than a global batch, or the seed is negative.
        ValueError: a number is out of its range, or a name is unknown.
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
                "    Make the batch size smaller or use more images; an incomplete batch is not trained on."
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
        """The batches of one epoch, from `start_step` on. One epoch is read at a time.

        Args:
            epoch: 0 or more.
            start_step: optimiser steps of this epoch that are already done.
            stopped: asked twice a second while a batch is waited for; True ends the wait.

        Yields:
            For every optimiser step its `accumulate` micro-batches.

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
        """Ends the workers, which otherwise wait for the next epoch; a further epoch starts new ones."""
        self._batches.close()


class _Keys:
    """The images of each micro-batch, of whatever epoch is asked for next."""

    def __init__(
        self,
        num_images: int,
        seed: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        selects: Callable[[int], bool] | None,
    ) -> None:
        self.num_images, self.seed, self.selects = num_images, seed, selects
        self.batch_size, self.accumulate, self.rank, self.world_size = batch_size, accumulate, rank, world_size
        self.epoch = 0
        self.start_step = 0

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


class _Renderer:
    """What runs in the workers: keys in, a finished micro-batch out."""

    def __init__(
        self,
        source: ImageSource,
        slots: tuple[ViewSlot, ...],
        seed: int,
        pipeline: str,
        on_bad_image: str,
        masks: Callable[[Sequence[Key]], Tensor] | None,
    ) -> None:
        self.source, self.slots, self.seed = source, slots, seed
        self.pipeline, self.on_bad_image, self.masks = pipeline, on_bad_image, masks

    def __call__(self, part: Part) -> ViewBatch:
        keys, all_candidates = part
        num_candidates, numbers = len(view_layout(self.slots)), list(first_views(self.slots))
        slots = self.slots
        if all_candidates:
            numbers = list(range(num_candidates))
        else:
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
        """The image, or the next one that decodes, and its index."""
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
