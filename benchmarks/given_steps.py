"""A trainer's own step on batches at hand, without a loader, a folder or a log."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvp.common.config.sections import RunConfig
from hvp.common.training.distributed import World
from hvp.common.training.loading import Masks
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import RescuedNetwork, Rescuer
from hvp.common.training.step import Step, Value
from hvp.common.views import ViewBatch
from hvp.common.views.parameters import COLUMNS
from hvp.common.views.strong import StrongViews

CPU = torch.device("cpu")


class GivenSteps(Step):
    """Stands in for `Run` in `train_one_epoch()`; every epoch has the same batches.

        run = GivenSteps(config, parts.model, [[part]])
        train_one_epoch(run, parts, 0, config)
        run.rows[-1]["loss"]

    Args:
        config: the configuration.
        trained: the network that learns.
        batches: for each step of an epoch, the parts of its batch.
        precision: device and number format; float32 on the CPU if left out.
        strong: maker of strong views, for a configuration that rescues.
    """

    def __init__(
        self,
        config: RunConfig,
        trained: nn.Module,
        batches: Sequence[list[ViewBatch]],
        precision: Precision | None = None,
        strong: StrongViews | None = None,
    ) -> None:
        precision = precision or Precision("fp32", CPU)
        rescuer = Rescuer(config, cast(RescuedNetwork, trained), strong, World(), precision.device)
        super().__init__(config, trained, precision, World(), rescuer, steps_per_epoch=len(batches))
        self.batches = batches
        self.rows: list[dict[str, Any]] = []
        """Loss and values of every step."""
        self.notes: list[str] = []

    def steps(self, epoch: int) -> Iterator[tuple[int, list[ViewBatch]]]:
        """Yield the steps of an epoch."""
        self.step = epoch * self.steps_per_epoch
        for batch in self.batches:
            self._begin_step()
            yield self.step, batch
            self.step += 1

    def note(self, text: str) -> None:
        """Keep a line that a run would print."""
        self.notes.append(text)

    @property
    def row_due(self) -> bool:
        """Whether this step's values are logged: in every step."""
        return True

    def _check(self, loss: Tensor, optimizer: Optimizer) -> float:
        return loss.item()

    def _record(self, loss: float, values: dict[str, Value]) -> None:
        self.rows.append({"loss": loss, **values})


def noise(config: RunConfig, device: torch.device, masks: Masks | None = None) -> ViewBatch:
    """Make a batch of random pixels on a device, with all candidates of the configuration, or its only views.

    Args:
        config: says how many images and views, and of which sizes.
        device: where the pixels are.
        masks: sampler of patch masks, in a method that has one.
    """
    images, sizes = config.train.batch_size, dict[int, int]()
    for slot in config.view_slots():
        sizes[slot.transform.size] = sizes.get(slot.transform.size, 0) + slot.candidates
    pixels = [
        torch.randint(0, 256, (number, images, size, size, 3), dtype=torch.uint8, device=device)
        for size, number in sizes.items()
    ]
    index = torch.arange(images)
    drawn = None if masks is None else masks([(0, image) for image in range(images)]).to(device)
    return ViewBatch(pixels, torch.empty(images, sum(sizes.values()), len(COLUMNS)), index, masks=drawn)
