"""Runs an original trainer's script on the CPU, in one process, with stand-ins for what a small machine has not:

    python -m hvp.common.originals.on_cpu SCRIPT [ARGUMENTS]

SUBSTITUTED lists them. Where the environment variable HVP_GIVEN names a file of `Given`, the script also trains on the
weights and batches in it, and what it does goes to the file that HVP_TAKEN names. `hvp patch compare` does this.
"""

import importlib
import importlib.util
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

SUBSTITUTED = (
    "CUDA calls do nothing: .cuda(), device='cuda', set_device(), synchronize(); there is one device",
    "NCCL is Gloo, in a group of one; DistributedDataParallel and synchronised batch norm leave the network as it is",
    "mixed precision is off",
    "the first weights and all batches, normalised, are those of our trainer",
    "torch.hub.list() is empty, so that no network is asked",
)
"""What differs from a run of the script on a GPU."""

PACKAGES = ("tensorboardX", "sklearn", "munkres", "omegaconf", "fvcore", "xformers", "timm.models.layers.helpers")
"""Stood in for where they are missing; none of them takes part in a training step but DINOv2's."""


@dataclass
class Given:
    """What the script is to train on."""

    weights: dict[str, Tensor]
    """State dict of the network that learns, under the original's names."""

    batches: list[list[list[Any]]]
    """What the loader gives, by epoch and step."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Functions of the original's, by `module.function`, and what is called instead, which gets the original's function
    as its first argument: for sizes that there is no flag for."""

    learner: str | None = None
    """What gets the network that learns, as `model`, by `module.function`; None: DistributedDataParallel."""


@dataclass
class Taken:
    """What the script did."""

    losses: list[float] = field(default_factory=list)
    """Of every step."""

    lrs: list[float] = field(default_factory=list)
    """Learning rate of the first parameter group in every step."""

    checkpoint: dict[str, Any] = field(default_factory=dict)
    """The last that it saved."""


class StandIns:
    """Finds the packages that nobody before it has found."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if any(name == package or name.startswith(package + ".") for package in PACKAGES):
            return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None: ...


class Alone(nn.Module):
    """DistributedDataParallel of one process."""

    weights: dict[str, Tensor] | None = None

    def __init__(self, module: nn.Module, **_: object) -> None:
        super().__init__()
        self.module = module
        if self.weights is not None:
            module.load_state_dict(self.weights)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


class GivenLoader:
    """A DataLoader that gives the given batches, an epoch at a time."""

    batches: Iterator[list[list[Any]]]
    num_steps = 0

    def __init__(self, dataset: Any, *, sampler: Any = None, **_: object) -> None:
        self.dataset, self.sampler = dataset, sampler

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(next(self.batches))


def substitute() -> None:
    """Puts the stand-ins for CUDA, NCCL and missing packages in place."""
    sys.meta_path.append(StandIns())
    tensor = torch.tensor
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch, "tensor", lambda content, device=None, **named: tensor(content, **named)),
        (nn.Module, "cuda", lambda module, *_, **__: module),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "device_count", lambda: 1),
        (torch.hub, "list", lambda *_, **__: []),
        (mp, "spawn", lambda function, args, **_: function(0, *args)),
        (nn.parallel, "DistributedDataParallel", Alone),
        (nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: module),
        (torch.cuda.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu", enabled=False)),
    ]
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    group_of_one = partial(dist.init_process_group, "gloo", init_method=meeting, world_size=1, rank=0)
    stand_ins.append((dist, "init_process_group", lambda *_, **__: group_of_one()))
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)


def train_on(given: Given) -> Taken:
    """Lets the script train on what is given; what it does is written down in the result."""
    taken = Taken()
    backward = torch.Tensor.backward

    def see_loss(loss: Tensor, *inputs: Any, **named: Any) -> None:
        taken.losses.append(loss.item())
        backward(loss, *inputs, **named)

    Alone.weights = given.weights
    GivenLoader.batches, GivenLoader.num_steps = iter(given.batches), len(given.batches[0])
    torch.utils.data.DataLoader = GivenLoader  # type: ignore[assignment,misc]
    torch.Tensor.backward = see_loss  # type: ignore[assignment]
    torch.save = lambda content, *_, **__: vars(taken).update(checkpoint=content)
    register_optimizer_step_pre_hook(lambda optimizer, *_: taken.lrs.append(float(optimizer.param_groups[0]["lr"])))
    for name, stand_in in given.replaced.items():
        home, ours = stand_in.rsplit(".", 1)
        _replace(name, getattr(importlib.import_module(home), ours))
    if given.learner is not None:
        _replace(given.learner, partial(_with_weights, given.weights))
    return taken


def _replace(name: str, function: Callable[..., Any]) -> None:
    """Puts a function in the place of the original's `module.function`, which it gets as its first argument."""
    owner, attribute = name.rsplit(".", 1)
    module = importlib.import_module(owner)
    setattr(module, attribute, partial(function, getattr(module, attribute, None)))


def _with_weights(weights: dict[str, Tensor], learner: Callable[..., Any], *, model: nn.Module, **named: Any) -> Any:
    model.load_state_dict(weights)
    return learner(model=model, **named)


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)
    save = torch.save
    substitute()
    if "HVP_GIVEN" not in os.environ:
        runpy.run_path(str(script), run_name="__main__")
        return
    taken = train_on(Given(**torch.load(os.environ["HVP_GIVEN"])))
    runpy.run_path(str(script), run_name="__main__")
    states = {name: state for name, state in taken.checkpoint.items() if _is_state(state)}
    save({**vars(taken), "checkpoint": states}, os.environ["HVP_TAKEN"])


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())


if __name__ == "__main__":
    main()
