"""`hvp doctor`: whether this machine, this dataset and this disk are fit for a run.

What is imported at the top works in a broken installation, too; everything else is imported where it is used, after
`check_packages` found that it can be.
"""

import math
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvp.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hvp.common.data import ImageSource

SAMPLE = 200
"""Images that are read."""

PACKAGES = {"torch": "PyTorch", "torchvision": "torchvision", "timm": "timm", "cv2": "OpenCV"}
SHARED_MEMORY = Path("/dev/shm")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str

    status: Literal["ok", "warning", "failure"]
    """`failure`: a run would not start, or would stop on the way."""

    found: str

    advice: str = ""
    """What to do; empty if nothing."""

    values: dict[str, Any] = field(default_factory=dict)
    """The same as numbers and names, for programs."""

    def as_dict(self) -> dict[str, Any]:
        """The line as `--json` writes it."""
        return {"name": self.name, "status": self.status, "found": self.found, "advice": self.advice, **self.values}


def examine(
    data: str | None,
    out: Path,
    config: Any | None,
    build_modules: "Callable[[Any, torch.device], Sequence[nn.Module]] | None",
    *,
    sample: int = SAMPLE,
) -> Iterator[Check]:
    """Every check, one after the other; the order is that in which mistakes hide each other.

    Args:
        data: dataset to sample, as `--data` names it; None leaves it out.
        out: the run's folder, which need not exist.
        config: what is going to be run, a `RunConfig`; None leaves out what depends on it.
        build_modules: the method's, as in `hvp.methods.Method`; goes with `config`.
        sample: images to read.
    """
    packages = check_packages()
    yield packages
    if packages.status == "failure":
        return
    yield check_cuda()
    yield from check_devices()
    if config is not None:
        yield check_precision(config)
    workers = None if config is None else _workers(config)
    yield check_cores(workers)
    yield check_shared_memory(SHARED_MEMORY, None if config is None else _loader_bytes(config), workers)
    if data is not None:
        skip = config is not None and config.data.on_bad_image == "skip"
        yield from check_dataset(data, sample, skip_bad=skip, workers=workers, config=config)
    size = None
    if config is not None and build_modules is not None:
        from hvp.common.training.checkpoint import checkpoint_bytes

        size = checkpoint_bytes(config, build_modules)
    yield check_disk(out, size, kept=0 if config is None else _kept_epochs(config))


def check_packages() -> Check:
    """Versions of what a run imports."""
    found = {"hvp": version("hvp"), "Python": platform.python_version()}
    for module, name in PACKAGES.items():
        try:
            found[name] = str(import_module(module).__version__)
        except (ImportError, OSError, RuntimeError) as error:  # missing libraries; two versions that do not fit
            reason = str(error).strip().splitlines()[0]
            return Check(
                "packages",
                "failure",
                f"{name} cannot be imported: {reason:.200}",
                "Install it again with the versions that pyproject.toml names; torch and torchvision go together.",
                {"versions": found},
            )
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    return Check("packages", "ok", listed, values={"versions": found})


def check_cuda() -> Check:
    """The CUDA libraries that PyTorch was built with."""
    import torch

    if torch.version.cuda is None:
        return Check("CUDA", "ok", "none: this PyTorch is built for the CPU", values={"cuda": None, "nccl": False})
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    number = torch.backends.cudnn.version()
    cudnn = None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    found = f"{torch.version.cuda}, cuDNN {cudnn or 'missing'}, NCCL {'available' if nccl else 'missing'}"
    advice = "" if nccl else "Several GPUs need NCCL: install a PyTorch that has it."
    values = {"cuda": torch.version.cuda, "cudnn": cudnn, "nccl": nccl}
    return Check("CUDA", "ok" if nccl else "warning", found, advice, values)


