"""hvp eval"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer
from rich.table import Table

from hvp.cli import options
from hvp.cli.output import result_console, say, stage_progress
from hvp.cli.results import Place, keep, other_data, result_place, say_origin, summary, trained_on

if TYPE_CHECKING:
    from hvp.common.data import ImageSource
    from hvp.common.evaluation.backbones import BackboneMeta
    from hvp.common.evaluation.linear import LinearProtocol
    from hvp.common.networks import Encoder

app = typer.Typer(help="Evaluate an encoder.", no_args_is_help=True)


LabelledData = Annotated[
    str,
    typer.Option(
        "--data", help="Folder with train/CLASS and val/CLASS, or `shapes`.", metavar="DIR", show_default=False
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option(help="Side of the centre crop, pixels.", show_default="as in pretraining; 224 if that is unknown"),
]
TEMPERATURE = 0.07


@app.command()
def knn(
    checkpoint: options.Checkpoint,
    data: LabelledData,
    which: options.WhichNetwork = None,
    k: Annotated[list[int] | None, typer.Option(help="Neighbours; repeatable.", show_default="10 20 100 200")] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the votes.")] = TEMPERATURE,
    resolution: Resolution = None,
    device: options.OnDevice = "auto",
    precision: options.WithPrecision = "fp32",
    batch_size: options.ForwardBatch = 256,
    workers: options.Readers = None,
    out: options.ResultFile = None,
) -> None:
    """Weighted k-NN: the training images vote on the classes of the validation images."""
    from hvp.common.evaluation.knn import KS, evaluate_knn
    from hvp.common.training.distributed import available_workers
    from hvp.common.training.precision import pick_device

    opened = _open(checkpoint, which, data, resolution)
    given = {
        "data": other_data(opened.meta, data),
        "k": k,
        "temperature": None if temperature == TEMPERATURE else temperature,
        "resolution": resolution,
        "precision": None if precision == "fp32" else precision,
    }
    place = result_place(out, opened.meta, "knn", given)
    on = pick_device(device)
    with stage_progress() as progress:
        result = evaluate_knn(
            opened.encoder,
            opened.train,
            opened.val,
            ks=k or KS,
            temperature=temperature,
            resolution=opened.resolution,
            device=on,
            precision=precision,
            batch_size=batch_size,
            workers=available_workers(workers, on),
            checkpoint=summary(opened.encoder, opened.meta),
            progress=progress,
        )
    _report(result, place, [(f"k = {row['k']}", row) for row in result["results"]])


@app.command()
def linear(
    checkpoint: options.Checkpoint,
    data: LabelledData,
    which: options.WhichNetwork = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Protocol of this method's paper; the options below override it.",
            metavar="METHOD",
            show_default="the method that trained the checkpoint, else dino",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="the preset's", min=1)
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "lars"] | None, typer.Option(help="Optimiser of the classifier.", show_default="the preset's")
    ] = None,
    base_lr: Annotated[
        float | None, typer.Option(help="Learning rate per 256 images.", show_default="the preset's")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.", show_default="the preset's", min=1)] = None,
    n_last_blocks: Annotated[
        int | None,
        typer.Option(
            help="Number of last blocks whose [CLS] is read.", show_default="the preset's, else 4; 1 for ViT-B", min=1
        ),
    ] = None,
    avgpool: Annotated[
        bool | None,
        typer.Option(
            "--avgpool/--no-avgpool",
            help="Append the mean patch token.",
            show_default="the preset's, else on for ViT-B only",
        ),
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Random crops and flips. Without, features are cached.")
    ] = True,
    resolution: Resolution = None,
    device: options.OnDevice = "auto",
    precision: options.WithPrecision = "fp32",
    seed: Annotated[int, typer.Option(help="Random seed of the classifier, image order and crops.", min=0)] = 0,
    workers: options.Readers = None,
    out: options.ResultFile = None,
) -> None:
    """Linear probe: train a classifier on the frozen features."""
    from hvp.common.evaluation.linear import LinearOptions, evaluate_linear
    from hvp.common.training.distributed import available_workers
    from hvp.common.training.precision import pick_device

    encoder, meta, train, val, size = _open(checkpoint, which, data, resolution)
    asked = {
        "epochs": epochs,
        "optimizer": optimizer,
        "base_lr": base_lr,
        "batch_size": batch_size,
        "n_last_blocks": n_last_blocks,
        "avgpool": avgpool,
    }
    given = {
        "data": other_data(meta, data),
        "preset": preset,
        **asked,
        "augment": None if augment else augment,
        "resolution": resolution,
        "precision": None if precision == "fp32" else precision,
        "seed": seed or None,
    }
    place = result_place(out, meta, "linear", given)
    on = pick_device(device)
    preset = preset or meta.method or "dino"
    settings = LinearOptions(
        **_protocol(preset, encoder, asked),
        augment=augment,
        resolution=size,
        precision=precision,
        workers=available_workers(workers, on),
        seed=seed,
    )
    say(
        f"protocol: {preset}, {settings.epochs} epochs of {settings.optimizer}, base lr {settings.base_lr:g}, "
        f"batch size {settings.batch_size}"
    )
    with stage_progress() as progress:
        result = evaluate_linear(
            encoder,
            train,
            val,
            settings,
            device=on,
            checkpoint=summary(encoder, meta),
            cache_folder=place.path.parent / "features",
            progress=progress,
        )
    _report(result, place, [("last epoch", result["last"]), ("best epoch (chosen on val)", result["best"])])


def _protocol(method: str, encoder: "Encoder", asked: Mapping[str, Any]) -> "LinearProtocol":
    """Return a method's protocol for an encoder, overridden by the options that were given."""
    from hvp.common.evaluation.linear import probe_defaults
    from hvp.common.networks.vision_transformer import VisionTransformer
    from hvp.methods import get_method

    trained_by = get_method(method)
    blocks, avgpool = probe_defaults(encoder)
    protocol: LinearProtocol = {"n_last_blocks": blocks, "avgpool": avgpool, **trained_by.linear}
    if isinstance(encoder, VisionTransformer):
        protocol |= trained_by.linear_vit
    return protocol | cast("LinearProtocol", {key: value for key, value in asked.items() if value is not None})


