"""hvp convert"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from hvp.cli.evaluate import Which
from hvp.cli.output import result_console
from hvp.methods import METHODS

if TYPE_CHECKING:
    from hvp.common.convert.report import Converted


class Target(StrEnum):
    upstream = "upstream"
    timm = "timm"
    torchvision = "torchvision"
    safetensors = "safetensors"


LIBRARIES: dict[Target, Literal["timm", "torchvision", "safetensors"]] = {
    Target.timm: "timm",
    Target.torchvision: "torchvision",
    Target.safetensors: "safetensors",
}


class Source(StrEnum):
    upstream = "upstream"


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="The file to convert; of a run, its folder stands for last.pt.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="The file to write; with --from, the run's folder.", metavar="PATH", show_default=False)
    ],
    to: Annotated[
        Target | None,
        typer.Option(help="The upstream trainer's layout, or one backbone for a library.", show_default=False),
    ] = None,
    from_: Annotated[
        Source | None,
        typer.Option("--from", help="Make a run that `hvp resume` goes on with.", show_default=False),
    ] = None,
    which: Annotated[
        Which | None,
        typer.Option(
            help="The network whose backbone it is.", show_default="the teacher, the base encoder, or the only one"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"With --from: {', '.join(METHODS)}.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help="With --from: the run's preset.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --from: a YAML file of values, over the preset.", metavar="FILE")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="With --from: one value of it.", metavar="KEY=VALUE")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --from: the images that the run goes on with.", metavar="DIR")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Carry weights to other programs and back.

    `--to upstream` writes a training checkpoint as the upstream's trainer does; `--to timm`, `torchvision` and
    `safetensors` write one network's backbone (.pth or .safetensors). Beside the file stands FILE.meta.json: where it
    comes from, how to load it, and what became of every tensor.

    `--from upstream --method METHOD --preset PRESET --data DIR` makes a run out of an upstream's training checkpoint.
    To evaluate one no conversion is needed: `hvp eval` reads it.
    """
    of_a_run = {"--method": method, "--preset": preset, "--config": config, "--set": set_, "--data": data}
    if (to is None) == (from_ is None):
        raise typer.BadParameter("give either --to upstream, timm, torchvision or safetensors, or --from upstream")
    if to is not None and (given := [name for name, value in of_a_run.items() if value]):
        raise typer.BadParameter(f"{', '.join(given)} belongs to --from upstream")
    if which is not None and to in (None, Target.upstream):
        raise typer.BadParameter("--which belongs to --to timm, torchvision and safetensors")
    if from_ is not None and method is None:
        raise typer.BadParameter("--from upstream needs --method")
    if method is not None:
        written = _from_upstream(checkpoint, method, preset, config, set_ or [], data, out, overwrite)
    else:
        assert to is not None
        written = _to(checkpoint, to, which, out, overwrite)
    _show(written, out)


def _to(checkpoint: Path, to: Target, which: Which | None, out: Path, overwrite: bool) -> "Converted":
    from hvp.common.config.resolving import resolve
    from hvp.common.convert.backbone import export_backbone
    from hvp.common.convert.report import claim, saver, write
    from hvp.common.convert.training_checkpoints import to_upstream
    from hvp.common.evaluation.checkpoints import checkpoint_file
    from hvp.common.training.checkpoint import load_checkpoint
    from hvp.methods import get_method

    path = checkpoint_file(checkpoint)
    claim(out, path, overwrite=overwrite)
    save = saver(out, state_dict=to is not Target.upstream, only_safetensors=to is Target.safetensors)
    if to is Target.upstream:
        content = load_checkpoint(path)
        trained_by = get_method(content["method"])
        resolved = resolve(trained_by.config, [(str(path), content["config"])])
        converted = to_upstream(content, trained_by.upstream_layout(resolved.config), str(path))
    else:
        converted = export_backbone(path, LIBRARIES[to], which.value if which else None)
    write(converted, path, out, save)
    return converted


def _from_upstream(
    checkpoint: Path,
    method: str,
    preset: str | None,
    config: Path | None,
    assignments: list[str],
    data: str | None,
    out: Path,
    overwrite: bool,
) -> "Converted":
    from hvp.cli.pretrain import resolve_flags
    from hvp.common.convert.runs import write_run
    from hvp.common.evaluation.checkpoints import checkpoint_file
    from hvp.methods import get_method

    flags: dict[str, Any] = {"data.path": data}
    resolved = resolve_flags(method, preset, config, flags, assignments)
    layout = get_method(method).upstream_layout(resolved.config)
    return write_run(checkpoint_file(checkpoint), method, resolved.config, layout, out, overwrite=overwrite)


def _show(converted: "Converted", out: Path) -> None:
    table = Table("tensors of", "count", "numbers", "became", "", box=None)
    for column in table.columns[1:3]:
        column.justify = "right"
    for fate in converted.fates:
        table.add_row(fate.group, str(fate.tensors), f"{fate.numbers:,}", fate.became, fate.to or fate.why)
    console = result_console()
    console.print(table)
    for note in converted.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if load := converted.about.get("backbone", {}).get("load"):
        console.print(f"load with: {load['call']}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
