"""When a run selects views, among which, and what its log says of it. What views cost is the method's to say."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvp.common.config.sections import RunConfig, SelectionConfig
from hvp.common.hardviews import Selection, gather_views, select
from hvp.common.views import first_views
from hvp.common.views.randomness import mix


class ViewSelector:
    """HVP in a trainer's step:

        if selector.acts_on(step):
            with selector.scoring(model):
                losses = pair_losses(...)               # the method's, [B, T, V]
            kept = selector.keep(views, losses, step)   # kept.views are trained on
        else:
            views = selector.first(views)

    Args:
        config: says what is sampled and how to select.
        total_steps: optimiser steps of the run, for `selection.start`.
        rank: this process's, for choices that are an image's own.
    """

    def __init__(self, config: RunConfig, total_steps: int, rank: int = 0) -> None:
        self.selection, self.seed = config.selection, config.train.seed
        # A list of combinations that a batch shares is the same in all processes. What is drawn for every image is not.
        drawn_per_image = config.selection.per_image or config.selection.policy == "random"
        self.stream = (rank,) if rank and drawn_per_image else ()
        self.slots = config.combination_slots()
        self.first_views = list(first_views(config.view_slots()))
        self.first_step = math.ceil(config.selection.start * total_steps)

    def acts_on(self, step: int) -> bool:
        """Whether this step selects: more than one combination, and `selection.start` and `.every` say so."""
        return (
            self.slots.num_combinations > 1
            and step >= self.first_step
            and (step - self.first_step) % self.selection.every == 0
        )

    def first(self, views: list[Tensor]) -> list[Tensor]:
        """The first candidates of every slot, those of a vanilla step.

        Args:
            views: one tensor a resolution, [n, B, ...]: all candidates, or, as the loader makes them for a step that
                does not select, these alone.
        """
        if sum(map(len, views)) == self.slots.num_slots:
            return views
        index = torch.tensor(self.first_views, device=views[0].device)
        return gather_views(views, index.expand(views[0].shape[1], -1), self.slots)

    @contextmanager
    def scoring(self, *networks: nn.Module) -> Iterator[None]:
        """For the forward passes of a selection: without gradient, the networks in the mode that `selection.mode` says.

        In mode `train`, batch norm takes the statistics of the candidates and moves its running ones, as in HVP's
        released code.
        """
        if self.selection.mode == "eval":
            for network in networks:
                network.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for network in networks:
                network.train()
            # Autocast keeps the weights it has cast for as long as its block lasts. Of casts made here, the training
            # pass would take the gradient after that of everything else, too late for DDP to send any of it before the
            # end; FSDP's hooks, which look for gradients at the end of each block, would not find it at all.
            torch.clear_autocast_cache()

    def keep(self, views: list[Tensor], pair_loss: Tensor, step: int) -> Selection:
        """The views that the policy asks for.

        Args:
            views: one tensor a resolution, [n, B, ...].
            pair_loss: [B, T, V], of all candidates.
            step: optimiser step; with the seed it decides which combinations are compared.
        """
        return select(
            views,
            pair_loss,
            self.slots,
            search=self.selection.search,
            comparisons=self.selection.comparisons,
            per_image=self.selection.per_image,
            policy=self.selection.policy,
            generator=torch.Generator().manual_seed(mix(self.seed, step, *self.stream)),
        )

    def statistics(self, kept: Selection | None) -> dict[str, float | list[float]]:
        """For the log: which share of the images keeps each candidate, and images without a finite loss."""
        if kept is None:
            return {}
        counts = torch.bincount(kept.index.flatten(), minlength=self.slots.num_views)
        return {
            "kept_hist": (counts / len(kept.index)).tolist(),
            "kept_loss": kept.loss.mean().item(),
            "no_finite_loss": float(kept.fallback.sum()),
        }


def selecting_steps(selection: SelectionConfig, total_steps: int) -> Callable[[int], int]:
    """Number of a run's steps, from a given one on (counted from 0), for which `ViewSelector.acts_on()` is true."""
    first_step = math.ceil(selection.start * total_steps)

    def before(step: int) -> int:
        return max(0, math.ceil((step - first_step) / selection.every))

    return lambda step: before(total_steps) - before(step)


def of_kept(kept: Selection, candidates: Tensor) -> Tensor:
    """What belongs to the two kept global crops, [2 B, ...], out of that of all global candidates, [G, B, ...]."""
    images = torch.arange(len(kept.index), device=candidates.device)
    return candidates[kept.index[:, :2].T, images].flatten(0, 1)