class _Opened(NamedTuple):
    """Inputs of an evaluation."""

    encoder: "Encoder"
    meta: "BackboneMeta"
    train: "ImageSource"
    val: "ImageSource"
    resolution: int


def _open(checkpoint: Path, which: options.Which | None, data: str, resolution: int | None) -> _Opened:
    """Load the encoder, open the labelled splits, choose the resolution, and print what was found.

    Raises:
        UserError: the checkpoint or the images cannot be used.
    """
    from hvp.common.data import ShapesOptions, open_dataset
    from hvp.common.errors import UserError
    from hvp.common.evaluation.checkpoints import evaluation_size, load_encoder

    encoder, meta = load_encoder(checkpoint, which)
    say_origin(encoder, meta)
    usual, why = evaluation_size(encoder, meta)
    if resolution in (None, usual):
        chosen = f"{usual} pixels, {why if resolution is None else 'as asked'}"
    else:
        chosen = f"{resolution} pixels, as asked; otherwise {usual}, {why}"
    say(f"resolution: {chosen}")
    given = trained_on(meta).get("shapes")
    try:
        shapes = ShapesOptions(**given) if given else ShapesOptions()
    except (TypeError, ValueError) as error:
        raise UserError(f"{meta.path}: its configuration has no usable data.shapes ({error})") from error
    train = open_dataset(data, "train", shapes=shapes, labels=True)
    val = open_dataset(data, "val", shapes=shapes, labels=True)
    return _Opened(encoder, meta, train, val, resolution or usual)


def _report(result: Mapping[str, Any], place: Place, rows: list[tuple[str, Any]]) -> None:
    table = Table("", "top-1", "top-5", box=None)
    for label, row in rows:
        table.add_row(label, *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("top1", "top5")))
    console = result_console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}")
    keep(result, place)
