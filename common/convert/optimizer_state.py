"""Optimiser state between our parameter groups and an upstream's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hvp.common.convert.layouts import Optimizer
from hvp.common.convert.report import Became
from hvp.common.errors import UserError
from hvp.common.training.optimizers import build_optimizer

SCHEDULED = ("lr", "initial_lr", "weight_decay")
"""Hyperparameters that a trainer sets from its configuration, whatever a checkpoint holds."""

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Hyperparameters that choose an optimiser's implementation, not its result."""


def to_their_optimizer(state: Mapping[str, Any], optimizer: Optimizer, source: str) -> dict[str, Any]:
    """Convert our optimiser's state dict to the upstream's.

    Raises:
        UserError: its groups are not those of the layout.
    """
    ours, theirs = _numbers(optimizer.ours), _numbers(optimizer.theirs)
    _check_groups(state, optimizer.ours, source)
    number_of = {number: theirs[parameter] for parameter, number in ours.items()}
    group_of = {
        id(p): g for g, group in zip(state["param_groups"], optimizer.ours, strict=True) for p in group["params"]
    }
    groups = []
    for group in optimizer.theirs:
        # lr and weight decay come from our group that holds the first trained parameter
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


def to_our_optimizer(state: Mapping[str, Any], optimizer: Optimizer, source: str) -> dict[str, Any]:
    """Convert an upstream optimiser's state dict to ours.

    Raises:
        UserError: its groups, hyperparameters, trained parameters or shapes are not those of the layout.
    """
    ours, theirs = _numbers(optimizer.ours), _numbers(optimizer.theirs)
    _check_groups(state, optimizer.theirs, source)
    expected = _hyperparameters(optimizer)
    for group in state["param_groups"]:
        for key, value in expected.items():
            if key not in (*SCHEDULED, *IMPLEMENTATION) and key in group and plain(group[key]) != plain(value):
                raise UserError(
                    f"{source}: its optimiser has {key} = {group[key]}, but {optimizer.name} has {value} here. The run "
                    "cannot continue unchanged"
                )
    number_of = {number: ours[parameter] for parameter, number in theirs.items() if parameter in ours}
    if untrained := [number for number in state["state"] if number not in number_of]:
        raise UserError(
            f"{source}: its optimiser has trained {len(untrained)} parameters that are fixed in this configuration. "
            "Give the configuration that it was trained with"
        )
    shapes = {ours[id(p)]: p.shape for group in optimizer.ours for p in group["params"]}
    moments = {number_of[number]: moments for number, moments in sorted(state["state"].items())}
    for number, values in moments.items():
        wrong = [n for n, t in values.items() if isinstance(t, Tensor) and t.ndim and t.shape != shapes[number]]
        if wrong:
            raise UserError(f"{source}: its optimiser's {wrong[0]} of parameter {number} has another shape")
    return {"state": dict(sorted(moments.items())), "param_groups": _our_groups(optimizer)}


def numbering_became(optimizer: Optimizer) -> Became:
    """Outcome for the optimiser's moments, whose names are the numbers of the parameters."""
    theirs = _numbers(optimizer.theirs)
    return "kept" if all(theirs[key] == number for key, number in _numbers(optimizer.ours).items()) else "renamed"


def decay_note(state: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    """Note that a constant weight decay differs, if it does."""
    found, here = (groups[0].get("weight_decay") for groups in (state["param_groups"], optimizer.ours))
    if here is None or found is None or math.isclose(found, here):
        return []
    return [f"the upstream trained with weight decay {found:g}, the run continues with {here:g}"]


def plain(value: Any) -> Any:
    """Convert a hyperparameter for comparison: numpy numbers to Python's, lists to tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value.item() if hasattr(value, "item") else value


def _numbers(groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Number of every parameter, by its identity."""
    parameters = [p for group in groups for p in group["params"]]
    return {id(p): number for number, p in enumerate(parameters)}


def _check_groups(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], source: str) -> None:
    found = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(group["params"]) for group in groups]
    if found != expected:
        raise UserError(
            f"{source}: its optimiser has groups of {found} parameters, but with this configuration they are "
            f"{expected}. Give the configuration that it was trained with"
        )


def _hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """Initial hyperparameters of a group of the upstream's optimiser."""
    if optimizer.name == "lars":
        return dict(optimizer.lars)
    stand_in = [nn.Parameter(torch.empty(0))]
    made = AdamW(stand_in) if optimizer.name == "adamw" else SGD(stand_in, lr=0.0, momentum=0.9)
    return {key: value for key, value in made.state_dict()["param_groups"][0].items() if key != "params"}


def _our_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups as a new optimiser of ours saves them, made from empty parameters."""
    stand_ins = [
        {**group, "params": [nn.Parameter(torch.empty((0,) * p.ndim)) for p in group["params"]]}
        for group in optimizer.ours
    ]
    groups: list[dict[str, Any]] = build_optimizer(optimizer.name, stand_ins).state_dict()["param_groups"]
    return groups
