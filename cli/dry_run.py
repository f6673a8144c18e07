"""Report of `hvp pretrain --dry-run`: every value, its consequences, and with --measure the cost of a step."""

from typing import Any

import torch
from rich.table import Table

from hvp.cli.measure import Measurement, measure
from hvp.cli.memory import memory_advice
from hvp.cli.output import counted, progress_console, result_console
from hvp.common.config.resolving import Resolved
from hvp.common.data import open_dataset
from hvp.common.errors import UserError
from hvp.common.training.footprint import check_fits, footprint, size
from hvp.common.training.rescuing import images_to_rescue
from hvp.common.training.timing import duration
from hvp.methods import get_method


def show(method: str, resolved: Resolved) -> None:
    """Print every value with its origin, then the consequences."""
    console = result_console()
    table = Table("key", "value", "from", title=f"hvp pretrain {method}", title_justify="left", box=None)
    for key, value, source in resolved.values():
        table.add_row(key, "null" if value is None else str(value), source)
    console.print(table)
    for line in consequences(method, resolved.config):
        console.print(line, soft_wrap=True)


def consequences(method: str, config: Any) -> list[str]:
    """Summarise what a configuration implies: images, steps, learning rate, combinations and memory.

    Raises:
        UserError: there are fewer images than a batch holds, or the networks cannot be built.
    """
    train, slots = config.train, config.view_slots()
    lines = [""]
    if config.data.path is None:
        lines.append("steps:        unknown without --data")
    else:
        source = open_dataset(config.data.path, "train", shapes=config.data.shapes)
        steps = len(source) // train.batch_size
        if steps == 0:
            raise UserError(
                f"train.batch_size = {train.batch_size}, but {source.name} has only {len(source)} images: less than "
                "one batch. Use more images, or a smaller --batch-size"
            )
        lines.append(f"images:       {source.name}")
        lines.append(f"steps:        {steps} per epoch, {steps * train.epochs} in all")
    lines.append(f"rate:         {config.peak_lr:g} after warm-up")
    views = ", ".join(f"{slot.candidates} {slot.name} of {slot.transform.size} px, {slot.kept} kept" for slot in slots)
    lines.append(f"views:        {views}")
    combinations = config.combination_slots().num_combinations
    sampled = config.selection.search == "sampled" and config.selection.comparisons < combinations
    lines.append(f"combinations: {f'{config.selection.comparisons} of ' if sampled else ''}{combinations}")
    if rescued := images_to_rescue(config):
        lines.append(f"rescue:       the {rescued} easiest of {train.batch_size} images per step")
    pixels = sum(slot.candidates * slot.transform.size**2 * 3 for slot in slots)
    part = train.batch_size // train.accumulate
    lines.append(
        f"view memory:  {pixels / 2**20:.2f} MiB per image from the loader, {part * pixels / 2**20:.0f} MiB per batch "
        f"of {part}, {4 * part * pixels / 2**20:.0f} MiB normalised on the device"
    )
    needs = footprint(config, get_method(method).build_modules)
    lines.append(
        f"least memory: {size(needs.device)} on the device of a single process, of which {size(needs.networks)} is for "
        "the networks and their optimiser; activations come on top"
    )
    lines += [f"note:         {note}" for note in config.notes()]
    return lines


def show_costs(method: str, config: Any) -> None:
    """Time a few steps with and without hard views, and print what they and the whole run cost.

    Raises:
        UserError: the configuration cannot be run here.
    """
    progress = progress_console()
    with memory_advice(config):
        check_fits(config, get_method(method).build_modules)
        found = measure(
            get_method(method).train, config, on_stage=lambda stage: progress.print(f"Measuring {stage} ...")
        )
    console = result_console()
    place = f"on {found.device.type}, {counted(found.workers, 'loader worker')}"
    console.print(f"\nMeasured over {found.steps} steps after {found.warmup_steps} of warm-up, {place}:")
    console.print(_costs(found))
    if found.hard is None:
        console.print(f"Hard views were not measured: {found.reason}", soft_wrap=True)
    elif found.selecting_steps < found.total_steps:
        console.print(
            f"Of the run's {found.total_steps} steps, {found.selecting_steps} select hard views; the others cost as "
            "much as without hard views.",
            soft_wrap=True,
        )


def _costs(found: Measurement) -> Table:
    kinds = [("without hard views", found.vanilla, found.vanilla.seconds * found.total_steps)]
    if found.hard is not None and found.hard_run_seconds is not None:
        kinds.append(("with hard views", found.hard, found.hard_run_seconds))
    memory = "peak GPU memory" if found.device.type == "cuda" else "peak memory, this process"
    total = ""
    if found.device.type == "cuda":
        total = f" of {torch.cuda.get_device_properties(found.device).total_memory / 2**30:.1f}"
    table = Table("", *(name for name, _, _ in kinds), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    costs = [cost for _, cost, _ in kinds]
    table.add_row("images/s", *(f"{cost.images_per_s:.1f}" for cost in costs))
    table.add_row("seconds per step", *(f"{cost.seconds:.3f}" for cost in costs))
    table.add_row("  waiting for the loader", *(f"{cost.wait_share:.0%}" for cost in costs))
    table.add_row("  selecting", *(f"{cost.select_share:.0%}" for cost in costs))
    table.add_row(memory, *(f"{cost.peak_memory / 2**30:.2f}{total} GiB" for cost in costs))
    table.add_row("one epoch", *(duration(cost.seconds * found.steps_per_epoch) for cost in costs))
    table.add_row(f"whole run, {counted(found.epochs, 'epoch')}", *(duration(seconds) for _, _, seconds in kinds))
    return table
