"""Run a patched original on our configuration: `hvp pretrain --engine upstream`."""

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
from hvp.patches.adapter import Adapter, value_of
from hvp.patches.patching import Patch, apply_patch, check_packages, is_patched_copy, patch_clone

PATCHED = "upstream"
"""Name of the patched copy in a run's folder."""

TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's environment variable for users who trust the files that they load."""


@dataclass(frozen=True)
class ValueWithoutFlag:
    """A value of our configuration for which the original has no flag."""

    key: str
    value: Any
    source: str
    """Origin of the value, as in `Resolved`."""

    upstream: Any | None
    """The original's value; None where nothing in the original corresponds to the key."""

    @property
    def differs(self) -> bool:
        return self.upstream is not None and self.upstream != self.value

    def __str__(self) -> str:
        shown = f"{self.key} = {_shown(self.value)}"
        if self.upstream is None:
            return shown
        return f"{shown}; the original: {_shown(self.upstream) if self.differs else 'the same'}"


@dataclass(frozen=True)
class Job:
    """A checked command of the patched original, not yet started."""

    adapter: Adapter
    patch: Patch
    upstream: Path
    """The clone."""

    out: Path
    """The run's folder: the original's working folder, where it leaves its checkpoints."""

    flags: list[str]
    processes: int
    without_flag: list[ValueWithoutFlag]
    notes: list[str]
    """Notes for the user, on the clone and on the original's differences from our trainer."""

    @property
    def copy(self) -> Path:
        """The patched copy."""
        return self.out / PATCHED

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables to set for the original's processes."""
        if self.adapter.launch.spawns:
            return {"CUDA_VISIBLE_DEVICES": _first_gpus(self.processes, os.environ)}
        if "/" not in self.patch.trainer:
            return {}
        others = os.environ.get("PYTHONPATH")  # a trainer inside a package does not find the package by itself
        return {"PYTHONPATH": f"{self.copy}{os.pathsep}{others}" if others else str(self.copy)}

    @property
    def shell(self) -> str:
        """The command, quoted for a shell."""
        trainer = [str(self.copy / self.patch.trainer), *self.flags]
        elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        words = [sys.executable, *([] if self.adapter.launch.spawns else elastic), *trainer]
        changed = [word for name in self.adapter.launch.hidden if name in os.environ for word in ("-u", name)]
        changed += [f"{name}={value}" for name, value in self.environment.items()]
        if changed:
            words = ["env", *changed, *words]
        return f"cd {shlex.quote(str(self.out))} && {shlex.join(words)}"

    def write_copy(self) -> None:
        """Write the patched copy, unless it is there.

        Raises:
            UserError: the copy cannot be written, GPUs or packages are missing, or the folder holds an earlier run that
                the original would start over or cannot load.
        """
        self._check_earlier_run()
        check_packages(self.patch.repository, self.patch.needs)
        gpus = torch.cuda.device_count()
        if gpus < self.processes:  # without any GPU, an original that spawns processes would exit at once, with code 0
            raise UserError(
                f"{self.patch.repository} needs a GPU for each of {self.processes} processes; this machine has {gpus}"
            )
        if not self.copy.exists():
            apply_patch(self.patch, self.upstream, self.copy)

    def _check_earlier_run(self) -> None:
        """Raise UserError if the folder holds an earlier run that the original would start over or cannot load."""
        start = self.adapter.launch
        earlier = sorted(path.name for path in self.out.iterdir() if path != self.copy) if self.copy.exists() else []
        if start.starts_over and earlier:
            raise UserError(
                f"{self.out} holds an earlier run ({', '.join(earlier[:3])}{', ...' if len(earlier) > 3 else ''}), and "
                f"{self.patch.repository} would start over in its place. {start.starts_over}; or give another --out"
            )
        if start.saves_objects and any(self.out.glob("*.pth")) and os.environ.get(TRUST) != "1":
            raise UserError(
                f"{self.out} holds an earlier run, whose checkpoints hold Python objects. PyTorch loads those only on "
                f"request: if the files are your own, set {TRUST}=1 in the environment to resume; or give another --out"
            )

    def run(self) -> int:
        """Train. An original that starts its own processes replaces this process, so the call does not return.

        Returns:
            The exit code of the original.

        Raises:
            UserError: one of its processes was killed.
        """
        os.chdir(self.out)
        trainer = [str(self.copy / self.patch.trainer), *self.flags]
        if self.adapter.launch.spawns:
            os.execve(sys.executable, [sys.executable, *trainer], {**os.environ, **self.environment})
        for name in self.adapter.launch.hidden:
            os.environ.pop(name, None)
        os.environ.update(self.environment)
        return launch(self.processes, trainer)


