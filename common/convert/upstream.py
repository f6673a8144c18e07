"""Training checkpoints in the layout of an upstream trainer, and back.

A method says in its folder how its upstream calls the parts (`upstream_layout`); everything here follows from that. No
tensor is computed with: what is carried over is equal bit for bit.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hvp.common.config.resolving import flatten
from hvp.common.config.sections import RunConfig
from hvp.common.convert.report import Account, Became, Converted, write
from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import WRAPPER, misfits, read_content
from hvp.common.training.archive import save_sealed
from hvp.common.training.checkpoint import FORMAT, VERSION
from hvp.common.training.distributed import World
from hvp.common.training.folder import LAST, claimed, describe_run, versions
from hvp.common.training.loading import open_training_data
from hvp.common.training.optimizers import OptimizerName, build_optimizer
from hvp.common.training.resume import describe_images
from hvp.common.views import steps_per_epoch

Built = TypeVar("Built")

LARS = {"momentum": 0.9, "eta": 0.001, "weight_decay_filter": None, "lars_adaptation_filter": None}
"""A group's hyperparameters of the LARS that DINO, iBOT and HVP's released code share."""

RENAMED_ARGUMENTS = {"lr": "base_lr"}
"""Arguments of the upstream trainers that our configurations call differently."""

OF_THE_SCHEDULE = ("lr", "initial_lr", "weight_decay")
"""Hyperparameters that a trainer sets from its configuration, whatever a checkpoint says."""

OF_THE_MACHINE = ("foreach", "fused", "capturable", "differentiable")
"""Hyperparameters that say how an optimiser computes, and not what."""


@dataclass(frozen=True)
class Part:
    """A module's state in both checkpoints."""

    ours: str
    """Its entry in our checkpoint."""
    theirs: str
    """Its entry in the upstream's; several parts may share one."""
    module: nn.Module
    """Which keys and shapes there are; on the meta device."""
    wrapped: bool = False
    """The upstream saves it within DistributedDataParallel, so that its keys begin with `module.`."""
    prefix: str = ""
    """What the upstream's keys begin with, after `module.`."""
    rename: Callable[[str], str] = str
    """Our key as the upstream's, without the prefix."""

    def their_key(self, key: str) -> str:
        """What the upstream calls one of our keys, without `module.`."""
        return self.prefix + self.rename(key)


