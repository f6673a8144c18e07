"""`hvp pretrain --engine upstream`: our configuration as a command of the patched original, and its start."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvp.common.config.resolving import Resolved, leaf_keys
from hvp.common.errors import UserError
from hvp.common.training.distributed import World, share_of_batch
from hvp.common.training.launching import launch
from hvp.patches.original import Original, value_of
from hvp.patches.patching import Patch, apply_patch, check_packages, is_patched_copy, patch_clone

PATCHED = "upstream"
"""The patched copy's name in a run's folder."""

TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's environment variable for those who trust the files that they load."""


@dataclass(frozen=True)
class Unsaid:
    """A value of ours that the original cannot be told."""

    key: str
    value: Any
    source: str
    """Where it came from, as in `Resolved`."""

    there: Any | None
    """What the original does; None where nothing there answers to it."""

    @property
    def differs(self) -> bool:
        return self.there is not None and self.there != self.value

    def __str__(self) -> str:
        shown = f"{self.key} = {_shown(self.value)}"
        if self.there is None:
            return shown
        return f"{shown}; the original: {_shown(self.there) if self.differs else 'the same'}"


@dataclass(frozen=True)
class Job:
    """A command of the patched original, checked and not started."""

    original: Original
    patch: Patch
    upstream: Path
    """The clone."""

    out: Path
    """The run's folder: where the original works, and leaves its checkpoints."""

    flags: list[str]
    processes: int
    unsaid: list[Unsaid]
    remarks: list[str]
    """On the clone, for the user."""

    @property
    def copy(self) -> Path:
        """The patched copy."""
        return self.out / PATCHED

    @property
    def environment(self) -> dict[str, str]:
        """What its processes are told."""
        if self.original.spawns:
            return {"CUDA_VISIBLE_DEVICES": _gpus(self.processes, os.environ)}
        if "/" not in self.patch.trainer:
            return {}
        others = os.environ.get("PYTHONPATH")  # a trainer within a package does not find it by itself
        return {"PYTHONPATH": f"{self.copy}{os.pathsep}{others}" if others else str(self.copy)}

    @property
    def shell(self) -> str:
        """The command, for a shell."""
        trainer = [str(self.copy / self.patch.trainer), *self.flags]
        elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        words = [sys.executable, *([] if self.original.spawns else elastic), *trainer]
        changed = [word for name in self.original.misleading if name in os.environ for word in ("-u", name)]
        changed += [f"{name}={value}" for name, value in self.environment.items()]
        if changed:
            words = ["env", *changed, *words]
        return f"cd {shlex.quote(str(self.out))} && {shlex.join(words)}"

    def write_copy(self) -> None:
        """Writes the patched copy, if it is not there.

        Raises:
            UserError: it cannot be written, there are too few GPUs, or packages, to go on, or an earlier run is there,
                which the original would start over or cannot load.
        """
        earlier = sorted(path.name for path in self.out.iterdir() if path != self.copy) if self.copy.exists() else []
        if self.original.starts_over and earlier:
            raise UserError(
                f"{self.out} holds an earlier run ({', '.join(earlier[:3])}{', ...' if len(earlier) > 3 else ''}), and "
                f"{self.patch.repository} would start over in its place. {self.original.starts_over}; or give another "
                "--out"
            )
        if self.original.saves_objects and any(self.out.glob("*.pth")) and os.environ.get(TRUST) != "1":
            raise UserError(
                f"{self.out} holds an earlier run. Its checkpoints hold Python objects, which PyTorch does not load "
                f"unasked. If they are your own, go on with {TRUST}=1 in the environment; or give another --out"
            )
        check_packages(self.patch.repository, self.patch.needs)
        gpus = torch.cuda.device_count()
        if gpus < self.processes:  # without any, those that start their own processes would end at once, with code 0
            raise UserError(f"{self.patch.repository} wants a GPU for each of {self.processes} processes; here: {gpus}")
        if not self.copy.exists():
            apply_patch(self.patch, self.upstream, self.copy)

    def run(self) -> int:
        """Trains. An original that starts its own processes takes this one's place, and does not return.

        Returns:
            The exit code of the original.

        Raises:
            UserError: one of its processes was killed.
        """
        os.chdir(self.out)
        trainer = [str(self.copy / self.patch.trainer), *self.flags]
        if self.original.spawns:
            os.execve(sys.executable, [sys.executable, *trainer], {**os.environ, **self.environment})
        for name in self.original.misleading:
            os.environ.pop(name, None)
        os.environ.update(self.environment)
        return launch(self.processes, trainer)


