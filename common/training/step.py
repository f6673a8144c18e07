"""Mechanics of a training step: device, precision, hard views, Rescue, gradient accumulation.

A trainer writes its step in the upstream's order and calls these where it needs them:

    for it, batch in run.steps(epoch):                         # steps that are not done yet
        ...                                                    # schedules; optimizer.zero_grad()
        for part in batch:                                     # train.accumulate parts
            views = run.views(part)
            with run.precision.autocast():
                views = run.hard_views(views, score, network)  # hvp:
                loss = ...                                     # forward pass of run.model
                rescued = run.rescue(features, part)           # rescue:
            run.backward(loss, rescued)
        run.optimize(optimizer)
        run.record(lr=lr)

# B images, V candidate views, G global ones among them
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvp.common.config.sections import RunConfig
from hvp.common.hardviews import Selection
from hvp.common.networks import Features
from hvp.common.training.collapse import CollapseWatch
from hvp.common.training.distributed import World, data_parallel, exchange_gradients
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.selecting import Kept, ViewSelector
from hvp.common.training.timing import Stopwatch
from hvp.common.views import ViewBatch, normalize

Value = float | list[float]
Score = Callable[[list[Tensor]], Tensor | tuple[Tensor, Any]]
"""Pair losses of all candidates, [B, T, V]; or these and network outputs that the step can use again."""


class Step(ABC):
    """Base of `Run`: everything in a step that is the same in every trainer.

    Args:
        config: the run's configuration.
        trained: the network that learns. Equal in all processes.
        precision: device and number format.
        world: the processes of the run.
        rescuer: the Rescue loss of the network that learns.
        steps_per_epoch: optimiser steps of an epoch.
        step: optimiser steps already done.

    Raises:
        SharedError: the processes hold different weights.
    """

    def __init__(
        self,
        config: RunConfig,
        trained: nn.Module,
        precision: Precision,
        world: World,
        rescuer: Rescuer,
        *,
        steps_per_epoch: int,
        step: int = 0,
    ) -> None:
        self.precision = precision
        self.device = precision.device
        self.world = world
        self.step = step
        """Optimiser steps done."""
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.train.epochs * steps_per_epoch
        self.selecting = Stopwatch(self.device)
        self.collapse = CollapseWatch(self.note)
        self.rescuer = rescuer
        self.selector = ViewSelector(config, self.total_steps, world.rank)
        self.model: Any = data_parallel(trained, world, self.device)
        """The network that learns; its backward pass averages gradients over the processes."""
        self.kept: Kept
        """Candidates that the current part is trained on."""
        self._num_parts = config.train.accumulate
        self._begin_step()

    def _begin_step(self) -> None:
        self._part = 0
        self._losses: list[Tensor] = []
        self._loss_parts: dict[str, Tensor] = {}
        self._checked: float | None = None
        self._selection: Selection | None = None

    @abstractmethod
    def steps(self, epoch: int) -> Iterator[tuple[int, list[ViewBatch]]]:
        """Yield the steps of an epoch that are not done yet: number, counted from 0, and the parts of the batch."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Print a line that stays."""

    @property
    @abstractmethod
    def row_due(self) -> bool:
        """Whether this step's values are logged."""

    @abstractmethod
    def _check(self, loss: Tensor, optimizer: Optimizer) -> float:
        """Return the step's loss, mean over the processes, once it and the gradients are known to be finite."""

    @abstractmethod
    def _record(self, loss: float, values: dict[str, Value]) -> None:
        """Take the step's loss; log it and the values if a row is due."""

    def views(self, part: ViewBatch) -> list[Tensor]:
        """Return a part's views on the device, normalised: a tensor [n, B, 3, H, W] float32 for each resolution.

        Gradients of all but the last part wait in each process for those of the last one.
        """
        self._part += 1
        exchange_gradients(self.model, self._part == self._num_parts)
        return [normalize(pixels.to(self.device, non_blocking=True)) for pixels in part.pixels]

    def masks(self, part: ViewBatch) -> Tensor:
        """Return the patch masks of a part's global candidates on the device, [G, B, N] bool."""
        assert part.masks is not None  # the session was given a mask sampler
        return part.masks.to(self.device, non_blocking=True).flatten(2)

    def hard_views(self, views: list[Tensor], score: Score, *networks: nn.Module) -> list[Tensor]:
        """hvp: return the views to train on: the hardest combination of each image's candidates, by `select()`.

        In a step that does not select, these are the first candidates of every slot, as in a vanilla run. `kept` says
        which ones they are.

        Args:
            views: all candidates, a tensor [n, B, ...] for each resolution.
            score: maps the candidates to pair losses [B, T, V]. Runs without gradient, under the caller's autocast.
            networks: those that `score` runs; `selection.mode` sets their mode.

        Returns:
            A tensor [kept, B, ...] for each resolution.
        """
        if not self.selector.acts_on(self.step):
            first = torch.tensor(self.selector.first_views, device=self.device)
            self.kept = Kept(first.expand(views[0].shape[1], -1))
            return self.selector.first(views)
        with self.selecting.running():
            with self.selector.scoring(*networks):
                scored = score(views)
            pair_loss, outputs = scored if isinstance(scored, tuple) else (scored, None)
            self._selection = self.selector.keep(views, pair_loss, self.step)
            self.kept = Kept(self._selection.index, outputs)
        return self._selection.views

    def rescue(self, features: Features, part: ViewBatch) -> Tensor:
        """rescue: return the weighted Rescue loss of a part, scalar float32; 0 where the run does not rescue.

        Args:
            features: of both views that are trained on, [2 B, .] each, with gradient.
            part: their images.

        Raises:
            BadImage: an image cannot be read again.
        """
        return self.rescuer.loss(features, part) if self.rescuer.enabled else torch.zeros((), device=self.device)

    def backward(self, *losses: Tensor, **parts: Tensor) -> None:
        """Add the gradients of the sum of some losses of this part of the batch.

        Args:
            losses: scalars, means over the images of the part.
            parts: parts of the loss to log, by the name of their column; `loss_part()` returns them.
        """
        self.precision.backward(sum(losses[1:], start=losses[0]) / self._num_parts)
        shares = [loss.detach() / self._num_parts for loss in losses]
        self._losses = [a + b for a, b in zip(self._losses, shares, strict=True)] if self._losses else shares
        for name, value in parts.items():
            share = value.detach() / self._num_parts
            self._loss_parts[name] = self._loss_parts[name] + share if name in self._loss_parts else share

    @property
    def objective(self) -> float:
        """First loss given to `backward()`, mean over the parts: the method's objective without Rescue."""
        return self._losses[0].item()

    def loss_part(self, name: str) -> float:
        """Return a part of the loss, mean over the parts of the batch."""
        return self._loss_parts[name].item()

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients to their true size and check that they and the loss are finite.

        `optimize()` does this itself; call it before changing gradients, to clip them for example.

        Raises:
            UserError: the loss or a gradient is not finite. The weights are those of the step before.
        """
        self.precision.unscale(optimizer)
        self._checked = self._check(sum(self._losses[1:], start=self._losses[0]), optimizer)

    def optimize(self, optimizer: Optimizer) -> None:
        """Make the optimiser's step, after `unscale()`.

        Raises:
            UserError: as in `unscale()`.
        """
        if self._checked is None:
            self.unscale(optimizer)
        self.precision.step(optimizer)

    def record(self, **values: Value | Callable[[], Value]) -> None:
        """Log the step: its loss and the statistics of precision, selection and Rescue, with the trainer's values.

        Args:
            values: columns of the log; a function is called only if a row is due.

        Raises:
            UserError: the row cannot be written.
        """
        assert self._checked is not None  # optimize() came before
        row: dict[str, Value] = {}
        if self.row_due:
            row = {name: value.item() for name, value in self._loss_parts.items()}
            row |= {name: value() if callable(value) else value for name, value in values.items()}
            row |= self.precision.statistics() | self.selector.statistics(self._selection) | self.rescuer.statistics()
        self._record(self._checked, row)