def check_devices() -> Iterator[Check]:
    """The GPUs, one line each, or the lack of one."""
    import torch

    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        about = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{about.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {'bf16' if bf16 else 'no bf16'}"
        busy = free < 0.9 * total
        advice = "Something else holds its memory; `nvidia-smi` shows what." if busy else ""
        values = {"device": about.name, "memory": total, "free": free, "bf16": bf16}
        yield Check(f"GPU {number}", "warning" if busy else "ok", found, advice, values)
    if torch.cuda.device_count() == 0:
        advice = "Training runs on the CPU, which is enough for the preset tiny only."
        if torch.version.cuda is not None and Path("/dev/nvidia0").exists():
            advice = (
                f"There is one that PyTorch cannot use: its driver is older than CUDA {torch.version.cuda} needs, or "
                f"CUDA_VISIBLE_DEVICES (now {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) hides it."
            )
        yield Check("GPU", "warning", "none", advice)


def check_precision(config: Any) -> Check:
    """Whether `train.device` and `train.precision` exist here."""
    from hvp.common.training.precision import Precision, pick_device

    try:
        device: torch.device = pick_device(config.train.device)
        Precision(config.train.precision, device)
    except UserError as error:
        return Check("precision", "failure", str(error), "", {"precision": config.train.precision})
    values = {"precision": config.train.precision, "on": device.type}
    return Check("precision", "ok", f"{config.train.precision} on {device.type}", values=values)


def check_cores(workers: int | None) -> Check:
    """Cores that this process may use, against the loader's processes."""
    machine, cores = os.cpu_count() or 1, _cores()
    found = f"{cores:g} of {machine} available" if cores < machine else f"{machine}"
    values = {"cores": cores, "machine": machine, "workers": workers}
    if workers is not None:
        found += f", for {_count(workers, 'loader worker')}"
        if workers > cores:
            advice = f"The workers wait for each other: use --workers {max(1, int(cores))} or fewer."
            return Check("cores", "warning", found, advice, values)
    return Check("cores", "ok", found, values=values)


def check_shared_memory(place: Path, needed: int | None, workers: int | None) -> Check:
    """Room for the batches that wait between the loader's processes and the trainer."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return Check("shared memory", "ok", f"no {place} on this system")
    found = f"{_size(usage.free)} of {_size(usage.total)} free in {place}"
    values = {"free": usage.free, "total": usage.total, "needed": needed}
    if needed is None:
        return Check("shared memory", "ok", found, values=values)
    found += f", the loader takes up to {_size(needed)}"
    if needed <= usage.free:
        return Check("shared memory", "ok", found, values=values)
    advice = (
        f"Loader workers would die. Use fewer (now {workers}), raise train.accumulate, or give it more: in a container "
        f"--shm-size={needed // GIB + 1}g or --ipc=host."
    )
    return Check("shared memory", "failure", found, advice, values)


def check_dataset(
    data: str, sample: int, *, skip_bad: bool = False, workers: int | None = None, config: Any | None = None
) -> Iterator[Check]:
    """How fast the images of a dataset are read and decoded here, and which of a sample cannot be."""
    from hvp.common.data import ShapesOptions, open_dataset

    try:
        shapes = config.data.shapes if config is not None else ShapesOptions()
        source = open_dataset(data, "train", shapes=shapes)
    except UserError as error:
        yield Check("dataset", "failure", str(error))
        return
    values: dict[str, Any] = {"dataset": source.name, "images": len(source)}
    batch = None if config is None else config.train.batch_size
    if batch is not None and len(source) < batch:
        advice = f"A batch has {batch}: use more images, or a smaller --batch-size."
        yield Check("dataset", "failure", source.name, advice, values)
    else:
        yield Check("dataset", "ok", source.name, values=values)
    yield from _read_sample(source, sample, skip_bad, workers)


def check_disk(out: Path, checkpoint: int | None, *, kept: int = 0) -> Check:
    """Room for the checkpoints of a run in its folder.

    Args:
        out: the folder, which need not exist.
        checkpoint: bytes of one; None if it is not known.
        kept: copies that stay at the end of an epoch.
    """
    # A file with a folder's name in its way is told from a folder by the parent that exists.
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir():
        return Check("disk", "failure", f"{place} is a file", f"{out} cannot be a folder: name another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("disk", "failure", f"{place} cannot be written", "Name another folder with --out.")
    free = shutil.disk_usage(place).free
    found = f"{_size(free)} free for {out}"
    if checkpoint is None:
        return Check("disk", "ok", found, values={"free": free})
    # last.pt and the one before it are there while the next one is written.
    needed = (3 + kept) * checkpoint
    epochs = f", {_count(kept, 'kept epoch')}" if kept else ""
    found += f"; checkpoints of {_size(checkpoint)} take up to {_size(needed)} (last, previous, next{epochs})"
    values = {"free": free, "checkpoint": checkpoint, "needed": needed, "kept_epochs": kept}
    if free < needed:
        fewer = ", or keep fewer epochs (train.keep_every)" if kept else ""
        advice = f"The disk would be full before the end: name another --out{fewer}."
        return Check("disk", "failure", found, advice, values)
    if free < 1.25 * needed:
        return Check("disk", "warning", found, "It is just enough, if nothing else is written there.", values)
    return Check("disk", "ok", found, values=values)


def _read_sample(source: "ImageSource", sample: int, skip_bad: bool, workers: int | None) -> Iterator[Check]:
    from hvp.common.data import BadImage

    # Other images every time: those of the last call are in the system's memory, and would not tell of the disk.
    indices = random.SystemRandom().sample(range(len(source)), min(sample, len(source)))
    bad: list[BadImage] = []
    started = time.perf_counter()
    for index in indices:
        try:
            source.read(index)
        except BadImage as error:
            bad.append(error)
    rate = len(indices) / (time.perf_counter() - started)
    found = f"{rate:.0f} images/s a core, from {len(indices)} at random"
    if workers is not None and workers > 1:
        found += f"; {workers} workers: at most {rate * min(workers, _cores()):.0f}, before the views are made"
    yield Check("decoding", "ok", found, values={"images_per_s_per_core": rate, "sample": len(indices)})

    values = {"bad": [{"file": error.where, "reason": error.reason} for error in bad], "sample": len(indices)}
    if not bad:
        yield Check("bad files", "ok", f"none of {len(indices)}", values=values)
        return
    listed = "".join(f"\n{error.where}: {error.reason}" for error in bad[:10])
    more = f"\nand {len(bad) - 10} more" if len(bad) > 10 else ""
    advice = "" if skip_bad else "Replace or remove them, or pass --on-bad-image skip."
    status: Literal["warning", "failure"] = "warning" if skip_bad else "failure"
    yield Check("bad files", status, f"{len(bad)} of {len(indices)}:{listed}{more}", advice, values)


def _workers(config: Any) -> int:
    from hvp.common.training.distributed import available_workers
    from hvp.common.training.precision import pick_device

    try:
        device = pick_device(config.train.device)
    except UserError:  # reported by check_precision
        device = pick_device("cpu")
    return available_workers(config.data.workers, device)


def _loader_bytes(config: Any) -> int:
    """Shared memory that the loader takes at most: two parts of a batch ahead for each worker (PyTorch's default), and
    those of the step that is being trained on."""
    workers, train = _workers(config), config.train
    views = sum(slot.candidates * slot.transform.size**2 * 3 for slot in config.view_slots())
    parts = 2 * workers + train.accumulate if workers else 0
    return parts * (train.batch_size // train.accumulate) * views


def _kept_epochs(config: Any) -> int:
    return config.train.epochs // config.train.keep_every if config.train.keep_every else 0


def _cores() -> float:
    """Those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), _quota(CGROUP_QUOTA) or math.inf)


def _quota(path: Path) -> float | None:
    """Cores that a container may use on average, by its control group; None where there is no limit."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no control groups of version 2, or `max`
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
