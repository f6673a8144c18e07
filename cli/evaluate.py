"""hvp eval"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hvp.cli.output import progress_console, result_console
from hvp.cli.pretrain import Device, PrecisionName

if TYPE_CHECKING:
    from hvp.common.data import ImageSource
    from hvp.common.evaluation.backbones import BackboneMeta
    from hvp.common.networks import Encoder

app = typer.Typer(help="Evaluate an encoder.", no_args_is_help=True)


class Which(StrEnum):
    teacher = "teacher"
    student = "student"
    base_encoder = "base_encoder"
    momentum_encoder = "momentum_encoder"
    model = "model"


class LinearOptimizer(StrEnum):
    sgd = "sgd"
    lars = "lars"


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint of hvp or of an upstream trainer, a bare state dict, or a run's folder.", show_default=False
    ),
]
Data = Annotated[
    str, typer.Option(help="A folder with train/CLASS and val/CLASS, or `shapes`.", metavar="DIR", show_default=False)
]
WhichNetwork = Annotated[
    Which | None,
    typer.Option(
        help="Which network of the checkpoint.", show_default="the teacher, the base encoder, or the only one"
    ),
]
Resolution = Annotated[
    int | None, typer.Option(help="Side of the centre crop, pixels.", show_default="that of pretraining, else 224")
]
OnDevice = Annotated[Device, typer.Option(help="Where to compute.")]
WithPrecision = Annotated[PrecisionName, typer.Option(help="Of the encoder's forward pass.")]
Workers = Annotated[int | None, typer.Option(help="Processes that read images.", show_default="the cores at hand")]
ToFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The result, JSON; that of an earlier evaluation in it is replaced.",
        metavar="FILE",
        show_default="beside the checkpoint, named after the options",
    ),
]
TEMPERATURE = 0.07
NAME_LENGTH = 120

LINE_SECONDS = 10.0
"""Between two lines of progress of a stage, where there is no terminal."""


@app.command()
def knn(
    checkpoint: Checkpoint,
    data: Data,
    which: WhichNetwork = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Neighbours; may be repeated.", show_default="10 20 100 200")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the votes.")] = TEMPERATURE,
    resolution: Resolution = None,
    device: OnDevice = Device.auto,
    precision: WithPrecision = PrecisionName.fp32,
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.", min=1)] = 256,
    workers: Workers = None,
    out: ToFile = None,
) -> None:
    """Weighted k-NN: the training images vote on the classes of the validation images."""
    from hvp.common.evaluation.knn import KS, evaluate_knn
    from hvp.common.training.precision import pick_device
    from hvp.common.training.run import available_workers

    opened = _open(checkpoint, which, data, resolution)
    given = {
        "data": other_data(opened.meta, data),
        "k": k,
        "temperature": None if temperature == TEMPERATURE else temperature,
        "resolution": resolution,
        "precision": None if precision is PrecisionName.fp32 else precision.value,
    }
    place = result_place(out, opened.meta, "knn", given)
    on = pick_device(device.value)
    with evaluation_progress() as progress:
        result = evaluate_knn(
            opened.encoder,
            opened.train,
            opened.val,
            ks=k or KS,
            temperature=temperature,
            resolution=opened.resolution,
            device=on,
            precision=precision.value,
            batch_size=batch_size,
            workers=available_workers(workers, on),
            checkpoint=summary(opened.encoder, opened.meta),
            progress=progress,
        )
    _report(result, place, [(f"k = {row['k']}", row) for row in result["results"]])


@app.command()
def linear(
    checkpoint: Checkpoint,
    data: Data,
    which: WhichNetwork = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Train as this method's paper does; the options below win over it.",
            metavar="METHOD",
            show_default="the method that trained the checkpoint, else dino",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="the preset's", min=1)
    ] = None,
    optimizer: Annotated[
        LinearOptimizer | None, typer.Option(help="Of the classifier.", show_default="the preset's")
    ] = None,
    base_lr: Annotated[
        float | None, typer.Option(help="Learning rate per 256 images.", show_default="the preset's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step.", show_default="the preset's", min=1)
    ] = None,
    n_last_blocks: Annotated[
        int | None,
        typer.Option(help="Blocks whose [CLS] is read.", show_default="the preset's, else 4, for ViT-B 1", min=1),
    ] = None,
    avgpool: Annotated[
        bool | None,
        typer.Option(
            "--avgpool/--no-avgpool", help="Add the mean patch token.", show_default="the preset's, else for ViT-B"
        ),
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Random crops and flips; without, features are cached.")
    ] = True,
    resolution: Resolution = None,
    device: OnDevice = Device.auto,
    precision: WithPrecision = PrecisionName.fp32,
    seed: Annotated[int, typer.Option(help="Of the classifier, the order and the crops.", min=0)] = 0,
    workers: Workers = None,
    out: ToFile = None,
) -> None:
    """Linear probe: a classifier on the frozen features."""
    from hvp.common.evaluation.linear import LinearOptions, LinearProtocol, evaluate_linear, probe_defaults
    from hvp.common.networks.vision_transformer import VisionTransformer
    from hvp.common.training.precision import pick_device
    from hvp.common.training.run import available_workers
    from hvp.methods import get_method

    encoder, meta, train, val, size = _open(checkpoint, which, data, resolution)
    given = {
        "data": other_data(meta, data),
        "preset": preset,
        "epochs": epochs,
        "optimizer": optimizer and optimizer.value,
        "base_lr": base_lr,
        "batch_size": batch_size,
        "n_last_blocks": n_last_blocks,
        "avgpool": avgpool,
        "augment": None if augment else augment,
        "resolution": resolution,
        "precision": None if precision is PrecisionName.fp32 else precision.value,
        "seed": seed or None,
    }
    place = result_place(out, meta, "linear", given)
    on = pick_device(device.value)
    preset = preset or meta.method or "dino"
    method = get_method(preset)
    usual_blocks, usual_avgpool = probe_defaults(encoder)
    protocol: LinearProtocol = {"n_last_blocks": usual_blocks, "avgpool": usual_avgpool, **method.linear}
    if isinstance(encoder, VisionTransformer):
        protocol |= method.linear_vit
    if epochs is not None:
        protocol["epochs"] = epochs
    if optimizer is not None:
        protocol["optimizer"] = optimizer.value
    if base_lr is not None:
        protocol["base_lr"] = base_lr
    if batch_size is not None:
        protocol["batch_size"] = batch_size
    if n_last_blocks is not None:
        protocol["n_last_blocks"] = n_last_blocks
    if avgpool is not None:
        protocol["avgpool"] = avgpool
    options = LinearOptions(
        **protocol,
        augment=augment,
        resolution=size,
        precision=precision.value,
        workers=available_workers(workers, on),
        seed=seed,
    )
    progress_console().print(
        f"protocol: {preset}, {options.epochs} epochs of {options.optimizer}, base lr {options.base_lr:g}, batch size "
        f"{options.batch_size}",
        highlight=False,
        soft_wrap=True,
    )
    with evaluation_progress() as progress:
        result = evaluate_linear(
            encoder,
            train,
            val,
            options,
            device=on,
            checkpoint=summary(encoder, meta),
            cache_folder=place.path.parent / "features",
            progress=progress,
        )
    _report(result, place, [("last epoch", result["last"]), ("best epoch (chosen on val)", result["best"])])


class _Opened(NamedTuple):
    """The inputs of an evaluation."""

    encoder: "Encoder"
    meta: "BackboneMeta"
    train: "ImageSource"
    val: "ImageSource"
    resolution: int


def _open(checkpoint: Path, which: Which | None, data: str, resolution: int | None) -> _Opened:
    """The encoder, where it came from, the labelled splits and their size; says what it found."""
    from hvp.common.data import ShapesOptions, open_dataset
    from hvp.common.errors import UserError
    from hvp.common.evaluation.checkpoints import evaluation_size, load_encoder

    encoder, meta = load_encoder(checkpoint, which.value if which else None)
    say_origin(encoder, meta)
    usual, why = evaluation_size(encoder, meta)
    if resolution is None:
        said = f"{usual} pixels, {why}"
    else:
        said = f"{resolution} pixels, as asked" + ("" if resolution == usual else f"; otherwise {usual}, {why}")
    say(f"resolution: {said}")
    trained_on = (meta.config or {}).get("data")
    options = trained_on.get("shapes") if isinstance(trained_on, Mapping) else None
    try:
        shapes = ShapesOptions(**options) if options else ShapesOptions()
    except (TypeError, ValueError) as error:
        raise UserError(f"{meta.path}: its configuration has no usable data.shapes ({error})") from error
    train = open_dataset(data, "train", shapes=shapes, labels=True)
    val = open_dataset(data, "val", shapes=shapes, labels=True)
    return _Opened(encoder, meta, train, val, resolution or usual)


def say(line: str) -> None:
    """Tells the user, beside the result."""
    progress_console().print(line, soft_wrap=True)


def say_origin(encoder: "Encoder", meta: "BackboneMeta") -> None:
    """Tells which weights of which file were read, and of what network."""
    from hvp.common.networks import describe_encoder

    say(f"weights: {meta.origin}")
    if meta.note:
        say(f"note: {meta.note}")
    say(f"network: {describe_encoder(encoder)}")


def summary(encoder: "Encoder", meta: "BackboneMeta") -> dict[str, Any]:
    """Description of the checkpoint, for a result."""
    from hvp.common.evaluation.features import weights_digest

    return {**meta.summary(), "weights": weights_digest(encoder)}


def other_data(meta: "BackboneMeta", data: str) -> str | None:
    """The name of the images, unless the network was trained on them."""
    trained_on = (meta.config or {}).get("data")
    path = trained_on.get("path") if isinstance(trained_on, Mapping) else None
    if isinstance(path, str) and (
        path == data or ("shapes" not in (path, data) and _resolved(path) == _resolved(data))
    ):
        return None
    return data if data == "shapes" else _resolved(data).name


def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()


class Place(NamedTuple):
    """Where a result goes."""

    path: Path
    asked: bool
    """By --out; otherwise it must not replace another evaluation's."""


