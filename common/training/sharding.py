"""Networks and optimisers sharded over the processes (FSDP2), for those too large for one device.

    shard(student.shards(), world, device, dtype)     # before building the optimiser from its parameters
    parts = {"student": Whole(student), "optimizer": Whole(optimizer)}
    ...                                               # the step's forward and backward passes
    release(student)                                  # before reading its parameters or gradients

The step is the same as in data-parallel training. The first forward pass gathers a unit's parameters, in autocast's
dtype, and they stay gathered until `release()`, through all forward and backward passes of the step. The backward pass
averages gradients over the processes, in float32, and keeps each process's shard. Shards, optimiser and checkpoints are
float32. A checkpoint holds whole tensors, so a run can resume with another number of processes, sharded or not.

Source: the sharding of facebookresearch/dinov2 (SHARD_GRAD_OP, half-precision parameters), with FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from hvp.common.training.distributed import World

Unit = tuple[nn.Module, Sequence[str]]
"""A module, and its methods besides `forward` that use its parameters."""


def shard(units: Iterable[Unit], world: World, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard each unit's parameters over the processes, in place. All processes must hold equal weights.

    Args:
        units: modules that are gathered as a whole, inner ones first; a parameter belongs to its innermost unit.
        world: the processes.
        device: device of the parameters.
        dtype: autocast's dtype, which gathered parameters take; None for float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    # Autocast casts the inputs: it keeps the sum of the residual branches in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for module, methods in units:
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        # A unit has several backward passes in a step: for global, local and strong views.
        sharded.set_reshard_after_backward(False, recurse=False)
        for method in methods:
            register_fsdp_forward_method(module, method)


def release(network: nn.Module) -> None:
    """Free the gathered parameters, leaving the shards.

    To be called before gradients are clipped, the optimiser steps, or the EMA reads the network.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's shards of parameters, as views of them; unsharded tensors are returned unchanged."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def is_sharded(part: object) -> bool:
    """Return whether a module's or an optimiser's parameters are sharded."""
    if isinstance(part, nn.Module):
        return any(isinstance(p, DTensor) for p in part.parameters())
    return isinstance(part, Optimizer) and any(isinstance(p, DTensor) for g in part.param_groups for p in g["params"])


class Whole:
    """Adapter that saves and loads a sharded module or optimiser as if it were not sharded.

    All processes must call each method together.

    Args:
        part: the module or optimiser.
        world: the processes.
    """

    def __init__(self, part: Any, world: World) -> None:
        self.part, self.world = part, world

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state on the CPU in the leader, and its structure without tensors elsewhere."""

        def gather(share: DTensor) -> Tensor | None:
            whole = share.full_tensor()
            return whole.cpu() if self.world.leader else None

        state: dict[str, Any] = tree_map_only(DTensor, gather, dict(self.part.state_dict()))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's shard of a whole state.

        Raises:
            KeyError, ValueError: the state belongs to another module.
        """
        if isinstance(self.part, nn.Module):
            own = self.part.state_dict()
            self.part.load_state_dict({name: _share(value, own.get(name)) for name, value in state.items()})
            return
        parameters = [p for group in self.part.param_groups for p in group["params"]]
        moments = {
            number: {name: _share(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        self.part.load_state_dict({**state, "state": moments})


def _share(value: Any, like: Tensor | None) -> Any:
    """Shard a whole tensor like `like`; return anything else, such as an optimiser's step count, unchanged."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the whole tensor, so each takes its shard from its own copy.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
