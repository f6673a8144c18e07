"""Training checkpoints between our layout and an upstream trainer's.

The method's `upstream_layout` describes the upstream's layout. Tensors are copied bit for bit; none is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvp.common.convert.layouts import Layout, Part
from hvp.common.convert.optimizer_state import decay_note, numbering_became, to_our_optimizer, to_their_optimizer
from hvp.common.convert.report import Account, Converted
from hvp.common.errors import UserError
from hvp.common.evaluation.backbones import WRAPPER
from hvp.common.evaluation.checkpoints import misfits
from hvp.common.training.checkpoint import FORMAT


def to_upstream(checkpoint: Mapping[str, Any], layout: Layout, source: str) -> Converted:
    """Convert one of our checkpoints to the one that the upstream's trainer would have saved.

    Args:
        checkpoint: content of our checkpoint, see `load_checkpoint()`.
        layout: layout for the checkpoint's method and configuration.
        source: name of the checkpoint in messages.

    Raises:
        UserError: the checkpoint does not fit its own configuration.
    """
    account = Account(checkpoint, source)
    content: dict[str, Any] = {}
    for part in layout.parts:
        state = _network(checkpoint, part.ours, source)
        if problem := misfits(part.module.state_dict(), state):
            raise UserError(f"{source}: {part.ours} does not fit the checkpoint's own configuration.{problem}")
        theirs = content.setdefault(part.theirs, {})
        for key, value in state.items():
            theirs[(WRAPPER if part.wrapped else "") + part.their_key(key)] = value
        account.settle("kept" if all(key in theirs for key in state) else "renamed", (part.ours,), to=part.theirs)
    if layout.optimizer is None:
        account.settle("left out", ("optimizer",), why="the upstream's trainer cannot continue with it")
    else:
        content["optimizer"] = to_their_optimizer(_optimizer(checkpoint, source), layout.optimizer, source)
        account.settle(numbering_became(layout.optimizer), ("optimizer",), to="optimizer")
    content |= layout.progress(checkpoint["epoch"], checkpoint["step"])
    content |= layout.header
    notes = list(layout.notes)
    scaler = checkpoint["precision"]["scaler"] or (_new_scaler() if layout.always_scales else {})
    if scaler and layout.scaler is None:
        notes.append("the gradient scaler's state is left out: the upstream trains in float32")
    elif scaler and layout.scaler is not None:
        content[layout.scaler] = scaler
    account.settle("left out", ("processes",), why="random state: the upstream saves none")
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
    """Convert an upstream trainer's checkpoint to the parts of ours.

    Args:
        content: content of the upstream's checkpoint.
        layout: layout for the method and configuration that the run continues with.
        source: name of the checkpoint in messages.
        fp16: whether the run continues with a gradient scaler.

    Returns:
        A conversion whose content is the state that `Run` restores, except the clock, and `epoch`, the number of
        finished epochs.

    Raises:
        UserError: the file lacks an entry, has an invalid or unknown one, or has another architecture or optimiser.
    """
    if content.get("format") == FORMAT:
        raise UserError(f"{source}: is a checkpoint of hvp already, not of an upstream trainer")
    if layout.optimizer is None:
        raise UserError(
            f"{source}: no run can continue from a checkpoint of {layout.repository}: {'; '.join(layout.notes)}.\n"
            "    To evaluate an encoder, give the file to `hvp eval` as it is."
        )
    account = Account(content, source)
    result = _our_parts(content, layout, source, account)
    result["optimizer"] = to_our_optimizer(_optimizer(content, source), layout.optimizer, source)
    account.settle(numbering_became(layout.optimizer), ("optimizer",), to="optimizer")
    notes = decay_note(content["optimizer"], layout.optimizer)
    scaler = (content.get(layout.scaler) if layout.scaler else None) or {}
    result["precision"] = {"scaler": (scaler or _new_scaler()) if fp16 else {}, "skipped_steps": 0}
    if scaler and not fp16:
        notes.append(f"{layout.scaler} is left out: train.precision is not fp16 here")
    if fp16 and not scaler:
        notes.append("the file has no gradient scaler: fp16 starts with a new one")
    used = {*(part.theirs for part in layout.parts), "optimizer", "epoch", layout.scaler, *layout.header}
    if left := [name for name in content if name not in used and name not in layout.unread]:
        notes.append(f"left out, as nothing here reads it: {', '.join(map(str, left))}")
    notes.append("the upstream saves no random state: views and other draws follow the configuration's seed")
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or epoch < 0:
        raise UserError(f"{source}: does not say how many epochs are finished: its entry `epoch` is {epoch!r}")
    result["epoch"] = epoch
    return Converted(result, account.close(), {"layout": layout.repository, "epoch": epoch}, notes)


def _our_parts(content: Mapping[str, Any], layout: Layout, source: str, account: Account) -> dict[str, Any]:
    """State dicts of the parts, by their entries in our checkpoint."""
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
            _check_shared(part, result[part.ours], source)
        account.settle("kept" if own.keys() <= raw.keys() else "renamed", (entry,), to=", ".join(p.ours for p in parts))
    if problems:
        raise UserError(
            f"{source}: is no checkpoint of {layout.repository} with this configuration.\n    "
            + "\n    ".join(problems)
            + "\n    Give the preset or the configuration that it was trained with."
        )
    return result


def _check_shared(part: Part, state: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors which are one parameter here are equal in the file, so that none is lost."""
    first: dict[int, str] = {}
    for key, parameter in part.module.state_dict(keep_vars=True).items():
        other = first.setdefault(id(parameter), key)
        if not torch.equal(state[key], state[other]):
            raise UserError(
                f"{source}: {part.theirs} has different {key} and {other}, but this configuration shares them. "
                "Give the configuration that it was trained with"
            )


def _entry(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    entry = content.get(name)
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(
            f"{source}: has no {name}; it has: {', '.join(map(str, content)) or 'nothing'}.\n"
            "    Give a training checkpoint, which holds networks and optimiser. To evaluate an encoder, give the "
            "file to `hvp eval` as it is."
        )
    return entry


def _network(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Tensor]:
    entry = _entry(content, name, source)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entry.items()):
        raise UserError(f"{source}: its entry {name} holds values other than weights")
    if twice := [key for key in entry if f"{WRAPPER}{key}" in entry]:
        raise UserError(f"{source}: its entry {name} holds {twice[0]} with and without {WRAPPER}")
    return entry


def _optimizer(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    entry = _entry(content, "optimizer", source)
    if not isinstance(entry.get("state"), Mapping) or not isinstance(entry.get("param_groups"), list):
        raise UserError(f"{source}: its entry optimizer is not an optimiser's state")
    return entry


def _new_scaler() -> dict[str, Any]:
    return torch.amp.GradScaler("cpu").state_dict()
