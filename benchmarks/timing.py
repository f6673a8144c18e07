"""Timing two procedures against each other, for `hvp bench`.

Machines drift, so only ratios taken in one run are reported: the procedures take turns, and the medians are compared.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch


@dataclass(frozen=True)
class Row:
    """One result."""

    benchmark: str
    case: str
    ratio: float
    """What `target` bounds: seconds of one side over the other's, unless the case names a unit."""

    target: float | None
    """Bound of `ratio`; None: none is set."""

    at_most: bool
    """Whether `target` is the largest ratio allowed (a cost), or the smallest (a gain)."""

    memory_mb: float | None
    """Extra memory at the peak of our side, MB; None where it cannot be told."""

    seconds: float
    """Median of our side."""

    reference_seconds: float
    """Median of the reference side."""

    equal: bool = True
    """Whether both sides gave the same result."""

    def as_dict(self) -> dict[str, Any]:
        """The row as `--json` writes it; `ok` says that the target is met and the results are equal."""
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
    """Seconds of each procedure in each of `rounds`, taken in turns after one round of warm-up."""
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
    """The median of the rounds' ratios: a round's two sides met the same machine, two medians need not have."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def keep_freed_memory() -> None:
    """Makes glibc reuse what a step has freed instead of giving it back to the system and asking for it again.

    Otherwise the larger step of two pays for page faults that a GPU's allocator, or a long run, does not have. It holds
    for the rest of the process; elsewhere than on glibc nothing happens.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_memory_mb(procedure: Callable[[], Any], device: torch.device | None = None) -> float | None:
    """Memory that a procedure takes beyond what is there before it, at its peak, MB.

    On a GPU by PyTorch's allocator; on Linux by the kernel's record of the process; None elsewhere.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        procedure()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that was kept would be used first, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
        before = _kilobytes(status, "VmRSS")
        procedure()
        return (_kilobytes(status, "VmHWM") - before) * 1024 / 1e6
    except OSError:
        return None


class Step(Protocol):
    """A training step without its loader, with and without selection."""

    def select(self) -> Any:
        """The selection alone."""

    def hard(self) -> Any:
        """Forward and backward on the hardest views, selected first."""

    def vanilla(self) -> Any:
        """Forward and backward on the first views."""


def overhead_row(
    step: Step, case: str, target: float | None, rounds: int, device: torch.device, *, equal: bool = True
) -> Row:
    """The step with hard views over the vanilla step, and the memory of the selection.

    Args:
        step: what is timed.
        case: how the row is called.
        target: largest ratio allowed.
        rounds: measurements of each side.
        device: where the step runs.
        equal: whether what the step saves was found to change nothing.
    """
    memory = peak_memory_mb(step.select, device)
    keep_freed_memory()
    seconds, reference = interleaved([step.hard, step.vanilla], rounds, device)
    return Row(
        "overhead",
        case,
        ratio(seconds, reference),
        target,
        True,
        memory,
        statistics.median(seconds),
        statistics.median(reference),
        equal,
    )


def same_step(
    a: tuple[torch.Tensor, list[torch.Tensor]], b: tuple[torch.Tensor, list[torch.Tensor]], *, exact: bool
) -> bool:
    """Whether two ways to make a step gave the same one.

    Args:
        a, b: the index of the selection, and the gradients.
        exact: gradients to float32 rounding, else to that of bfloat16.
    """
    rtol, atol = (1e-4, 1e-6) if exact else (0.05, 1e-3)
    return torch.equal(a[0], b[0]) and all(
        torch.allclose(x, y, rtol=rtol, atol=atol) for x, y in zip(a[1], b[1], strict=True)
    )


@contextmanager
def benchmark_settings(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, random numbers from a fixed seed, and the caller's back afterwards."""
    with torch.random.fork_rng(), threads(1) if device.type == "cpu" else nullcontext():
        torch.manual_seed(0)
        yield


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs PyTorch and OpenCV on so many threads."""
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