def plan(adapter: Adapter, patch: Patch, resolved: Resolved, upstream: Path, out: Path, processes: int) -> Job:
    """Check a run of a patched original, and return its command. Writes nothing.

    Args:
        adapter: the original's adapter.
        patch: our patch of the original.
        resolved: our configuration. Without `data.path` the command has the word DATA in its place.
        upstream: the clone.
        out: the run's folder: empty, or holding the patched copy of this clone.
        processes: number of processes on this machine, one per GPU.

    Raises:
        UserError: the original cannot do what the user asked for, the clone is not the pinned one, or `out` holds
            something else.
    """
    without_flag = _values_without_flag(adapter, resolved)
    _check_values(adapter, patch, resolved.config, without_flag)
    share_of_batch(resolved.config.train.batch_size, 1, World(size=processes))
    _, remarks = patch_clone(patch, upstream)
    out = out.absolute()
    copy = out / PATCHED
    if copy.exists():
        if not is_patched_copy(patch, upstream, copy):
            raise UserError(f"{copy} is not {upstream} with our patch. Delete it, or give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something other than a run of {patch.repository}. Give another --out")
    path = resolved.config.data.path
    data = "DATA" if path is None else _image_folder(path, adapter, patch)
    if adapter.images.check and path is not None:
        adapter.images.check(Path(data), upstream)
    return Job(
        adapter=adapter,
        patch=patch,
        upstream=upstream,
        out=out,
        flags=adapter.flags(resolved.config, data, processes),
        processes=processes,
        without_flag=without_flag,
        notes=[*adapter.differences, *remarks],
    )


def _check_values(adapter: Adapter, patch: Patch, config: Any, without_flag: list[ValueWithoutFlag]) -> None:
    """Raise UserError for a value that the user asked for and the original cannot take."""
    for key, name, wanted, option in (
        ("selection.hard_views", "HVP", config.selection.hard_views == "hvp", "--hard-views none"),
        ("rescue.enabled", "Rescue", config.rescue.enabled, "--no-rescue"),
    ):
        if wanted and name not in patch.brings:
            brings = " and ".join(patch.brings)
            raise UserError(
                f"{key} is on, but the patched {patch.repository} has only {brings}. Switch it off: {option}"
            )
    for key, values in adapter.keys.only_ours.items():
        if value_of(config, key) in values:
            raise UserError(f"{key} = {value_of(config, key)} is ours; {patch.repository} does not have it")
    for value in without_flag:
        if value.source.startswith("--") and value.upstream != value.value:
            raise UserError(f"{value.source}: {patch.repository} has no flag for it ({value}). Leave it out")


def _values_without_flag(adapter: Adapter, resolved: Resolved) -> list[ValueWithoutFlag]:
    """Return the values for which the original has no flag, except for the details of features that are off."""
    config = resolved.config
    skipped = ["data.shapes."]  # never read: the original takes folders
    skipped += [] if config.rescue.enabled else ["rescue."]
    skipped += [] if config.selection.hard_views == "hvp" else ["selection."]
    carried = {*adapter.keys.carried, "selection.hard_views", "rescue.enabled"}
    fixed = adapter.keys.fixed(config)
    return [
        ValueWithoutFlag(key, value_of(config, key), resolved.sources.get(key, "default"), fixed.get(key))
        for key in leaf_keys(type(config))
        if key not in carried and not key.startswith(tuple(skipped))
    ]


def _image_folder(path: str, adapter: Adapter, patch: Patch) -> str:
    """Return the absolute path of a folder of images. Raises UserError if the original cannot read it."""
    folders = adapter.images.folders
    wanted = " or ".join(folders.values())
    if path == "shapes":
        raise UserError(f"--data shapes: {patch.repository} reads a folder of images. Give one that has {wanted}")
    if not any((Path(path) / folder).is_dir() for folder in folders):
        raise UserError(f"{path}: {patch.repository} reads {wanted} in it, and there is no such folder")
    return str(Path(path).absolute())


def _first_gpus(count: int, environment: Mapping[str, str]) -> str:
    """Return the first of the usable GPUs, in the format of CUDA_VISIBLE_DEVICES."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return ",".join(visible.split(",")[:count] if visible else map(str, range(count)))


def _shown(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
