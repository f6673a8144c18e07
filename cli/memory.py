"""What to do when memory runs out."""

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
    """Turns running out of memory, the GPU's or the machine's, into a message that names the settings to lower.

    Args:
        config: what is being run; the message shows the present values.

    Raises:
        UserError: memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        where = _where(error)
        if where is None:
            raise
        raise UserError(_message(where, str(error), config)) from error


def _where(error: BaseException) -> str | None:
    """Which memory ran out: `GPU` or `host`; None for any other error."""
    text = str(error)
    # PyTorch's allocator raises the first; the driver, for contexts and page-locked memory, only a text.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
        return "GPU"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "host"
    # no memory to start a worker in
    return "host" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def _message(where: str, reason: str, config: RunConfig) -> str:
    train = config.train
    settings: list[tuple[str, str]] = []
    finer = next((n for n in range(train.accumulate + 1, train.batch_size + 1) if train.batch_size % n == 0), None)
    if finer:
        why = f"now {train.accumulate}; the same step in smaller parts, only batch norm can tell the difference"
        settings.append((f"--set train.accumulate={finer}", why))
    if where == "GPU" and train.precision == "fp32":
        settings.append(("--precision bf16", "now fp32"))
    if train.batch_size > 1:
        why = f"now {train.batch_size}; also changes the learning rate, which scales with it"
        settings.append((f"--batch-size {train.batch_size // 2}", why))
    device = pick_device(train.device)
    workers = available_workers(config.data.workers, device)
    if where == "host" and workers:
        why = f"now {workers}; each keeps up to two batches ready"
        line = (f"--workers {workers // 2}", why)
        # Beside a GPU, most of the machine's memory is the loader's; without, the networks'.
        settings.insert(0 if device.type == "cuda" else min(1, len(settings)), line)
    width = max((len(setting) for setting, _ in settings), default=0)
    listed = "\n".join(f"      {setting:{width}}  ({why})" for setting, why in settings)
    detail = reason.strip().splitlines()[-1].partition(" Of the allocated memory")[0].rstrip(".") if reason else ""
    return (
        f"out of {where} memory{f': {detail:.300}' if detail else ''}.\n"
        f"    Lower what it takes, in this order:\n{listed}\n"
        "    `--dry-run --measure` tells the peak of a setting without a run."
    )