def result_place(out: Path | None, meta: "BackboneMeta", evaluation: str, given: Mapping[str, Any]) -> Place:
    """Where an evaluation's result goes: where the user says, or beside the checkpoint, by the options that were given.

    A place of the user's that cannot be written is an error before the evaluation; another one is said.
    """
    from hvp.common.errors import UserError
    from hvp.common.evaluation.results import claim_folder, claim_result

    if out is not None:
        claim_result(out)
        return Place(out, asked=True)
    options = "".join(f"-{name}={_short(value)}" for name, value in given.items() if value is not None)
    name = f"{meta.path.stem}-{evaluation}-{meta.which}{options}"
    path = meta.path.with_name(f"{name[:NAME_LENGTH]}.json")
    try:
        claim_folder(path)
    except UserError as error:
        say(f"note: {error}. The result will be shown, and --out FILE keeps it")
    return Place(path, asked=False)


def _short(value: Any) -> str:
    """An option's value for a file's name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = (
        ",".join(map(_short, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
    )
    return re.sub(r"[^\w.,=+-]+", "_", str(text))


def keep(result: Mapping[str, Any], place: Place) -> None:
    """Writes a result that was shown already.

    Raises:
        UserError: it cannot be written.
    """
    from hvp.common.errors import UserError
    from hvp.common.evaluation.results import free_path, write_result

    path, differs = (place.path, []) if place.asked else free_path(place.path, result)
    try:
        write_result(result, path)
    except UserError as error:
        raise UserError(
            f"{error}.\n"
            "    The result is shown above, but its file is missing. To keep it, evaluate again with --out FILE in a "
            "folder that can be written."
        ) from error
    if differs:
        say(f"note: {place.path} holds another evaluation, and stays; it differs in {', '.join(differs)}")
    result_console().print(f"wrote {path}", soft_wrap=True)


@contextmanager
def evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on a terminal, a line now and then elsewhere."""
    console = progress_console()
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


class _Lines:
    """Progress in lines: as a stage begins, every ten seconds, and at its end."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._shown = 0.0
        self._before = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._before = stage, now, done
        elif done < total and now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        elapsed, steps = now - self._started, done - self._before
        left = f", about {elapsed / steps * (total - done):.0f} s left" if steps and done < total else ""
        say(f"{stage}: {done} of {total}, {elapsed:.0f} s{left}")


def _report(result: Mapping[str, Any], place: Place, rows: list[tuple[str, Any]]) -> None:
    table = Table("", "top-1", "top-5", box=None)
    for label, row in rows:
        table.add_row(label, *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("top1", "top5")))
    console = result_console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False)
    keep(result, place)
