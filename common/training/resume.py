"""Resuming a run from its newest whole checkpoint."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from hvp.common.config.resolving import flatten
from hvp.common.config.sections import RunConfig
from hvp.common.data import ImageSource, same_dataset
from hvp.common.errors import UserError
from hvp.common.training.archive import DamagedCheckpoint
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.distributed import World
from hvp.common.training.folder import LAST, PREVIOUS
from hvp.common.views.randomness import mix

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""Options of a console that prints text as it is."""

FREE_TO_CHANGE = {
    *("data.workers", "data.timeout", "train.save_every", "train.keep_every", "train.log_every", "train.device"),
    "train.sharding",
}
"""Keys that may differ between a run and its continuation without changing its results."""


class Stateful(Protocol):
    """A module, optimiser or precision."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class Start:
    """The point at which a run starts: its beginning, or a checkpoint."""

    step: int = 0
    """Optimiser steps done."""

    saved: int | None = None
    """Step of the last checkpoint."""

    last_is_whole: bool = True
    """False if a damaged `last.pt` was passed over for the one before."""

    loss: tuple[float, int] = (0.0, 0)
    """Sum and number of the steps' losses since the log's last row."""

    epoch_loss: tuple[float, int] = (0.0, 0)
    """Sum and number of the steps' losses since the epoch's start."""

    skipped: list[str] = field(default_factory=list)
    """Images that this process replaced."""


def describe_images(source: ImageSource) -> dict[str, Any]:
    """Return the identity of a run's images, for its checkpoints."""
    return {"name": source.name, "images": len(source)}


def restore(
    out: Path,
    method: str,
    config: RunConfig,
    source: ImageSource,
    parts: Mapping[str, Stateful],
    steps_per_epoch: int,
    world: World,
    device: torch.device,
    console: Console,
    *,
    force: bool,
    data_moved: bool,
) -> Start:
    """Load a run's newest whole checkpoint into its parts and the random generators.

    Args:
        out, method, config, source, parts, steps_per_epoch, world, device, console: as in `Run`.
        force: accept another configuration.
        data_moved: accept another path of the images.

    Returns:
        The point to continue from; the beginning if no checkpoint was written yet.

    Raises:
        UserError: no checkpoint can be read, or it does not fit.
    """
    content: dict[str, Any] | None = None
    whole = True
    with world.agreeing():
        if world.leader:
            content, whole = _load_newest(out, console)
    step = world.broadcast(None if content is None else content["step"])
    if step is None:
        if world.leader:
            console.print(f"{out}: no checkpoint was written yet, so the run starts from the beginning", **PLAIN)
        return Start()
    with world.agreeing():
        if content is None:
            content, _ = _load_newest(out, Console(quiet=True))
        if content is None or content["step"] != step:
            raise UserError(f"{out}: the leader reads step {step} here, this machine does not. Is the folder shared?")
        differences = _config_differences(content, method, config, out, data_moved)
        differences += _image_differences(content, source, steps_per_epoch)
        if differences and not force:
            raise UserError(_refusal(differences, out))
        _load_parts(content, parts, out)
        _restore_randomness(content, config, world, device, out)
    if world.leader:
        total = config.train.epochs * steps_per_epoch
        console.print(f"{out / LAST}: continuing after step {step} of {total}", **PLAIN)
    log = content["log"]
    return Start(
        step,
        step,
        whole,
        (log["loss_sum"], log["loss_count"]),
        # absent from checkpoints of an upstream or of an earlier version
        (log.get("epoch_loss_sum", 0.0), log.get("epoch_loss_count", 0)),
        [name for stream in content["processes"] for name in stream["skipped"]] if world.leader else [],
    )


