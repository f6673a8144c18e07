"""The selection of hard views in a training run: when it acts, among which candidates, and its statistics."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvp.common.config.sections import RunConfig, SelectionConfig
from hvp.common.hardviews import Selection, gather_views, select
from hvp.common.views import first_views
from hvp.common.views.randomness import mix


class ViewSelector:
    """HVP's schedule and search in a training step; `Step.hard_views()` is built on it.

    Args:
        config: candidates of each slot, and how to select.
        total_steps: optimiser steps of the run, for `selection.start`.
        rank: this process's rank, for random choices that differ between images.
    """

    def __init__(self, config: RunConfig, total_steps: int, rank: int = 0) -> None:
        self.selection, self.seed = config.selection, config.train.seed
        # Combinations shared by a batch are the same in all processes; those drawn for every image are not.
        drawn_per_image = config.selection.per_image or config.selection.policy == "random"
        self.stream = (rank,) if rank and drawn_per_image else ()
        self.slots = config.combination_slots()
        self.first_views = list(first_views(config.view_slots()))
        self.first_step = math.ceil(config.selection.start * total_steps)

    def acts_on(self, step: int) -> bool:
        """Return whether this step selects: there is a choice, and `selection.start` and `.every` ask for one."""
        return (
            self.slots.num_combinations > 1
            and step >= self.first_step
            and (step - self.first_step) % self.selection.every == 0
        )

    def first(self, views: list[Tensor]) -> list[Tensor]:
        """Return the first candidates of every slot, those of a vanilla step.

        Args:
            views: one tensor [n, B, ...] for each resolution: all candidates, or only the first ones, as the loader
                makes them for a step that does not select.
        """
        if sum(map(len, views)) == self.slots.num_slots:
            return views
        index = torch.tensor(self.first_views, device=views[0].device)
        return gather_views(views, index.expand(views[0].shape[1], -1), self.slots)

    @contextmanager
    def scoring(self, *networks: nn.Module) -> Iterator[None]:
        """Run the forward passes of a selection: without gradient, networks in the mode of `selection.mode`.

        In mode `train`, batch norm uses the statistics of the candidates and updates its running ones, as in HVP's
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
            # Autocast keeps the weights it has cast until its block ends. If the training pass reused casts made here,
            # their gradients would come after all others: too late for DDP to overlap the exchange, and after FSDP's
            # hooks, which expect gradients at the end of each block, have run.
            torch.clear_autocast_cache()

    def keep(self, views: list[Tensor], pair_loss: Tensor, step: int) -> Selection:
        """Select the views that the policy asks for.

        Args:
            views: one tensor [n, B, ...] for each resolution.
            pair_loss: losses of all candidates, [B, T, V].
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
        """Return columns for the log: share of images that keep each candidate, and images without a finite loss."""
        if kept is None:
            return {}
        counts = torch.bincount(kept.index.flatten(), minlength=self.slots.num_views)
        return {
            "kept_hist": (counts / len(kept.index)).tolist(),
            "kept_loss": kept.loss.mean().item(),
            "no_finite_loss": float(kept.fallback.sum()),
        }


def selecting_steps(selection: SelectionConfig, total_steps: int) -> Callable[[int], int]:
    """Return a function that counts the selecting steps of a run from a given step on (counted from 0)."""
    first_step = math.ceil(selection.start * total_steps)

    def before(step: int) -> int:
        return max(0, math.ceil((step - first_step) / selection.every))

    return lambda step: before(total_steps) - before(step)


@dataclass(frozen=True)
class Kept:
    """The candidates that a part of a batch is trained on, for whatever else belongs to them."""

    index: Tensor
    """[B, S] int64: the candidate in each slot of each image, the two global crops first."""

    scored: Any = None
    """Network outputs of the selection, a tensor or a tuple of tensors [G, B, ...]; None if nothing was selected."""

    def of(self, candidates: Tensor) -> Tensor:
        """Return the rows of the two kept global crops, [2 B, ...], from those of all G global candidates, [G, B, ...].

        Candidates are masks of the crops, for example.
        """
        images = torch.arange(len(self.index), device=candidates.device)
        return candidates[self.index[:, :2].T, images].flatten(0, 1)

    @property
    def outputs(self) -> Any:
        """Outputs of the selection for the two kept global crops, [2 B, ...] each; None if nothing was selected.

        The network would compute them again, except where batch norm makes them depend on the other candidates.
        """
        if self.scored is None:
            return None
        return tuple(map(self.of, self.scored)) if isinstance(self.scored, tuple) else self.of(self.scored)
