"""hvp eval"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hvp.cli.output import progress_console, result_console
from hvp.cli.pretrain import Device, PrecisionName

if TYPE_CHECKING:
    from torch import nn

    from hvp.common.data import ImageSource
    from hvp.common.evaluation.checkpoints import BackboneMeta

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
    Path | None, typer.Option("--out", help="The result, JSON.", metavar="FILE", show_default="beside the checkpoint")
]


@app.command()
def knn(
    checkpoint: Checkpoint,
    data: Data,
    which: WhichNetwork = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Neighbours; may be repeated.", show_default="10 20 100 200")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the votes.")] = 0.07,
    resolution: Resolution = None,
    device: OnDevice = Device.auto,
    precision: WithPrecision = PrecisionName.fp32,
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.", min=1)] = 256,
    workers: Workers = None,
    out: ToFile = None,
) -> None:
    """Weighted k-NN: the training images vote on the classes of the validation images."""
    from hvp.common.engine.precision import pick_device
    from hvp.common.engine.run import available_workers
    from hvp.common.evaluation.knn import KS, evaluate_knn

    encoder, meta, train, val = _open(checkpoint, which, data)
    path = _result_path(out, meta, "knn")
    on = pick_device(device.value)
    with evaluation_progress() as progress:
        result = evaluate_knn(
            encoder,
            train,
            val,
            ks=k or KS,
            temperature=temperature,
            resolution=resolution or meta.image_size or 224,
            device=on,
            precision=precision.value,
            batch_size=batch_size,
            workers=available_workers(workers, on),
            checkpoint=meta.summary(),
            progress=progress,
        )
    _report(result, path, [(f"k = {row['k']}", row) for row in result["results"]])


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
    from hvp.common.engine.precision import pick_device
    from hvp.common.engine.run import available_workers
    from hvp.common.evaluation.linear import LinearOptions, LinearProtocol, evaluate_linear, probe_defaults
    from hvp.common.networks.vision_transformer import VisionTransformer
    from hvp.methods import get_method

    encoder, meta, train, val = _open(checkpoint, which, data)
    path = _result_path(out, meta, "linear")
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
        resolution=resolution or meta.image_size or 224,
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
            checkpoint=meta.summary(),
            cache_folder=path.parent / "features",
            progress=progress,
        )
    _report(result, path, [("last epoch", result["last"]), ("best epoch (chosen on val)", result["best"])])


def _open(
    checkpoint: Path, which: Which | None, data: str
) -> "tuple[nn.Module, BackboneMeta, ImageSource, ImageSource]":
    """The encoder, where it came from, and the labelled splits."""
    from hvp.common.data import ShapesOptions, open_dataset
    from hvp.common.evaluation.checkpoints import load_encoder

    encoder, meta = load_encoder(checkpoint, which.value if which else None)
    trained_on = (meta.config or {}).get("data", {})
    shapes = ShapesOptions(**trained_on["shapes"]) if "shapes" in trained_on else ShapesOptions()
    train = open_dataset(data, "train", shapes=shapes, labels=True)
    val = open_dataset(data, "val", shapes=shapes, labels=True)
    return encoder, meta, train, val


def _result_path(out: Path | None, meta: "BackboneMeta", name: str) -> Path:
    from hvp.common.evaluation.results import claim_result

    path = out or meta.path.with_name(f"{meta.path.stem}-{name}-{meta.which}.json")
    claim_result(path)
    return path


@contextmanager
def evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on a terminal, nothing elsewhere."""
    console = progress_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


def _report(result: Any, path: Path, rows: list[tuple[str, Any]]) -> None:
    from hvp.common.evaluation.results import write_result

    write_result(result, path)
    table = Table("", "top-1", "top-5", box=None)
    for label, row in rows:
        table.add_row(label, *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("top1", "top5")))
    console = result_console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
