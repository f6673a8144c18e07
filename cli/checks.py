"""Checks of `hvp doctor`: the installation, the machine, the dataset and the disk.

The imports at the top work in a broken installation, too. Everything else is imported where it is used, after
`check_packages` found it importable.
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

from hvp.cli.output import counted
from hvp.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hvp.common.data import ImageSource

SAMPLE = 200
"""Images to read."""

PACKAGES = {"torch": "PyTorch", "torchvision": "torchvision", "timm": "timm", "cv2": "OpenCV"}
SHARED_MEMORY = Path("/dev/shm")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str

    status: Literal["ok", "warning", "failure"]
    """`failure`: a run would not start, or would stop before its end."""

    found: str
    """Finding, for people."""

    advice: str = ""
    """Advice; empty if there is nothing to do."""

    values: dict[str, Any] = field(default_factory=dict)
    """The finding as numbers and names, for programs."""

    def as_dict(self) -> dict[str, Any]:
        """Return the check as `--json` writes it."""
        return {"name": self.name, "status": self.status, "found": self.found, "advice": self.advice, **self.values}


def examine(
    data: str | None,
    out: Path,
    config: Any | None,
    build_modules: "Callable[[Any, torch.device], Sequence[nn.Module]] | None",
) -> Iterator[Check]:
    """Run the checks one by one, in an order such that a failure comes before the failures it causes.

    Args:
        data: dataset to sample, as `--data` names it; None skips it.
        out: folder of the run; it need not exist.
        config: the run's `RunConfig`; None skips what depends on it.
        build_modules: that of the method, as in `hvp.methods.Method`; required with `config`.
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
        yield from check_dataset(data, config)
    size = None
    if config is not None and build_modules is not None:
        from hvp.common.training.checkpoint import checkpoint_bytes

        size = checkpoint_bytes(config, build_modules)
    yield check_disk(out, size, kept=0 if config is None else _kept_epochs(config))


def check_packages() -> Check:
    """Check that a run's packages can be imported, and list their versions."""
    found = {"hvp": version("hvp"), "Python": platform.python_version()}
    for module, name in PACKAGES.items():
        try:
            found[name] = str(import_module(module).__version__)
        except (ImportError, OSError, RuntimeError) as error:  # missing libraries, or versions that do not match
            reason = str(error).strip().splitlines()[0]
            return Check(
                "packages",
                "failure",
                f"{name} cannot be imported: {reason:.200}",
                "Reinstall it in a version that pyproject.toml allows; torch and torchvision must match.",
                {"versions": found},
            )
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    return Check("packages", "ok", listed, values={"versions": found})


def check_cuda() -> Check:
    """Check the CUDA libraries that PyTorch was built with."""
    import torch

    if torch.version.cuda is None:
        return Check("CUDA", "ok", "none: this PyTorch is built for the CPU", values={"cuda": None, "nccl": False})
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    number = torch.backends.cudnn.version()
    cudnn = None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    found = f"{torch.version.cuda}, cuDNN {cudnn or 'missing'}, NCCL {'available' if nccl else 'missing'}"
    advice = "" if nccl else "Training on several GPUs needs NCCL: install a PyTorch build that includes it."
    values = {"cuda": torch.version.cuda, "cudnn": cudnn, "nccl": nccl}
    return Check("CUDA", "ok" if nccl else "warning", found, advice, values)


