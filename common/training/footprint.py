"""Minimum memory of a run, computed from its configuration alone, and a check that it fits.

Every number is a lower bound that counts only tensors sure to exist at the same time. A real run takes several times as
much, so a run that passes may still run out of memory; one that is refused could never have finished.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import comb, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hvp.common.errors import UserError
from hvp.common.training.checkpoint import MOMENTS
from hvp.common.training.distributed import World, share_of_batch
from hvp.common.training.precision import pick_device

BuildModules = Callable[[Any, torch.device], Sequence[nn.Module]]


@dataclass(frozen=True)
class Footprint:
    """Minimum bytes that one process holds at once in a step."""

    networks: int
    """Weights, gradients and the optimiser's moments."""

    views: int
    """All candidate views of one part of the batch, normalised, in float32."""

    objective: int
    """Tensors of the loss: logits of prototypes, or similarities between images."""

    selection: int
    """Losses of the compared combinations."""

    pixels: int
    """All candidate views of one part of the batch as the loader yields them, on the host."""

    @property
    def device(self) -> int:
        """Bytes on the device that holds the networks."""
        # the selection's tensors are freed before the objective's are made
        return self.networks + self.views + max(self.objective, self.selection)


SETTINGS = {
    "networks": "the sizes in the section model, or the network (model.arch)",
    "views": "train.batch_size, the crops' sizes, or the candidates; or raise train.accumulate",
    "objective": "train.batch_size, or the prototypes; or raise train.accumulate",
    "selection": "selection.comparisons, or the candidates; or raise train.accumulate",
    "pixels": "train.batch_size, the crops' sizes, or the candidates; or raise train.accumulate",
}
"""Settings to lower, by the largest part of the footprint."""


class _NoValues(TorchFunctionMode):
    """Skip operations that only fill tensors: meta tensors have no values, and this halves the time."""

    SKIPPED = frozenset({"normal_", "uniform_", "erfinv_", "clamp_", "add_", "mul_", "fill_", "zero_", "copy_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]  # the latter from torch.nn.init
        return func(*args, **(kwargs or {}))


def footprint(config: Any, build_modules: BuildModules, world: World = World()) -> Footprint:
    """Estimate the memory of one process.

    Args:
        config: a `RunConfig`.
        build_modules: the method's, as in `hvp.methods.Method`. The networks are built on the meta device.
        world: the processes that share the batch.

    Raises:
        UserError: the batch does not divide among the processes, or the networks cannot be built.
    """
    part = share_of_batch(config.train.batch_size, config.train.accumulate, world)
    slots = config.view_slots()
    views = [(slot.candidates if _selects(config) else slot.kept, slot.transform.size) for slot in slots]
    pixels = part * sum(number * side**2 * 3 for number, side in views)
    meta = torch.device("meta")
    with meta, _NoValues():
        modules = build_modules(config, meta)
    # by identity, because parts of a network may appear in it twice (shared heads)
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    networks = sum(t.numel() * t.element_size() for t in tensors.values())
    learned = sum(t.numel() * t.element_size() for t in tensors.values() if t.requires_grad)
    networks += (1 + MOMENTS[config.optim.optimizer]) * learned
    if getattr(config.train, "sharding", "ddp") == "fsdp":
        networks //= world.size
    return Footprint(networks, 4 * pixels, config.objective_bytes(part), _selection_bytes(config, part), pixels)


def _selection_bytes(config: Any, part: int) -> int:
    """Return the bytes of the float32 loss terms of all combinations compared in one part."""
    slots, selection = config.combination_slots(), config.selection
    if selection.policy == "random" or slots.num_combinations == 1 or not _selects(config):
        return 0
    if selection.search == "exact":
        choices = prod(comb(len(group.candidates), group.kept) for group in slots.target_groups)
        return 4 * part * choices * slots.num_views
    return 4 * part * min(selection.comparisons, slots.num_combinations) * len(slots.terms)


def _selects(config: Any) -> bool:
    """Return whether any step of the run selects views."""
    return bool(config.selection.start < 1)


def check_fits(config: Any, build_modules: BuildModules, world: World = World()) -> Footprint:
    """Check that the run's minimum memory fits the GPU and this machine, and return it.

    Args:
        config, build_modules, world: as for `footprint()`.

    Raises:
        UserError: it cannot fit; the message lists the largest parts and the settings to lower.
    """
    device = pick_device(config.train.device)
    needs = footprint(config, build_modules, world)
    host = host_memory()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device).total_memory
        limits = [("the GPU", needs.device, gpu), ("this machine", needs.pixels, host)]
    else:
        limits = [("this machine", needs.device + needs.pixels, host)]
    for place, needed, available in limits:
        if available is not None and needed > available:
            raise UserError(_message(place, needed, available, needs))
    return needs


def _message(place: str, needed: int, available: int, needs: Footprint) -> str:
    parts = sorted(((getattr(needs, field.name), field.name) for field in fields(needs)), reverse=True)
    listed = ", ".join(f"{name} {size(number)}" for number, name in parts if number > needed / 100)
    return (
        f"the run needs at least {size(needed)} of memory in each process, but {place} has {size(available)} "
        f"({listed}).\n    Lower {SETTINGS[parts[0][1]]}"
    )


def host_memory() -> int | None:
    """Return the machine's memory and swap space in bytes, or None if the system does not report it."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        return sum(1024 * int(line[1]) for line in lines if line[0] in ("MemTotal:", "SwapTotal:")) or None
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def size(number: int) -> str:
    """Format a number of bytes, such as `1.5 GiB`."""
    for unit, name in ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 2**20:.0f} MiB"