@dataclass(frozen=True)
class Optimizer:
    """An optimiser in both checkpoints. State dicts number parameters in the order of the groups."""

    name: OptimizerName
    ours: Sequence[Mapping[str, Any]]
    """Our trainer's parameter groups, of the parts' modules."""
    theirs: Sequence[Mapping[str, Any]]
    """The upstream's groups of the same parameters, with what it adds to a group."""
    lars: Mapping[str, Any] = field(default_factory=LARS.copy)
    """The hyperparameters of the upstream's LARS, by its names."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an upstream's training checkpoint relates to ours, for one configuration."""

    repository: str
    """Whose layout it is."""
    parts: Sequence[Part]
    optimizer: Optimizer | None
    """None where the upstream saves one that no other trainer can go on with."""
    scaler: str | None = None
    """Where the state of fp16's gradient scaler stands; None where the upstream has none."""
    always_scales: bool = False
    """The upstream reads a scaler's state always."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """What else its checkpoints hold and its loaders may read."""
    progress: Callable[[int, int], Mapping[str, int]] = lambda epoch, step: {"epoch": epoch}
    """What its checkpoints say of (epochs, steps) that are done."""
    unread: Sequence[str] = ("args",)
    """Entries of it that nothing here depends on."""
    notes: Sequence[str] = ()
    """What to know of a checkpoint in that layout."""


def on_meta(build: Callable[[Any, torch.device], Built], config: Any) -> Built:
    """Modules without memory: their names, shapes and parameters."""
    meta = torch.device("meta")
    with meta:
        return build(config, meta)


def to_upstream(checkpoint: Mapping[str, Any], layout: Layout, source: str) -> Converted:
    """One of our checkpoints as the upstream's trainer would have saved it.

    Args:
        checkpoint: as `load_checkpoint()` gives it.
        layout: of the checkpoint's method and configuration.
        source: what messages call the checkpoint.

    Raises:
        UserError: it does not fit its own configuration.
    """
    account = Account(checkpoint, source)
    content: dict[str, Any] = {}
    for part in layout.parts:
        state = _network(checkpoint, part.ours, source)
        _must_fit(part.module.state_dict(), state, f"{source}: {part.ours}")
        theirs = content.setdefault(part.theirs, {})
        for key, value in state.items():
            theirs[(WRAPPER if part.wrapped else "") + part.their_key(key)] = value
        account.settle("kept" if all(key in theirs for key in state) else "renamed", (part.ours,), to=part.theirs)
    if layout.optimizer is None:
        account.settle("left out", ("optimizer",), why="the upstream's trainer cannot go on with it")
    else:
        content["optimizer"] = _to_their_optimizer(_optimizer(checkpoint, source), layout.optimizer, source)
        account.settle(_as_numbered(layout.optimizer), ("optimizer",), to="optimizer")
    content |= layout.progress(checkpoint["epoch"], checkpoint["step"])
    content |= layout.header
    notes = list(layout.notes)
    scaler = checkpoint["precision"]["scaler"] or (_fresh_scaler() if layout.always_scales else {})
    if scaler and layout.scaler is None:
        notes.append("the gradient scaler's state is left out: the upstream trains in float32")
    elif scaler and layout.scaler is not None:
        content[layout.scaler] = scaler
    account.settle("left out", ("processes",), why="random numbers: the upstream keeps none")
    steps = checkpoint["steps_per_epoch"]
    inside = checkpoint["step"] % steps
    if inside and layout.optimizer is not None:
        notes.append(
            f"step {checkpoint['step']} is {inside} of {steps} steps into epoch {checkpoint['epoch']}, but the "
            "upstream resumes whole epochs: it would repeat them"
        )
    about = {"layout": layout.repository, **{key: checkpoint[key] for key in ("method", "epoch", "step", "config")}}
    return Converted(content, account.close(), about, notes)


def from_upstream(content: Mapping[str, Any], layout: Layout, source: str, *, fp16: bool) -> Converted:
    """The parts of our checkpoint out of an upstream trainer's.

    Args:
        content: the upstream's checkpoint.
        layout: of the method and configuration that the run goes on with.
        source: what messages call the checkpoint.
        fp16: whether the run goes on with a gradient scaler.

    Returns:
        As its content, what `Run` restores besides the clock, and `epoch`, the number of epochs done.

    Raises:
        UserError: the file lacks something, holds something else, or is of another architecture or optimiser.
    """
    if content.get("format") == FORMAT:
        raise UserError(f"{source}: is a checkpoint of hvp already, and no upstream trainer's")
    if layout.optimizer is None:
        raise UserError(
            f"{source}: no run can go on with a checkpoint of {layout.repository}: {'; '.join(layout.notes)}.\n"
            "    To evaluate an encoder, give the file to `hvp eval` as it is."
        )
    account = Account(content, source)
    result: dict[str, Any] = {}
    problems = []
    for entry in dict.fromkeys(part.theirs for part in layout.parts):
        parts = [part for part in layout.parts if part.theirs == entry]
        raw = _network(content, entry, source)
        theirs = {key.removeprefix(WRAPPER): value for key, value in raw.items()}
        own = {part.their_key(key): value for part in parts for key, value in part.module.state_dict().items()}
        if problem := misfits(own, theirs):
            problems.append(f"{entry}:{problem}")
            continue
        for part in parts:
            result[part.ours] = {key: theirs[part.their_key(key)] for key in part.module.state_dict()}
            _check_ties(part, result[part.ours], source)
        kept = all(part.their_key(key) in raw for part in parts for key in part.module.state_dict())
        account.settle("kept" if kept else "renamed", (entry,), to=", ".join(part.ours for part in parts))
    if problems:
        raise UserError(
            f"{source}: is no checkpoint of {layout.repository} with this configuration.\n    "
            + "\n    ".join(problems)
            + "\n    Give the preset or the configuration that it was trained with."
        )
    result["optimizer"] = _to_our_optimizer(_optimizer(content, source), layout.optimizer, source)
    account.settle(_as_numbered(layout.optimizer), ("optimizer",), to="optimizer")
    notes = _decay_note(content["optimizer"], layout.optimizer)
    scaler = (content.get(layout.scaler) if layout.scaler else None) or {}
    result["precision"] = {"scaler": (scaler or _fresh_scaler()) if fp16 else {}, "skipped_steps": 0}
    if scaler and not fp16:
        notes.append(f"{layout.scaler} is left out: train.precision is not fp16 here")
    if fp16 and not scaler:
        notes.append("the file has no gradient scaler: fp16 starts with a fresh one")
    used = {*(part.theirs for part in layout.parts), "optimizer", "epoch", layout.scaler, *layout.header}
    if left := [name for name in content if name not in used and name not in layout.unread]:
        notes.append(f"left out, as nothing here reads it: {', '.join(map(str, left))}")
    notes.append("the upstream keeps no random numbers: views and the like go on from the configuration's seed")
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or epoch < 0:
        raise UserError(f"{source}: does not say how many epochs it has done: its entry `epoch` is {epoch!r}")
    result["epoch"] = epoch
    return Converted(result, account.close(), {"layout": layout.repository, "epoch": epoch}, notes)


def write_run(path: Path, method: str, config: RunConfig, layout: Layout, out: Path, *, overwrite: bool) -> Converted:
    """Makes a run's folder out of an upstream trainer's checkpoint; `hvp resume` goes on with it.

    Args:
        path: the upstream's checkpoint.
        method, config: of the run. `data.path` names its images: how many steps an epoch has follows from them.
        layout: of that method and configuration.
        out: the run's folder.
        overwrite: delete an earlier run in it first.

    Raises:
        UserError: as `from_upstream()`; more epochs are done than the run has; there are no images; or the folder is
            not free.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty. Give another --out, or delete the run in it with --overwrite")
    if out.resolve() in path.resolve().parents:
        raise UserError(f"{path}: lies in {out}, which the new run would replace. Give another --out")
    read = read_content(path)
    converted = from_upstream(read, layout, str(path), fp16=config.train.precision == "fp16")
    parts = dict(converted.content)
    epoch = parts.pop("epoch")
    if epoch > config.train.epochs:
        raise UserError(
            f"{path}: {epoch} epochs are done, but train.epochs = {config.train.epochs}. Set at least as many"
        )
    source = open_training_data(config)
    steps = steps_per_epoch(len(source), config.train.batch_size)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "method": method,
        "config": config.model_dump(mode="json"),
        "step": epoch * steps,
        "epoch": epoch,
        "steps_per_epoch": steps,
        "log": {"loss_sum": 0.0, "loss_count": 0},
        "processes": [],
        "data": describe_images(source),
        "versions": versions(),
        **parts,
    }
    about = {**converted.about, "method": method, "step": epoch * steps, "config": content["config"]}
    notes = [*converted.notes, *differences(read.get("args"), config)]
    done = replace(converted, content=content, about=about, notes=notes)
    with claimed(out, World(), resume=False, overwrite=overwrite):
        describe_run(out, method, config)
        write(done, path, out / LAST, save_sealed)
    return done


