"""hvp analyze"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli.evaluate import (
    Checkpoint,
    OnDevice,
    ToFile,
    WhichNetwork,
    WithPrecision,
    Workers,
    evaluation_progress,
    keep,
    other_data,
    result_place,
    say_origin,
    summary,
)
from hvp.cli.output import result_console
from hvp.cli.pretrain import Device, PrecisionName

if TYPE_CHECKING:
    from hvp.common.evaluation.backbones import BackboneMeta

IMAGES = 2048

app = typer.Typer(help="Look into an encoder.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command()
def diversity(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="A folder of images, or `shapes`; labels are not needed.", metavar="DIR")],
    which: WhichNetwork = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Views as this preset has them.", metavar="METHOD/PRESET", show_default="as the checkpoint was trained"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value, for example `rescue.cutout=0.3`.", metavar="KEY=VALUE"),
    ] = None,
    images: Annotated[int, typer.Option(help="How many of the training images.", min=1)] = IMAGES,
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of the images and the views.", min=0)] = 0,
    device: OnDevice = Device.auto,
    precision: WithPrecision = PrecisionName.fp32,
    workers: Workers = None,
    out: ToFile = None,
) -> None:
    """Whether Rescue's strong views are strong: the mean cosine of common views, and of a common and a strong one.

    The Rescue paper has 0.7069 and 0.6690. With your encoder and images, a strong view that is as alike as a common one
    is too weak (raise rescue.num_ops or rescue.cutout); one that is not alike at all is no view of the image any more.
    """
    from hvp.cli.diversity import measure_diversity
    from hvp.common.data import open_dataset
    from hvp.common.evaluation.checkpoints import load_encoder
    from hvp.common.training.distributed import available_cores
    from hvp.common.training.precision import pick_device
    from hvp.common.training.run import available_workers

    encoder, meta = load_encoder(checkpoint, which.value if which else None)
    config = _configuration(meta, like, set_ or [])
    say_origin(encoder, meta)
    place = result_place(
        out,
        meta,
        "diversity",
        {
            "data": other_data(meta, data),
            "like": like,
            "set": set_,
            "images": None if images == IMAGES else images,
            "seed": seed or None,
            "precision": None if precision is PrecisionName.fp32 else precision.value,
        },
    )
    on = pick_device(device.value)
    with evaluation_progress() as progress:
        result = measure_diversity(
            encoder,
            open_dataset(data, "train", shapes=config.data.shapes),
            config,
            images=images,
            batch_size=batch_size,
            seed=seed,
            device=on,
            precision=precision.value,
            workers=available_workers(workers, on),
            threads=available_cores(),
            progress=progress,
        )
    table = Table("views", "cosine", "std", "paper", box=None)
    table.add_row("two common", f"{result['common']['mean']:.4f}", f"{result['common']['std']:.4f}", "0.7069")
    table.add_row("common, strong", f"{result['strong']['mean']:.4f}", f"{result['strong']['std']:.4f}", "0.6690")
    console = result_console()
    console.print(table)
    console.print(
        f"Of {result['images']} images, {result['harder']:.0%} have a strong view that is less alike than the common "
        "one.",
        highlight=False,
        soft_wrap=True,
    )
    keep({"checkpoint": summary(encoder, meta), **result}, place)


def _configuration(meta: "BackboneMeta", like: str | None, assignments: list[str]) -> Any:
    """What says how views look: a preset's configuration, or that of the run which left the checkpoint.

    Raises:
        UserError: neither is there, or a name or value is wrong.
    """
    from hvp.common.config.resolving import parse_assignment, read_yaml, resolve
    from hvp.common.errors import UserError
    from hvp.methods import get_method, get_preset

    layers: list[tuple[str, Mapping[str, Any]]]
    if like is not None:
        method, _, preset = like.partition("/")
        layers = [(f"preset {preset}", read_yaml(get_preset(method, preset)))]
    elif meta.format == "hvp" and meta.method is not None and meta.config is not None:
        method, layers = meta.method, [(str(meta.path), meta.config)]
    else:
        raise UserError(
            f"{meta.path}: does not say how its views were made. Name a preset that does: --like METHOD/PRESET, for "
            "example --like dino/vits16-100ep"
        )
    for assignment in assignments:
        key, value = parse_assignment(assignment)
        layers.append(("--set", {key: value}))
    return resolve(get_method(method).config, layers).config
