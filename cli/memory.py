"""Advice for when memory runs out."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.training.distributed import available_workers
from hvp.common.training.precision import pick_device


@contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Turn an out-of-memory error, of the GPU or the host, into a message that names the settings to lower.

    Args:
        config: the run's configuration; the message shows its values.

    Raises:
        UserError: memory ran out in the body.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        where = _where(error)
        if where is None:
            raise
        raise UserError(_message(where, str(error), config)) from error


def _where(error: BaseException) -> str | None:
    """Return the memory that ran out, `GPU` or `host`; None for any other error."""
    text = str(error)
    # PyTorch's allocator raises OutOfMemoryError; for contexts and page-locked memory the driver only sends a message.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
        return "GPU"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "host"
    # too little memory to fork a loader worker
    return "host" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def _message(where: str, reason: str, config: RunConfig) -> str:
    train = config.train
    settings: list[tuple[str, str]] = []
    finer = next((n for n in range(train.accumulate + 1, train.batch_size + 1) if train.batch_size % n == 0), None)
    if finer:
        why = f"now {train.accumulate}; the same step in smaller parts; only batch norm can tell the difference"
        settings.append((f"--set train.accumulate={finer}", why))
    if where == "GPU" and train.precision == "fp32":
        settings.append(("--precision bf16", "now fp32"))
    if train.batch_size > 1:
        why = f"now {train.batch_size}; also changes the learning rate, which scales with it"
        settings.append((f"--batch-size {train.batch_size // 2}", why))
    device = pick_device(train.device)
    workers = available_workers(config.data.workers, device)
    if where == "host" and workers:
        why = f"now {workers}; each holds up to two batches"
        line = (f"--workers {workers // 2}", why)
        # With a GPU the loader takes most of the host's memory; without one the networks do.
        settings.insert(0 if device.type == "cuda" else min(1, len(settings)), line)
    width = max((len(setting) for setting, _ in settings), default=0)
    listed = "\n".join(f"      {setting:{width}}  ({why})" for setting, why in settings)
    detail = reason.strip().splitlines()[-1].partition(" Of the allocated memory")[0].rstrip(".") if reason else ""
    return (
        f"out of {where} memory{f': {detail:.300}' if detail else ''}.\n"
        f"    Reduce the memory needed, in this order:\n{listed}\n"
        "    `--dry-run --measure` shows the peak of a setting without a run."
    )
