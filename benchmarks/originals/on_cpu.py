"""Run an original trainer's script on the CPU, in one process, with stand-ins for what a small machine lacks:

    python -m hvp.benchmarks.originals.on_cpu SCRIPT [ARGUMENTS]

SUBSTITUTED lists the stand-ins. If the environment variable HVP_GIVEN names a file that holds a `Given`, the script
trains on its weights and batches, and the file that HVP_TAKEN names receives the result, a `Taken`. comparison.py uses
both.
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
    "NCCL is Gloo, in a group of one; DistributedDataParallel, FSDP and synchronised batch norm change nothing",
    "mixed precision is off",
    "the initial weights and all batches, normalised, are those of our trainer",
    "torch.hub.list() is empty, so nothing is downloaded",
)
"""Differences from a run of the script on a GPU."""

PACKAGES = ("tensorboardX", "sklearn", "munkres", "omegaconf", "fvcore", "xformers", "timm.models.layers.helpers")
"""Packages that get a stand-in where they are missing. Only DINOv2's take part in a training step."""


@dataclass(frozen=True)
class Substitutes:
    """Parts of an original to replace, by dotted import path. Ours are named by theirs, as `module.function`."""

    functions: dict[str, str] = field(default_factory=dict)
    """Replacements of the original's functions and classes, for example for sizes that have no flag. A replacement
    receives the original's function as its first argument."""

    packages: dict[str, str] = field(default_factory=dict)
    """Replacements of packages that the original imports, whether or not they are installed."""

    learner: str | None = None
    """Function that receives the network to train as `model`; None: DistributedDataParallel."""


@dataclass
class Given:
    """Weights and batches for the script to train on."""

    weights: dict[str, Tensor]
    """State dict of the network to train, under the original's names."""

    batches: list[list[Any]]
    """Batches of the loader, by epoch and step."""

    substitutes: Substitutes = Substitutes()


@dataclass
class Taken:
    """Record of the script's training."""

    losses: list[float] = field(default_factory=list)
    """Loss of every step."""

    lrs: list[float] = field(default_factory=list)
    """Learning rate of the first parameter group in every step, before a multiplier of its own."""

    checkpoint: dict[str, Any] = field(default_factory=dict)
    """The last checkpoint that the script saved."""


class StandIns:
    """Import finder of last resort: makes a stand-in for each of PACKAGES that is missing."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if any(name == package or name.startswith(package + ".") for package in PACKAGES):
            return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None: ...


class Alone(nn.Module):
    """Stand-in for DistributedDataParallel in one process."""

    weights: dict[str, Tensor] | None = None

    def __init__(self, module: nn.Module, **_: object) -> None:
        super().__init__()
        self.module = module
        if self.weights is not None:
            module.load_state_dict(self.weights)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


class Unsharded(nn.Module):
    """Stand-in for FullyShardedDataParallel in one process: all parameters stay whole, in their own precision."""

    sharding_strategy = fsdp.ShardingStrategy.NO_SHARD
    _streams = None  # an attribute of PyTorch 2.0 that DINOv2's untouched original copies between networks

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
        """Parameters that this process holds: all of them."""
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
    """Stand-in for a DataLoader, which yields the given batches, epoch by epoch."""

    batches: Iterator[list[Any]]
    num_steps = 0

    def __init__(self, dataset: Any, *, sampler: Any = None, **_: object) -> None:
        self.dataset, self.sampler = dataset, sampler

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(next(self.batches))


def substitute() -> None:
    """Install the stand-ins for CUDA, NCCL and missing packages."""
    sys.meta_path.append(StandIns())
    tensor = torch.tensor
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch, "tensor", lambda content, device=None, **named: tensor(content, **named)),
        (nn.Module, "cuda", lambda module, *_, **__: module),
        (nn.Module, "to", keep_on_cpu(nn.Module.to)),
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


def keep_on_cpu(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap `nn.Module.to` so that a move to CUDA does nothing."""
    return lambda module, *where, **named: module if "cuda" in str(where[:1]) else to(module, *where, **named)


def train_on(given: Given) -> Taken:
    """Make the script train on the given weights and batches. The result fills while it runs."""
    taken = Taken()
    backward = torch.Tensor.backward

    def record_loss(loss: Tensor, *inputs: Any, **named: Any) -> None:
        taken.losses.append(loss.item())
        backward(loss, *inputs, **named)

    Alone.weights = given.weights
    GivenLoader.batches, GivenLoader.num_steps = iter(given.batches), len(given.batches[0])
    torch.utils.data.DataLoader = GivenLoader  # type: ignore[assignment,misc]
    torch.Tensor.backward = record_loss  # type: ignore[assignment]
    torch.save = lambda content, *_, **__: vars(taken).update(checkpoint=content)

    def record_lr(optimizer: torch.optim.Optimizer, *_: object) -> None:
        first = optimizer.param_groups[0]
        taken.lrs.append(float(first["lr"]) / first.get("lr_multiplier", 1))

    register_optimizer_step_pre_hook(record_lr)
    for package, module in given.substitutes.packages.items():
        sys.modules[package] = importlib.import_module(module)
    for name, stand_in in given.substitutes.functions.items():
        home, ours = stand_in.rsplit(".", 1)
        _replace(name, getattr(importlib.import_module(home), ours))
    if given.substitutes.learner is not None:
        _replace(given.substitutes.learner, partial(_with_weights, given.weights))
    return taken


def _replace(name: str, function: Callable[..., Any]) -> None:
    """Replace the original's `module.function`, which the replacement receives as its first argument."""
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
    given = torch.load(os.environ["HVP_GIVEN"])
    taken = train_on(Given(**{**given, "substitutes": Substitutes(**given["substitutes"])}))
    runpy.run_path(str(script), run_name="__main__")
    states = {name: state for name, state in taken.checkpoint.items() if _is_state_dict(state)}
    save({**vars(taken), "checkpoint": states}, os.environ["HVP_TAKEN"])


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())


if __name__ == "__main__":
    from hvp.benchmarks.originals import on_cpu  # the module that others import, not a second copy called __main__

    on_cpu.main()
