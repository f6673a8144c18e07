"""Runs an original trainer's script on the CPU, in one process, with stand-ins for what a small machine has not:

    python -m hvp.benchmarks.originals.on_cpu SCRIPT [ARGUMENTS]

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
from contextlib import AbstractContextManager, nullcontext
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
from torch.distributed import fsdp
from torch.optim.optimizer import register_optimizer_step_pre_hook

SUBSTITUTED = (
    "CUDA calls do nothing: .cuda(), .to('cuda'), device='cuda', set_device(), synchronize(); there is one device",
    "NCCL is Gloo, in a group of one; DistributedDataParallel, FSDP and synchronised batch norm leave the network as "
    "it is",
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

    batches: list[list[Any]]
    """What the loader gives, by epoch and step."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Functions of the original's, by `module.function`, and what is called instead, which gets the original's function
    as its first argument: for sizes that there is no flag for."""

    learner: str | None = None
    """What gets the network that learns, as `model`, by `module.function`; None: DistributedDataParallel."""

    packages: dict[str, str] = field(default_factory=dict)
    """Packages that it imports, and the module that stands in for each, whether or not it is there."""


@dataclass
class Taken:
    """What the script did."""

    losses: list[float] = field(default_factory=list)
    """Of every step."""

    lrs: list[float] = field(default_factory=list)
    """Learning rate of the first parameter group in every step, before a multiplier of its own."""

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


class Unsharded(nn.Module):
    """FullyShardedDataParallel of one process: all parameters are whole, and in their own precision."""

    sharding_strategy = fsdp.ShardingStrategy.NO_SHARD
    _streams = None  # which PyTorch 2.0 had, and DINOv2's untouched original hands from one to the other

    def __init__(self, module: nn.Module, **_: object) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_fsdp_wrapped_module"), name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._fsdp_wrapped_module(*inputs, **named)

    def state_dict(self, *inputs: Any, **named: Any) -> Any:
        return self._fsdp_wrapped_module.state_dict(*inputs, **named)

    @property
    def params(self) -> list[nn.Parameter]:
        """What a process holds."""
        return list(self.parameters())

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    @staticmethod
    def fsdp_modules(module: nn.Module) -> list["Unsharded"]:
        return [part for part in module.modules() if isinstance(part, Unsharded)]

    @staticmethod
    def state_dict_type(*_: object) -> AbstractContextManager[None]:
        return nullcontext()


class GivenLoader:
    """A DataLoader that gives the given batches, an epoch at a time."""

    batches: Iterator[list[Any]]
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
        (nn.Module, "to", staying(nn.Module.to)),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "device_count", lambda: 1),
        (torch.hub, "list", lambda *_, **__: []),
        (mp, "spawn", lambda function, args, **_: function(0, *args)),
        (nn.parallel, "DistributedDataParallel", Alone),
        (fsdp, "FullyShardedDataParallel", Unsharded),
        (nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: module),
        (torch.cuda.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu", enabled=False)),
    ]
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    group_of_one = partial(dist.init_process_group, "gloo", init_method=meeting, world_size=1, rank=0)
    stand_ins.append((dist, "init_process_group", lambda *_, **__: group_of_one()))
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)


def staying(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`nn.Module.to` for one device: what goes to CUDA stays where it is."""
    return lambda module, *where, **named: module if "cuda" in str(where[:1]) else to(module, *where, **named)


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

    def see_lr(optimizer: torch.optim.Optimizer, *_: object) -> None:
        first = optimizer.param_groups[0]
        taken.lrs.append(float(first["lr"]) / first.get("lr_multiplier", 1))

    register_optimizer_step_pre_hook(see_lr)
    for package, module in given.packages.items():
        sys.modules[package] = importlib.import_module(module)
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
    from hvp.benchmarks.originals import on_cpu  # the module that others import, and not a second one called __main__

    on_cpu.main()
