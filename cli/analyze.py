"""hvp analyze"""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli import options
from hvp.cli.output import result_console, stage_progress
from hvp.cli.results import keep, other_data, result_place, say_origin, summary

if TYPE_CHECKING:
    from hvp.common.evaluation.backbones import BackboneMeta

IMAGES = 2048

app = typer.Typer(help="Analyse an encoder.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command()
def diversity(
    checkpoint: options.Checkpoint,
    data: Annotated[str, typer.Option(help="Folder of images, or `shapes`; labels are not needed.", metavar="DIR")],
    which: options.WhichNetwork = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Make views as this preset does.",
            metavar="METHOD/PRESET",
            show_default="as the checkpoint was trained",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value, such as `rescue.cutout=0.3`; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of training images to use.", min=1)] = IMAGES,
    batch_size: options.ForwardBatch = 64,
    seed: Annotated[int, typer.Option(help="Random seed of the images and views.", min=0)] = 0,
    device: options.OnDevice = "auto",
    precision: options.WithPrecision = "fp32",
    workers: options.Readers = None,
    out: options.ResultFile = None,
) -> None:
    """Measure how strong Rescue's strong views are: mean cosine of two common views, and of a common and a strong one.

    The Rescue paper reports 0.7069 and 0.6690. On your encoder and images, a strong view as similar as a common one is
    too weak (raise rescue.num_ops or rescue.cutout); one that is not similar at all no longer shows the image.
    """
    from hvp.cli.diversity import measure_diversity
    from hvp.common.data import open_dataset
    from hvp.common.evaluation.checkpoints import load_encoder
    from hvp.common.training.distributed import available_cores, available_workers
    from hvp.common.training.precision import pick_device

    encoder, meta = load_encoder(checkpoint, which)
    config = _configuration(meta, like, set_ or [])
    say_origin(encoder, meta)
    given = {
        "data": other_data(meta, data),
        "like": like,
        "set": set_,
        "images": None if images == IMAGES else images,
        "seed": seed or None,
        "precision": None if precision == "fp32" else precision,
    }
    place = result_place(out, meta, "diversity", given)
    on = pick_device(device)
    with stage_progress() as progress:
        result = measure_diversity(
            encoder,
            open_dataset(data, "train", shapes=config.data.shapes),
            config,
            images=images,
            batch_size=batch_size,
            seed=seed,
            device=on,
            precision=precision,
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
        f"For {result['harder']:.0%} of {result['images']} images the strong view is less similar than the common one.",
        soft_wrap=True,
    )
    keep({"checkpoint": summary(encoder, meta), **result}, place)


def _configuration(meta: "BackboneMeta", like: str | None, assignments: list[str]) -> Any:
    """Return the configuration of the views: a preset's, or that of the run that wrote the checkpoint.

    Raises:
        UserError: there is neither, or a name or value is wrong.
    """
    from hvp.common.config.resolving import read_yaml
    from hvp.common.errors import UserError
    from hvp.methods import get_preset

    if like is not None:
        method, _, preset = like.partition("/")
        layer = f"preset {preset}", read_yaml(get_preset(method, preset))
        return options.resolve_layers(method, [layer], assignments).config
    if meta.format != "hvp" or meta.method is None or meta.config is None:
        raise UserError(
            f"{meta.path}: does not record how its views were made. Name a preset that does: --like METHOD/PRESET, for "
            "example --like dino/vits16-100ep"
        )
    return options.resolve_layers(meta.method, [(str(meta.path), meta.config)], assignments).config
