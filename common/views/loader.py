"""The multi-view loader: every image decoded once, all its views with the parameters they were made with.

What a batch holds follows from (seed, epoch, step) alone, not from the number of workers, of processes or of
micro-batches, nor from where a run was resumed: `order.py` says which images a step sees, and a view depends on
(seed, epoch, image index, view number). Workers hold no state but the data set.
"""

import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hvp.common.data import BadImage, ImageSource
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

    Raises:
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
        self._workers = workers
        self._keys = _Keys(len(source), seed, batch_size, accumulate, rank, world_size, selects)
        self._loader = DataLoader(
            _Renderer(source, tuple(slots), seed, pipeline, on_bad_image, masks),
            batch_sampler=cast(Any, self._keys),  # its batches are no lists; the data set is what reads them
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            multiprocessing_context=("fork" if sys.platform == "linux" else "spawn") if workers else None,
            pin_memory=pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # its seeds are not used; without its own it would draw from the global one
        )

        # Workers ignore SIGTERM, by which multiprocessing would end those that are left when the interpreter exits.
        weakref.finalize(self, _end_workers, self._loader)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[ViewBatch]]:
        """The batches of one epoch, from `start_step` on. One epoch is read at a time.

        Args:
            epoch: 0 or more.
            start_step: optimiser steps of this epoch that are already done.

        Yields:
            For every optimiser step its `accumulate` micro-batches.

        Raises:
            UserError: an image does not decode, or a worker process died.
            ValueError: epoch or start_step is out of range.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"epoch: epoch={epoch}, start_step={start_step} of {self.steps_per_epoch}")
        return self._steps(epoch, start_step)

    def _steps(self, epoch: int, start_step: int) -> Iterator[list[ViewBatch]]:
        self._keys.epoch, self._keys.start_step = epoch, start_step
        batches = self._start()
        for _ in range(start_step, self.steps_per_epoch):
            yield [self._next(batches) for _ in range(self.accumulate)]

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch; a further epoch starts new ones."""
        _end_workers(self._loader)

    def _start(self) -> Iterator["ViewBatch | _Failure"]:
        # DataLoader installs a SIGCHLD handler that raises a RuntimeError wherever the main process happens to be,
        # for example in a backward pass. Without it a dead worker is found when its batch is asked for, in `_next`.
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        batches = iter(self._loader)
        if before is not None and threading.current_thread() is threading.main_thread():
            # what was there may itself be the handler of an earlier DataLoader
            from_loader = getattr(before, "__module__", "").startswith("torch.utils.data")
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if from_loader else before)
        return batches

    def _next(self, batches: Iterator["ViewBatch | _Failure"]) -> ViewBatch:
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            # A worker that died, maybe before its tensors were fetched from it, so that the connection breaks; or one
            # that could not get shared memory. Anything else is a mistake of ours.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            lost = self._workers > 0 and isinstance(error, (OSError, EOFError))
            if not lost and "DataLoader worker (pid" not in reason and "shared memory" not in reason:
                raise
            self.close()
            raise UserError(
                f"A loader worker failed: {reason}\n"
                "    Most likely the machine ran out of memory, or of shared memory (/dev/shm; in a container: "
                "--shm-size).\n"
                f"    Use fewer workers (now {self._workers}) or a smaller batch size, or give it more memory."
            ) from error
        if isinstance(batch, _Failure):
            self.close()
            try:
                raise batch.error
            finally:
                del batch  # or the error, whose traceback holds this frame, would keep itself and the loader alive
        return batch


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


@dataclass(frozen=True)
class _Failure:
    """A user's mistake on its way to the main process: DataLoader would wrap a raised one in a traceback."""

    error: UserError


class _Renderer(Dataset["ViewBatch | _Failure"]):
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

    def __getitem__(self, key: Key) -> "ViewBatch | _Failure":
        return self.__getitems__(([key], True))

    def __getitems__(self, part: Part) -> "ViewBatch | _Failure":
        try:
            return self._batch(*part)
        except UserError as error:
            return _Failure(error)

    def _batch(self, keys: list[Key], all_candidates: bool) -> ViewBatch:
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
            pixels.append(_empty((num_views, len(keys), size, size, 3), torch.uint8))
        parameters = _empty((len(keys), len(layout), len(COLUMNS)), torch.float32)
        index = _empty((len(keys),), torch.int64)
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


def _end_workers(loader: "DataLoader[ViewBatch | _Failure]") -> None:
    workers, loader._iterator = loader._iterator, None
    if isinstance(workers, _MultiProcessingDataLoaderIter):
        workers._shutdown_workers()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a worker one in shared memory, so that it is filled there and not copied on its way."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor if get_worker_info() is None else tensor.share_memory_()


def _unchanged(batch: Any) -> Any:
    """Collation: there is nothing left to do, `__getitems__` made the whole batch."""
    return batch


def _start_worker(_: int) -> None:
    # One thread a worker: the workers are the parallelism. Signals that ask to stop reach whole process groups, but are
    # for the main process: it has a step to finish, and then ends the workers.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