def check_devices() -> Iterator[Check]:
    """Check each GPU, or report that there is none."""
    import torch

    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        about = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{about.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {'bf16' if bf16 else 'no bf16'}"
        busy = free < 0.9 * total
        advice = "Another process uses its memory; `nvidia-smi` shows which." if busy else ""
        values = {"device": about.name, "memory": total, "free": free, "bf16": bf16}
        yield Check(f"GPU {number}", "warning" if busy else "ok", found, advice, values)
    if torch.cuda.device_count() == 0:
        advice = "Training would run on the CPU, which is enough only for the preset tiny."
        if torch.version.cuda is not None and Path("/dev/nvidia0").exists():
            advice = (
                f"PyTorch cannot use the GPU of this machine: its driver is too old for CUDA {torch.version.cuda}, or "
                f"CUDA_VISIBLE_DEVICES (now {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) hides it."
            )
        yield Check("GPU", "warning", "none", advice)


def check_precision(config: Any) -> Check:
    """Check that `train.device` and `train.precision` are available here."""
    from hvp.common.training.precision import Precision, pick_device

    try:
        device: torch.device = pick_device(config.train.device)
        Precision(config.train.precision, device)
    except UserError as error:
        return Check("precision", "failure", str(error), "", {"precision": config.train.precision})
    values = {"precision": config.train.precision, "on": device.type}
    return Check("precision", "ok", f"{config.train.precision} on {device.type}", values=values)


def check_cores(workers: int | None) -> Check:
    """Compare the cores that this process may use with the number of loader workers."""
    machine, cores = os.cpu_count() or 1, _cores()
    found = f"{cores:g} of {machine} available" if cores < machine else f"{machine}"
    values = {"cores": cores, "machine": machine, "workers": workers}
    if workers is not None:
        found += f", for {counted(workers, 'loader worker')}"
        if workers > cores:
            advice = f"The workers would compete for cores: use --workers {max(1, int(cores))} or fewer."
            return Check("cores", "warning", found, advice, values)
    return Check("cores", "ok", found, values=values)


def check_shared_memory(place: Path, needed: int | None, workers: int | None) -> Check:
    """Check the space for batches that wait between the loader's workers and the trainer."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return Check("shared memory", "ok", f"no {place} on this system")
    found = f"{_size(usage.free)} of {_size(usage.total)} free in {place}"
    values = {"free": usage.free, "total": usage.total, "needed": needed}
    if needed is None:
        return Check("shared memory", "ok", found, values=values)
    found += f"; the loader needs up to {_size(needed)}"
    if needed <= usage.free:
        return Check("shared memory", "ok", found, values=values)
    advice = (
        f"Loader workers would be killed. Use fewer (now {workers}), raise train.accumulate, or enlarge {place}: in a "
        f"container with --shm-size={needed // GIB + 1}g or --ipc=host."
    )
    return Check("shared memory", "failure", found, advice, values)


def check_dataset(data: str, config: Any | None) -> Iterator[Check]:
    """Check how fast a sample of a dataset is read and decoded here, and whether any of its images cannot be."""
    from hvp.common.data import ShapesOptions, open_dataset

    try:
        source = open_dataset(data, "train", shapes=ShapesOptions() if config is None else config.data.shapes)
    except UserError as error:
        yield Check("dataset", "failure", str(error))
        return
    values: dict[str, Any] = {"dataset": source.name, "images": len(source)}
    if config is not None and len(source) < config.train.batch_size:
        advice = f"A batch takes {config.train.batch_size}: use more images, or a smaller --batch-size."
        yield Check("dataset", "failure", source.name, advice, values)
    else:
        yield Check("dataset", "ok", source.name, values=values)
    yield from _read_sample(source, config)


def check_disk(out: Path, checkpoint: int | None, *, kept: int = 0) -> Check:
    """Check the space for a run's checkpoints.

    Args:
        out: folder of the run; it need not exist.
        checkpoint: size of a checkpoint in bytes; None if unknown.
        kept: number of epochs whose checkpoint is kept.
    """
    # The closest path that exists may be a file, which stands in the way.
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir():
        return Check("disk", "failure", f"{place} is a file", f"{out} cannot be a folder: give another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("disk", "failure", f"{place} cannot be written", "Give another folder with --out.")
    free = shutil.disk_usage(place).free
    found = f"{_size(free)} free for {out}"
    if checkpoint is None:
        return Check("disk", "ok", found, values={"free": free})
    # last.pt and the one before it stay while the next one is written.
    needed = (3 + kept) * checkpoint
    epochs = f", {counted(kept, 'kept epoch')}" if kept else ""
    found += f"; checkpoints of {_size(checkpoint)} each need up to {_size(needed)} (last, previous, next{epochs})"
    values = {"free": free, "checkpoint": checkpoint, "needed": needed, "kept_epochs": kept}
    if free < needed:
        fewer = ", or keep fewer epochs (train.keep_every)" if kept else ""
        advice = f"The disk would fill up before the run ends: give another --out{fewer}."
        return Check("disk", "failure", found, advice, values)
    if free < 1.25 * needed:
        return Check("disk", "warning", found, "Barely enough, if nothing else writes there.", values)
    return Check("disk", "ok", found, values=values)


def _read_sample(source: "ImageSource", config: Any | None) -> Iterator[Check]:
    from hvp.common.data import BadImage

    # Different images each time: those of the last call are cached in memory, and would not measure the disk.
    indices = random.SystemRandom().sample(range(len(source)), min(SAMPLE, len(source)))
    bad: list[BadImage] = []
    started = time.perf_counter()
    for index in indices:
        try:
            source.read(index)
        except BadImage as error:
            bad.append(error)
    rate = len(indices) / (time.perf_counter() - started)
    found = f"{rate:.0f} images/s per core, from {len(indices)} at random"
    if config is not None and (workers := _workers(config)) > 1:
        found += f"; with {workers} workers at most {rate * min(workers, _cores()):.0f}, before making views"
    yield Check("decoding", "ok", found, values={"images_per_s_per_core": rate, "sample": len(indices)})

    values = {"bad": [{"file": error.where, "reason": error.reason} for error in bad], "sample": len(indices)}
    if not bad:
        yield Check("bad files", "ok", f"none of {len(indices)}", values=values)
        return
    listed = "".join(f"\n{error.where}: {error.reason}" for error in bad[:10])
    more = f"\nand {len(bad) - 10} more" if len(bad) > 10 else ""
    found = f"{len(bad)} of {len(indices)}:{listed}{more}"
    if config is not None and config.data.on_bad_image == "skip":
        yield Check("bad files", "warning", found, values=values)
    else:
        yield Check("bad files", "failure", found, "Replace or remove them, or pass --on-bad-image skip.", values)


def _workers(config: Any) -> int:
    from hvp.common.training.distributed import available_workers
    from hvp.common.training.precision import pick_device

    try:
        device = pick_device(config.train.device)
    except UserError:  # reported by check_precision
        device = pick_device("cpu")
    return available_workers(config.data.workers, device)


def _loader_bytes(config: Any) -> int:
    """Return the most shared memory that the loader needs: two parts of a batch per worker (PyTorch's prefetching), and
    the parts of the current step."""
    workers, train = _workers(config), config.train
    views = sum(slot.candidates * slot.transform.size**2 * 3 for slot in config.view_slots())
    parts = 2 * workers + train.accumulate if workers else 0
    return parts * (train.batch_size // train.accumulate) * views


def _kept_epochs(config: Any) -> int:
    return config.train.epochs // config.train.keep_every if config.train.keep_every else 0


def _cores() -> float:
    """Return the number of cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), _quota(CGROUP_QUOTA) or math.inf)


def _quota(path: Path) -> float | None:
    """Return the cores that the control group allows on average; None if it sets no limit."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no control groups version 2, or `max`
        return None


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