def _load_newest(out: Path, console: Console) -> tuple[dict[str, Any] | None, bool]:
    """Return the last checkpoint or, if it is damaged or missing, the one before; None if there is neither.

    Returns:
        The checkpoint, and whether no damaged one was passed over.

    Raises:
        DamagedCheckpoint: there are some, but none is whole.
        UserError: one cannot be read.
    """
    problems: list[str] = []
    for path in (out / LAST, out / PREVIOUS):
        if not path.exists():  # last.pt is missing after a crash between the two renames of a save
            continue
        try:
            content = load_checkpoint(path)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems:
            console.print(f"{problems[0]}\nUsing {path} of step {content['step']} instead", **PLAIN)
        return content, not problems
    if not problems:
        return None, True
    kept = max(out.glob("epoch*.pt"), default=None)
    way = f"Copy {kept} to {out / LAST} to continue from there" if kept else "Start over with hvp pretrain --overwrite"
    raise DamagedCheckpoint("\n".join(problems) + f"\nNo checkpoint of this run can be resumed. {way}")


def _config_differences(
    content: Mapping[str, Any], method: str, config: RunConfig, out: Path, data_moved: bool
) -> list[str]:
    if content["method"] != method:
        raise UserError(f"{out}: is a run of {content['method']}, not of {method}")
    free: Collection[str] = FREE_TO_CHANGE | ({"data.path"} if data_moved else set())
    old, new = flatten(content["config"]), flatten(config.model_dump(mode="json"))
    if same_dataset(old.get("data.path"), new.get("data.path")):
        free = {*free, "data.path"}
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) and key not in free]
    return [f"{key}: {old.get(key)} in the checkpoint, {new.get(key)} now" for key in keys]


def _image_differences(content: Mapping[str, Any], source: ImageSource, steps_per_epoch: int) -> list[str]:
    steps = content["steps_per_epoch"]
    # early versions did not count the images; without a count, only the number of steps can tell
    images = content.get("data") or {"name": content["config"].get("data", {}).get("path"), "images": None}
    here = describe_images(source)
    if images["images"] == here["images"] or (not images["images"] and steps == steps_per_epoch):
        return []
    return [
        f"images: {images['name']} in the checkpoint, {here['name']} now; steps per epoch: {steps} and "
        f"{steps_per_epoch}"
    ]


def _refusal(differences: list[str], out: Path) -> str:
    listed = "\n".join(f"  {line}" for line in differences)
    moved = any(line.startswith("data.path:") for line in differences)
    return (
        f"{out / LAST}: belongs to another configuration:\n{listed}\n"
        "Resume with the same values, start a new run with another --out, or continue anyway with --force"
        + (f". If the same images have moved: hvp resume {out} --data DIR" if moved else "")
    )


def _load_parts(content: Mapping[str, Any], parts: Mapping[str, Stateful], out: Path) -> None:
    for name, part in parts.items():
        try:
            part.load_state_dict(content[name])
            _check_moments(getattr(part, "part", part))
        except Exception as error:  # another architecture with --force; or anything at all in the entry's place
            raise UserError(f"{out}: {name} does not fit this configuration: {error}") from error


def _check_moments(part: object) -> None:
    """Check that an optimiser's moments have the shapes of its parameters; PyTorch does not.

    Raises:
        ValueError: they have not.
    """
    if not isinstance(part, Optimizer):
        return
    for parameter, moments in part.state.items():
        for name, value in moments.items():
            shape = list(value.shape) if isinstance(value, Tensor) else value
            if name != "step" and value is not None and shape != list(parameter.shape):
                raise ValueError(f"{name} is {shape!r:.80}, of a parameter of shape {list(parameter.shape)}")


def _restore_randomness(
    content: Mapping[str, Any], config: RunConfig, world: World, device: torch.device, out: Path
) -> None:
    streams = content["processes"]
    if world.rank >= len(streams):
        torch.manual_seed(mix(config.train.seed, world.rank, content["step"]))
        return
    try:
        torch.set_rng_state(streams[world.rank]["torch"])
        if device.type == "cuda" and streams[world.rank]["cuda"] is not None:
            torch.cuda.set_rng_state(streams[world.rank]["cuda"])
    except RuntimeError as error:
        raise DamagedCheckpoint(f"{out}: its random states are not PyTorch's: {error}") from error
