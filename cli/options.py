"""Options that commands share, and the configuration that a command line describes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hvp.methods import METHODS

if TYPE_CHECKING:
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
"""Configuration key that each option of `hvp pretrain` sets, by the option's name in Python."""


Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
Which = Literal["teacher", "student", "base_encoder", "momentum_encoder", "model"]

# Options of commands that train, or that prepare a run.
MethodArgument = Annotated[str, typer.Argument(help=f"One of {', '.join(METHODS)}.", show_default=False)]
Preset = Annotated[str | None, typer.Option(help="Preset to start from; `hvp presets METHOD` lists them.")]
Data = Annotated[
    str | None, typer.Option(help="Folder of images, or `shapes` for the embedded dataset.", metavar="DIR")
]
RunFolder = Annotated[
    Path | None, typer.Option(help="Folder of the run.", show_default="runs/METHOD/PRESET/seedN", metavar="DIR")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file of values that override the preset.", metavar="FILE")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set one value, such as `optim.base_lr=0.001`; repeatable.", metavar="KEY=VALUE"),
]
LoaderWorkers = Annotated[int | None, typer.Option(help="Loader processes; their number does not change the views.")]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes to start on this machine, one per GPU. Leave it out under torchrun or srun.",
        show_default="1",
    ),
]

# Options of commands that read an encoder from a checkpoint.
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint of hvp or of an upstream trainer, bare state dict, or run folder.", show_default=False
    ),
]
WhichNetwork = Annotated[
    Which | None,
    typer.Option(
        help="Network to take from the checkpoint.", show_default="the teacher, the base encoder, or the only one"
    ),
]
OnDevice = Annotated[Device, typer.Option(help="Device to compute on.")]
WithPrecision = Annotated[Precision, typer.Option(help="Precision of the encoder's forward pass.")]
ForwardBatch = Annotated[int, typer.Option(help="Images per forward pass.", min=1)]
Readers = Annotated[int | None, typer.Option(help="Processes that read images.", show_default="by the number of cores")]
ResultFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="JSON file for the result; replaces an earlier result there.",
        metavar="FILE",
        show_default="beside the checkpoint, named after the options",
    ),
]


def resolve_parameters(parameters: Mapping[str, Any]) -> "Resolved":
    """Resolve the parameters of `hvp pretrain`, by name, into a configuration."""
    flags = {key: parameters[name] for name, key in FLAGS.items()}
    return resolve_flags(
        parameters["method"], parameters["preset"], parameters["config"], flags, parameters["set_"] or []
    )


def resolve_flags(
    method: str, preset: str | None, config: Path | str | None, flags: Mapping[str, Any], assignments: Sequence[str]
) -> "Resolved":
    """Resolve a command line into a configuration; later arguments win over earlier ones.

    Args:
        method: name of the method.
        preset: name of one of its presets.
        config: YAML file.
        flags: values of options by configuration key; None for an option that was not given.
        assignments: `KEY=VALUE`, as `--set` takes them.

    Raises:
        UserError: an unknown method, preset or key, or a value that is not allowed.
    """
    from hvp.common.config.resolving import read_yaml
    from hvp.methods import get_preset

    options = {key: "--" + name.replace("_", "-") for name, key in FLAGS.items()}
    if flags.get("rescue.enabled") is False:
        options["rescue.enabled"] = "--no-rescue"
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset:
        layers.append((f"preset {preset}", read_yaml(get_preset(method, preset))))
    if config:
        layers.append((str(config), read_yaml(Path(config))))
    for key, value in flags.items():
        if value is not None:
            layers.append((options[key], {key: value}))
    return resolve_layers(method, layers, assignments)


def resolve_layers(
    method: str, layers: Sequence[tuple[str, Mapping[str, Any]]], assignments: Sequence[str] = ()
) -> "Resolved":
    """Resolve layers of values, then `--set` assignments, into a configuration whose dataset path is absolute.

    Raises:
        UserError: an unknown method or key, or a value that is not allowed.
    """
    from hvp.common.config.resolving import parse_assignment, resolve
    from hvp.common.data import absolute_dataset
    from hvp.methods import get_method

    given = [("--set", dict([parse_assignment(assignment)])) for assignment in assignments]
    resolved = resolve(get_method(method).config, [*layers, *given])
    config = resolved.config
    data = config.data.model_copy(update={"path": absolute_dataset(config.data.path)})
    return replace(resolved, config=config.model_copy(update={"data": data}))


def run_folder(method: str, preset: str | None, seed: int) -> Path:
    """Return the default folder of a run."""
    return Path("runs") / method / (preset or "custom") / f"seed{seed}"