def plan(original: Original, patch: Patch, resolved: Resolved, upstream: Path, out: Path, processes: int) -> Job:
    """What is to be run, with everything that can be wrong found. Writes nothing.

    Args:
        original: how it is told.
        patch: of the original.
        resolved: our configuration. Without `data.path` the word DATA stands for it.
        upstream: the clone.
        out: the run's folder: empty, or holding the patched copy of this clone.
        processes: one a GPU, on this machine.

    Raises:
        UserError: the original cannot be told what the user asked for, the clone is not the pinned one, or `out` holds
            something else.
    """
    config = resolved.config
    for key, brought, asked in (
        ("selection.hard_views", "HVP", config.selection.hard_views == "hvp"),
        ("rescue.enabled", "Rescue", config.rescue.enabled),
    ):
        if asked and brought not in patch.brings:
            raise UserError(
                f"{key} is on, but the patched {patch.repository} brings {' and '.join(patch.brings)} alone. Switch it "
                f"off: {'--hard-views none' if brought == 'HVP' else '--no-rescue'}"
            )
    for key, values in original.only_ours.items():
        if value_of(config, key) in values:
            raise UserError(f"{key} = {value_of(config, key)} is ours; {patch.repository} does not have it")
    unsaid = _unsaid(original, resolved)
    for value in unsaid:
        if value.source.startswith("--") and value.there != value.value:
            raise UserError(f"{value.source}: {patch.repository} has no flag for it ({value}). Leave it out")
    share_of_batch(config.train.batch_size, 1, World(size=processes))
    _, remarks = patch_clone(patch, upstream)
    out = out.absolute()
    copy = out / PATCHED
    if copy.exists():
        if not is_patched_copy(patch, upstream, copy):
            raise UserError(f"{copy} is not {upstream} with our patch. Delete it, or give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else than a run of {patch.repository}. Give another --out")
    data = "DATA" if config.data.path is None else _image_folder(config.data.path, original, patch)
    if original.check_data and config.data.path is not None:
        original.check_data(Path(data), upstream)
    flags = original.flags(config, data, processes)
    return Job(
        original=original,
        patch=patch,
        upstream=upstream,
        out=out,
        flags=flags,
        processes=processes,
        unsaid=unsaid,
        remarks=remarks,
    )


def _unsaid(original: Original, resolved: Resolved) -> list[Unsaid]:
    """What no flag says, without the details of what is off."""
    config = resolved.config
    skipped = ["data.shapes."]  # never read: the original takes folders
    skipped += [] if config.rescue.enabled else ["rescue."]
    skipped += [] if config.selection.hard_views == "hvp" else ["selection."]
    said = {*original.carried, "selection.hard_views", "rescue.enabled"}
    fixed = original.fixed(config)
    return [
        Unsaid(key, value_of(config, key), resolved.sources.get(key, "default"), fixed.get(key))
        for key in leaf_keys(type(config))
        if key not in said and not key.startswith(tuple(skipped))
    ]


def _image_folder(path: str, original: Original, patch: Patch) -> str:
    read = " or ".join(original.folders.values())
    if path == "shapes":
        raise UserError(f"--data shapes: {patch.repository} reads a folder of images. Give one that has {read}")
    if not any((Path(path) / folder).is_dir() for folder in original.folders):
        raise UserError(f"{path}: {patch.repository} reads {read} in it, and there is no such folder")
    return str(Path(path).absolute())


def _gpus(count: int, environment: Mapping[str, str]) -> str:
    """The first GPUs of those that may be used, as CUDA_VISIBLE_DEVICES says it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return ",".join(visible.split(",")[:count] if visible else map(str, range(count)))


def _shown(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
