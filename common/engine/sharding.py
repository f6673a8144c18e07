"""Networks and optimisers of which every process holds a share (FSDP2), for those too large for one device.

    shard(student.shards(), world, device)            # before the optimiser is made of its parameters
    parts = {"student": Whole(student), "optimizer": Whole(optimizer)}

The step stays the data-parallel one: forward passes gather a unit's parameters when they need them, the backward pass
averages gradients over the processes and leaves each its share. Numbers stay float32, and autocast does what it does
without sharding. What a checkpoint holds is whole, so a run goes on with another number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from hvp.common.engine.distributed import World

Unit = tuple[nn.Module, Sequence[str]]
"""A module, and its methods besides `forward` that read its parameters."""


def shard(units: Iterable[Unit], world: World, device: torch.device) -> None:
    """Gives every process its share of each unit's parameters, in place. Processes must hold equal weights.

    Args:
        units: inner ones first. A unit is gathered as a whole; parameters of inner units are theirs.
        world: the processes.
        device: where the parameters are.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    for module, methods in units:
        fully_shard(module, mesh=mesh)
        for method in methods:
            register_fsdp_forward_method(module, method)


def release(network: nn.Module) -> None:
    """Frees what forward passes have gathered and no backward pass will free: a teacher's, before it is averaged."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This process's shares of parameters, which change with them; what is not sharded, as it is."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


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
