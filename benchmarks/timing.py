"""Timing two procedures against each other.

Machines drift, so only ratios taken in one run are reported: the procedures take turns.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch


@dataclass(frozen=True)
class Row:
    """One result."""

    benchmark: str
    case: str
    ratio: float
    """Seconds of one side over the other's, unless the case names a unit."""

    target: float | None
    """Bound of `ratio`; None if there is none."""

    at_most: bool
    """Whether `target` is the largest ratio allowed (a cost), or the smallest (a gain)."""

    memory_mb: float | None
    """Extra memory of our side at its peak, MB; None if it cannot be measured."""

    seconds: float
    """Median of our side."""

    reference_seconds: float
    """Median of the reference side."""

    equal: bool = True
    """Whether both sides gave the same result."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as `--json` writes it; `ok` means that the target is met and the results are equal."""
        met = self.target is None or (self.ratio <= self.target if self.at_most else self.ratio >= self.target)
        return {
            "benchmark": self.benchmark,
            "case": self.case,
            "ratio": self.ratio,
            "target": self.target,
            "bound": "at most" if self.at_most else "at least",
            "ok": met and self.equal,
            "memory_mb": self.memory_mb,
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "equal": self.equal,
        }


def interleaved(
    procedures: list[Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> list[list[float]]:
    """Return the seconds of each procedure in each of `rounds`, taken in turns after one round of warm-up."""
    seconds: list[list[float]] = [[] for _ in procedures]
    for round_number in range(rounds + 1):
        for taken, procedure in zip(seconds, procedures, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            procedure()
            _synchronize(device)
            if round_number:
                taken.append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median of the rounds' ratios: both sides of a round ran on the machine in the same state."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def keep_freed_memory() -> None:
    """Make glibc reuse memory that a step has freed instead of returning it to the system.

    Otherwise the larger of two steps pays for page faults that a GPU's allocator, or a long run, does not have. This
    holds for the rest of the process; without glibc nothing happens.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_memory_mb(procedure: Callable[[], Any], device: torch.device | None = None) -> float | None:
    """Return the memory that a procedure needs at its peak beyond what was allocated before, MB.

    Measured by PyTorch's allocator on a GPU, by the kernel's record of the process on Linux; None elsewhere.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        procedure()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise freed memory is reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
        before = _kilobytes(status, "VmRSS")
        procedure()
        return (_kilobytes(status, "VmHWM") - before) * 1024 / 1e6
    except OSError:
        return None


@contextmanager
def benchmark_settings(device: torch.device) -> Iterator[None]:
    """Run with one thread on a CPU and a fixed seed; restore the caller's afterwards."""
    with torch.random.fork_rng(), threads(1) if device.type == "cpu" else nullcontext():
        torch.manual_seed(0)
        yield


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run PyTorch and OpenCV on a number of threads."""
    before, cv2_before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(number)
    cv2.setNumThreads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        with suppress(cv2.error):
            cv2.setNumThreads(cv2_before)


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _kilobytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
