"""Networks and optimisers of which every process holds a share (FSDP2), for those too large for one device.

    shard(student.shards(), world, device, dtype)     # before the optimiser is made of its parameters
    parts = {"student": Whole(student), "optimizer": Whole(optimizer)}
    ...                                               # the step's forward and backward passes
    release(student)                                  # before its parameters or gradients are read

The step stays the data-parallel one. The first forward pass gathers a unit's parameters, in the number format of
autocast, and they stay until `release()`, however many forward and backward passes the step has. The backward pass
averages gradients over the processes, in float32, and leaves each its share. Shares, optimiser and checkpoints are
float32; a checkpoint is whole, so a run goes on with another number of processes, sharded or not.

Source: the sharding of facebookresearch/dinov2 (SHARD_GRAD_OP, half-precision parameters), by FSDP2.
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
"""A module, and its methods besides `forward` that read its parameters."""


def shard(units: Iterable[Unit], world: World, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Gives every process its share of each unit's parameters, in place. Processes must hold equal weights.

    Args:
        units: inner ones first. A unit is gathered as a whole; parameters of inner units are theirs.
        world: the processes.
        device: where the parameters are.
        dtype: number format of gathered parameters, that of autocast; None for float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    # Inputs are left to autocast, which keeps the sum of the residual branches in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for module, methods in units:
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        # A unit has several backward passes in a step: of global and local views, and of strong ones.
        sharded.set_reshard_after_backward(False, recurse=False)
        for method in methods:
            register_fsdp_forward_method(module, method)


def release(network: nn.Module) -> None:
    """Frees gathered parameters, so that the network has its shares again: before gradients are clipped, the optimiser
    steps, or the network is averaged."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This process's shares of parameters, which change with them; what is not sharded, as it is."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def is_sharded(part: object) -> bool:
    """Return whether a module's or an optimiser's parameters are sharded."""
    if isinstance(part, nn.Module):
        return any(isinstance(p, DTensor) for p in part.parameters())
    return isinstance(part, Optimizer) and any(isinstance(p, DTensor) for g in part.param_groups for p in g["params"])


class Whole:
    """A sharded module or optimiser, for checkpoints: its state is gathered, in all processes together, and is the same
    as if it were not sharded. Only the leader keeps it.

    Args:
        part: the module, or the optimiser.
        world: the processes.
    """

    def __init__(self, part: Any, world: World) -> None:
        self.part, self.world = part, world

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the CPU; elsewhere than in the leader only its form."""

        def gather(share: DTensor) -> Tensor | None:
            whole = share.full_tensor()
            return whole.cpu() if self.world.leader else None

        state: dict[str, Any] = tree_map_only(DTensor, gather, dict(self.part.state_dict()))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes this process's share of a whole state.

        Raises:
            KeyError, ValueError: it is of another module.
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
    """A whole tensor, distributed as `like` is; anything else, such as an optimiser's count of steps, as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # every process has read the whole tensor, so each takes its part of its own copy
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
