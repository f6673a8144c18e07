"""hvp pretrain"""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli.output import progress_console, result_console
from hvp.methods import METHODS

if TYPE_CHECKING:
    from hvp.cli.measure import Measurement
    from hvp.common.config.resolving import Resolved

FLAGS = {
    "data": "data.path",
    "hard_views": "selection.hard_views",
    "rescue": "rescue.enabled",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "precision": "train.precision",
    "device": "train.device",
    "seed": "train.seed",
    "workers": "data.workers",
    "loader": "data.loader",
    "on_bad_image": "data.on_bad_image",
    "save_every": "train.save_every",
}
"""The configuration key that each option of `hvp pretrain` stands for."""


class Engine(StrEnum):
    hvp = "hvp"
    upstream = "upstream"


class HardViews(StrEnum):
    none = "none"
    hvp = "hvp"


class PrecisionName(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Pipeline(StrEnum):
    fast = "fast"
    pil = "pil"


class OnBadImage(StrEnum):
    error = "error"
    skip = "skip"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Devices = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes to start here, one a GPU. Under torchrun or srun leave it out.", show_default="1"
    ),
]


def pretrain(
    method: Annotated[str, typer.Argument(help=f"The method: {', '.join(METHODS)}.", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="Start from a preset; `hvp presets METHOD` lists them.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images, or `shapes`, the embedded dataset.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder.", show_default="runs/METHOD/PRESET/seedN", metavar="DIR"),
    ] = None,
    hard_views: Annotated[HardViews | None, typer.Option(help="Select hard views, or train as upstream.")] = None,
    rescue: Annotated[
        bool | None,
        typer.Option(
            "--rescue/--no-rescue", help="Give the easiest images of a batch a strong view.", show_default=False
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of one step, over all processes.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="Autocast type.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to train.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes; the views do not depend on it.")] = None,
    loader: Annotated[Pipeline | None, typer.Option(help="Fast views, or Pillow's as upstream.")] = None,
    on_bad_image: Annotated[
        OnBadImage | None, typer.Option(help="What to do with a file that does not decode.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of values, over the preset.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One value, for example `optim.base_lr=0.001`.", metavar="KEY=VALUE"),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between two checkpoints; 0: one an epoch.", metavar="STEPS")
    ] = None,
    devices: Devices = None,
    engine: Annotated[Engine, typer.Option(help="Our trainer, or the original one with our patch.")] = Engine.hvp,
    upstream: Annotated[
        Path | None, typer.Option(help="With --engine upstream: your clone of the original.", metavar="DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the folder first.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although the configuration differs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every value with its origin, steps and memory; train nothing.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="With --dry-run: time a few real steps, with and without hard views."),
    ] = False,
) -> None:
    """Pretrain an encoder.

    Values come from the defaults, then the preset, then --config, then the other options; later ones win.
    `hvp config dino` explains every key that --set accepts; `--dry-run` shows the values of this run.

    SIGINT, SIGTERM and SIGUSR1 end the run after the step in progress, with a checkpoint; the exit codes are 130, 143
    and 75 (queue me again). `hvp resume` goes on. A mistake that you can mend is exit code 2.
    """
    given = locals()
    from hvp.cli.memory import memory_advice
    from hvp.common.errors import UserError

    flags = {key: given[name] for name, key in FLAGS.items()}
    with said_once():
        ours = [name for name in ("resume", "overwrite", "force", "measure") if given[name]]
        if engine == Engine.upstream and ours:
            raise UserError(f"--{ours[0]} belongs to our own engine. Leave it out, or leave out --engine upstream")
        if (engine == Engine.upstream) != (upstream is not None):
            raise UserError("--engine upstream and --upstream DIR, your clone of the original, belong together")
        resolved = resolve_flags(method, preset, config, flags, set_ or [])
    if upstream is not None:
        _train_original(method, preset, resolved, upstream, out, devices, dry_run=dry_run)
        return
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if measure and not dry_run:
        raise typer.BadParameter("--measure belongs to --dry-run: it times a few steps and leaves nothing behind")
    if dry_run:
        show(method, resolved)
        if measure:
            with memory_advice(resolved.config):
                _measure(method, resolved.config)
        return
    out = out or run_folder(method, preset, resolved.config.train.seed)
    train(method, resolved.config, out, devices, resume=resume, overwrite=overwrite, force=force)


def train(method: str, config: Any, out: Path, devices: int | None, **options: bool) -> None:
    """Trains in this process, which may be one of several, or starts as many as asked.

    Raises:
        UserError: something that the caller can mend.
        Stopped: a signal asked to stop.
    """
    import torch

    from hvp.cli.memory import memory_advice
    from hvp.common.errors import UserError
    from hvp.common.training.distributed import environment_world, launch
    from hvp.common.training.footprint import check_fits
    from hvp.common.training.session import build_loader, open_training_data
    from hvp.methods import get_method

    started = environment_world().size
    if devices is not None and devices > 1 and started == 1:
        code = launch(devices, ["-m", "hvp.cli.main", *sys.argv[1:]])
        if code:
            raise typer.Exit(code)
        return
    if devices is not None and devices != started:
        with said_once():
            raise UserError(f"--devices {devices}, but the launcher started {started} processes. Leave out --devices")
    with said_once():
        world = environment_world()
        try:
            check_fits(config, get_method(method).build_modules, world)
        except UserError:
            # a batch that is larger than the dataset is said first, as it is the likelier mistake
            build_loader(config, open_training_data(config), torch.device("cpu"), world)
            raise
    with memory_advice(config):
        last = get_method(method).train(config, out, console=progress_console(), **options)
    if environment_world().leader:
        print(f"wrote {last}")


def _train_original(
    method: str,
    preset: str | None,
    resolved: "Resolved",
    upstream: Path,
    out: Path | None,
    devices: int | None,
    *,
    dry_run: bool,
) -> None:
    """Starts the patched original, or says what would be started."""
    from hvp.common.errors import UserError
    from hvp.common.training.distributed import environment_world
    from hvp.patches import get_adapter
    from hvp.patches.job import plan
    from hvp.patches.patching import load_patch

    with said_once():
        if environment_world().size > 1:
            raise UserError("--engine upstream starts the original's processes itself: start it once, with --devices")
        if resolved.config.data.path is None and not dry_run:
            raise UserError("no images: give --data DIR")
        usual = run_folder(method, preset, resolved.config.train.seed)
        out = out or usual.with_name(f"{usual.name}-upstream")  # beside a run of ours
        job = plan(get_adapter(method), load_patch(method), resolved, upstream, out, devices or 1)
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(job.shell)
        if not job.copy.exists():
            words = ["hvp", "patch", "apply", method, "--upstream", str(upstream), "--out", str(job.copy)]
            print(f"\nThe copy is not there yet. A run writes it, and so does\n  {shlex.join(words)}")
        print("\nValues that the original has no flag for:")
        for value in sorted(job.without_flag, key=lambda value: not value.differs):
            print(f"  {value}")
        return
    job.write_copy()
    for value in job.without_flag:
        if value.differs:
            print(f"note: {value}", file=sys.stderr)
    if code := job.run():
        raise typer.Exit(code)


@contextmanager
def said_once() -> Iterator[None]:
    """For mistakes that all processes of a run make alike before they are in touch: rank 0 says them."""
    from hvp.common.errors import SharedError, UserError
    from hvp.common.training.distributed import environment_world

    try:
        yield
    except UserError as error:
        world = environment_world()
        if world.size == 1:
            raise
        raise SharedError(str(error), world.leader) from error


def run_folder(method: str, preset: str | None, seed: int) -> Path:
    """Where a run goes that was given no --out."""
    return Path("runs") / method / (preset or "custom") / f"seed{seed}"


def resolve_flags(
    method: str, preset: str | None, config: Path | None, flags: dict[str, Any], assignments: list[str]
) -> "Resolved":
    """The configuration that a command line describes.

    Raises:
        UserError: an unknown method, preset or key, or a value that is not allowed.
    """
    from hvp.common.config.resolving import parse_assignment, read_yaml, resolve
    from hvp.methods import get_method, get_preset

    names = {"data.path": "--data", "selection.hard_views": "--hard-views", "data.on_bad_image": "--on-bad-image"}
    names["rescue.enabled"] = "--rescue" if flags.get("rescue.enabled") else "--no-rescue"
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset:
        layers.append((f"preset {preset}", read_yaml(get_preset(method, preset))))
    if config:
        layers.append((str(config), read_yaml(config)))
    for key, value in flags.items():
        if value is not None:
            flag = names.get(key, "--" + key.rpartition(".")[2].replace("_", "-"))
            layers.append((flag, {key: value.value if isinstance(value, StrEnum) else value}))
    for assignment in assignments:
        key, value = parse_assignment(assignment)
        layers.append(("--set", {key: value}))
    return with_absolute_data(resolve(get_method(method).config, layers))


def with_absolute_data(resolved: "Resolved") -> "Resolved":
    """The configuration with a path of its images that holds in any folder; relative ones begin in this one."""
    from hvp.common.data import absolute_dataset

    config = resolved.config
    data = config.data.model_copy(update={"path": absolute_dataset(config.data.path)})
    return replace(resolved, config=config.model_copy(update={"data": data}))


def show(method: str, resolved: "Resolved") -> None:
    """Every value with its origin, and what follows from them."""
    console = result_console()
    table = Table("key", "value", "from", title=f"hvp pretrain {method}", title_justify="left", box=None)
    for key, value, source in resolved.values():
        table.add_row(key, "null" if value is None else str(value), source)
    console.print(table)
    for line in consequences(method, resolved.config):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def consequences(method: str, config: Any) -> list[str]:
    """Summarise what follows from a configuration: images, steps, learning rate, combinations, and memory.

    Raises:
        UserError: the images are less than a batch, or the networks cannot be built.
    """
    from hvp.common.data import open_dataset
    from hvp.common.errors import UserError
    from hvp.common.training.footprint import footprint, size
    from hvp.common.training.rescuing import images_to_rescue
    from hvp.methods import get_method

    train, slots = config.train, config.view_slots()
    lines = [""]
    if config.data.path is None:
        lines.append("steps:        not known without --data")
    else:
        source = open_dataset(config.data.path, "train", shapes=config.data.shapes)
        steps = len(source) // train.batch_size
        if steps == 0:
            raise UserError(
                f"train.batch_size = {train.batch_size}, but {source.name} has {len(source)} images: less than a batch"
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
        lines.append(f"rescue:       the {rescued} easiest of {train.batch_size} images, a step")
    pixels = sum(slot.candidates * slot.transform.size**2 * 3 for slot in slots)
    part = train.batch_size // train.accumulate
    lines.append(
        f"view memory:  {pixels / 2**20:.2f} MiB an image from the loader, {part * pixels / 2**20:.0f} MiB a batch of "
        f"{part}, {4 * part * pixels / 2**20:.0f} MiB normalised on the device"
    )
    needs = footprint(config, get_method(method).build_modules)
    lines.append(
        f"least memory: {size(needs.device)} on the device of a single process, {size(needs.networks)} of it for the "
        "networks and their optimiser; activations come on top"
    )
    lines += [f"note:         {note}" for note in config.notes()]
    return lines


def _measure(method: str, config: Any) -> None:
    from hvp.cli.measure import measure
    from hvp.common.training.footprint import check_fits
    from hvp.methods import get_method

    check_fits(config, get_method(method).build_modules)
    progress = progress_console()
    found = measure(
        get_method(method).train, config, on_stage=lambda stage: progress.print(f"Measuring {stage} ...", markup=False)
    )
    console = result_console()
    place = f"on {found.device.type}, {found.workers} loader worker{'' if found.workers == 1 else 's'}"
    console.print(f"\nMeasured over {found.steps} steps after {found.warmup_steps} of warm-up, {place}:", markup=False)
    console.print(_costs(found))
    if found.hard is None:
        console.print(f"Hard views were not measured: {found.reason}", markup=False, soft_wrap=True)
    elif found.selecting_steps < found.total_steps:
        console.print(
            f"Of the whole run's {found.total_steps} steps, {found.selecting_steps} select; the others are "
            "as without hard views.",
            highlight=False,
            soft_wrap=True,
        )


def _costs(found: "Measurement") -> Table:
    from hvp.common.training.timing import duration

    kinds = [("without hard views", found.vanilla, found.vanilla.seconds * found.total_steps)]
    if found.hard is not None and found.hard_run_seconds is not None:
        kinds.append(("with hard views", found.hard, found.hard_run_seconds))
    memory = "peak GPU memory" if found.device.type == "cuda" else "peak memory, this process"
    of = "" if found.device_memory is None else f" of {found.device_memory / 2**30:.1f}"
    table = Table("", *(name for name, _, _ in kinds), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    costs = [cost for _, cost, _ in kinds]
    table.add_row("images/s", *(f"{cost.images_per_s:.1f}" for cost in costs))
    table.add_row("seconds a step", *(f"{cost.seconds:.3f}" for cost in costs))
    table.add_row("  waiting for the loader", *(f"{cost.wait_share:.0%}" for cost in costs))
    table.add_row("  selecting", *(f"{cost.select_share:.0%}" for cost in costs))
    table.add_row(memory, *(f"{cost.peak_memory / 2**30:.2f}{of} GiB" for cost in costs))
    table.add_row("an epoch", *(duration(cost.seconds * found.steps_per_epoch) for cost in costs))
    epochs = f"{found.epochs} epoch{'' if found.epochs == 1 else 's'}"
    table.add_row(f"the run, {epochs}", *(duration(seconds) for _, _, seconds in kinds))
    return table