def differences(args: object, config: RunConfig) -> list[str]:
    """Where the arguments in an upstream's checkpoint differ from the configuration's values of the same name."""
    if not isinstance(args, Namespace):
        return []
    given = {RENAMED_ARGUMENTS.get(name, name): value for name, value in vars(args).items()}
    notes = []
    for key, value in flatten(config.model_dump(mode="json")).items():
        name = key.rpartition(".")[2]
        if name in given and _plain(given[name]) != _plain(value):
            notes.append(f"the upstream trained with {name} = {given[name]}, the run goes on with {key} = {value}")
    return notes


def _entry(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    entry = content.get(name)
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(
            f"{source}: has no {name}; it has: {', '.join(map(str, content)) or 'nothing'}.\n"
            "    A training checkpoint is needed, which holds networks and optimiser. To evaluate an encoder, give the "
            "file to `hvp eval` as it is."
        )
    return entry


def _network(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Tensor]:
    entry = _entry(content, name, source)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entry.items()):
        raise UserError(f"{source}: its entry {name} holds other things than weights")
    if twice := [key for key in entry if f"{WRAPPER}{key}" in entry]:
        raise UserError(f"{source}: its entry {name} holds {twice[0]} with and without {WRAPPER}")
    return entry


def _optimizer(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    entry = _entry(content, "optimizer", source)
    if not isinstance(entry.get("state"), Mapping) or not isinstance(entry.get("param_groups"), list):
        raise UserError(f"{source}: its entry optimizer is no optimiser's state")
    return entry


def _decay_note(state: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    """Says where a weight decay that no schedule sets is another one."""
    found, here = (groups[0].get("weight_decay") for groups in (state["param_groups"], optimizer.ours))
    if here is None or found is None or math.isclose(found, here):
        return []
    return [f"the upstream trained with weight decay {found:g}, the run goes on with {here:g}"]


def _as_numbered(optimizer: Optimizer) -> Became:
    """What became of an optimiser's moments: numbers are their names."""
    theirs = _numbers(optimizer.theirs)
    return "kept" if all(theirs[key] == number for key, number in _numbers(optimizer.ours).items()) else "renamed"


def _must_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    if problem := misfits(own, state):
        raise UserError(f"{what} does not fit the checkpoint's own configuration.{problem}")


def _check_ties(part: Part, state: Mapping[str, Tensor], source: str) -> None:
    """Sees to it that tensors which are one parameter here are equal in the file, so that none of them is lost."""
    first: dict[int, str] = {}
    for key, parameter in part.module.state_dict(keep_vars=True).items():
        other = first.setdefault(id(parameter), key)
        if not torch.equal(state[key], state[other]):
            raise UserError(
                f"{source}: {part.theirs} has different {key} and {other}, but with this configuration they are one. "
                "Give the configuration that it was trained with"
            )


def _numbers(groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The number of every parameter, by its identity."""
    parameters = [p for group in groups for p in group["params"]]
    return {id(p): number for number, p in enumerate(parameters)}


def _to_their_optimizer(state: Mapping[str, Any], optimizer: Optimizer, source: str) -> dict[str, Any]:
    ours, theirs = _numbers(optimizer.ours), _numbers(optimizer.theirs)
    _check_groups(state, optimizer.ours, source)
    number_of = {number: theirs[parameter] for parameter, number in ours.items()}
    group_of = {
        id(p): g for g, group in zip(state["param_groups"], optimizer.ours, strict=True) for p in group["params"]
    }
    groups = []
    for group in optimizer.theirs:
        # what both set: of the group that holds the first parameter which is trained
        rates = next(group_of[id(p)] for p in group["params"] if id(p) in group_of)
        groups.append(
            {
                **_hyperparameters(optimizer),
                **{key: rates[key] for key in ("lr", "weight_decay")},
                **{key: value for key, value in group.items() if key not in ("params", "weight_decay")},
                "params": [theirs[id(p)] for p in group["params"]],
            }
        )
    moments = {number_of[number]: moments for number, moments in state["state"].items()}
    return {"state": dict(sorted(moments.items())), "param_groups": groups}


def _to_our_optimizer(state: Mapping[str, Any], optimizer: Optimizer, source: str) -> dict[str, Any]:
    ours, theirs = _numbers(optimizer.ours), _numbers(optimizer.theirs)
    _check_groups(state, optimizer.theirs, source)
    expected = _hyperparameters(optimizer)
    for group in state["param_groups"]:
        for key, value in expected.items():
            if key not in (*OF_THE_SCHEDULE, *OF_THE_MACHINE) and key in group and _plain(group[key]) != _plain(value):
                raise UserError(
                    f"{source}: its optimiser has {key} = {group[key]}, but {optimizer.name} has {value} here. The run "
                    "cannot go on as it was"
                )
    number_of = {number: ours[parameter] for parameter, number in theirs.items() if parameter in ours}
    if untrained := [number for number in state["state"] if number not in number_of]:
        raise UserError(
            f"{source}: its optimiser has trained {len(untrained)} parameters that are fixed with this configuration. "
            "Give the configuration that it was trained with"
        )
    shapes = {ours[id(p)]: p.shape for group in optimizer.ours for p in group["params"]}
    moments = {number_of[number]: moments for number, moments in sorted(state["state"].items())}
    for number, values in moments.items():
        wrong = [n for n, t in values.items() if isinstance(t, Tensor) and t.ndim and t.shape != shapes[number]]
        if wrong:
            raise UserError(f"{source}: its optimiser's {wrong[0]} of parameter {number} is of another shape")
    return {"state": dict(sorted(moments.items())), "param_groups": _our_groups(optimizer)}


def _check_groups(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], source: str) -> None:
    found = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(group["params"]) for group in groups]
    if found != expected:
        raise UserError(
            f"{source}: its optimiser has groups of {found} parameters, but with this configuration they are "
            f"{expected}. Give the configuration that it was trained with"
        )


def _hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """A group's, as the upstream's optimiser starts with them."""
    if optimizer.name == "lars":
        return dict(optimizer.lars)
    stand_in = [nn.Parameter(torch.empty(0))]
    made = AdamW(stand_in) if optimizer.name == "adamw" else SGD(stand_in, lr=0.0, momentum=0.9)
    return {key: value for key, value in made.state_dict()["param_groups"][0].items() if key != "params"}


def _our_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Our groups as a fresh optimiser saves them, on stand-ins that take no memory."""
    stand_ins = [
        {**group, "params": [nn.Parameter(torch.empty((0,) * p.ndim)) for p in group["params"]]}
        for group in optimizer.ours
    ]
    groups: list[dict[str, Any]] = build_optimizer(optimizer.name, stand_ins).state_dict()["param_groups"]
    return groups


def _plain(value: Any) -> Any:
    """A hyperparameter as it compares: numpy's numbers as Python's, lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _fresh_scaler() -> dict[str, Any]:
    return torch.amp.GradScaler("cpu").state_dict()
