"""hvp convert"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from hvp.cli.options import Which, WhichNetwork, resolve_flags
from hvp.cli.output import result_console
from hvp.methods import METHODS

if TYPE_CHECKING:
    from hvp.common.convert.report import Converted

Target = Literal["upstream", "timm", "torchvision", "safetensors"]


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="File to convert, or a run folder for its last.pt.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="File to write; with --from, the run folder.", metavar="PATH", show_default=False)
    ],
    to: Annotated[
        Target | None,
        typer.Option(help="Write the upstream trainer's layout, or one backbone for a library.", show_default=False),
    ] = None,
    from_: Annotated[
        Literal["upstream"] | None,
        typer.Option("--from", help="Make a run that `hvp resume` continues.", show_default=False),
    ] = None,
    which: WhichNetwork = None,
    method: Annotated[str | None, typer.Option(help=f"With --from: {', '.join(METHODS)}.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help="With --from: preset of the run.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --from: YAML file of values that override the preset.", metavar="FILE")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="With --from: set one value; repeatable.", metavar="KEY=VALUE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --from: images to continue the run on.", metavar="DIR")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or run.")] = False,
) -> None:
    """Convert weights for other programs, or from an upstream trainer.

    `--to upstream` writes a training checkpoint in the upstream trainer's format; `--to timm`, `torchvision` and
    `safetensors` write one network's backbone (.pth or .safetensors). FILE.meta.json beside it records its origin, how
    to load it, and what became of every tensor.

    `--from upstream --method METHOD --preset PRESET --data DIR` turns an upstream training checkpoint into a run.
    Evaluation needs no conversion: `hvp eval` reads upstream checkpoints.
    """
    for_a_run = {"--method": method, "--preset": preset, "--config": config, "--set": set_, "--data": data}
    if (to is None) == (from_ is None):
        raise typer.BadParameter("give either --to upstream, timm, torchvision or safetensors, or --from upstream")
    if to is not None and (given := [name for name, value in for_a_run.items() if value]):
        raise typer.BadParameter(f"{', '.join(given)} needs --from upstream")
    if which is not None and to in (None, "upstream"):
        raise typer.BadParameter("--which needs --to timm, torchvision or safetensors")
    if from_ is not None and method is None:
        raise typer.BadParameter("--from upstream needs --method")
    if to is not None:
        _show(_to(checkpoint, to, which, out, overwrite), out)
    else:
        assert method is not None
        resolved = resolve_flags(method, preset, config, {"data.path": data}, set_ or [])
        _show(_from_upstream(checkpoint, method, resolved.config, out, overwrite), out)


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
    save = saver(out, state_dict=to != "upstream", only_safetensors=to == "safetensors")
    if to == "upstream":
        content = load_checkpoint(path)
        trained_by = get_method(content["method"])
        resolved = resolve(trained_by.config, [(str(path), content["config"])])
        converted = to_upstream(content, trained_by.upstream_layout(resolved.config), str(path))
    else:
        converted = export_backbone(path, to, which)
    write(converted, path, out, save)
    return converted


def _from_upstream(checkpoint: Path, method: str, config: Any, out: Path, overwrite: bool) -> "Converted":
    from hvp.common.convert.runs import write_run
    from hvp.common.evaluation.checkpoints import checkpoint_file
    from hvp.methods import get_method

    layout = get_method(method).upstream_layout(config)
    return write_run(checkpoint_file(checkpoint), method, config, layout, out, overwrite=overwrite)


def _show(converted: "Converted", out: Path) -> None:
    table = Table("tensors of", "count", "numbers", "became", "", box=None)
    for column in table.columns[1:3]:
        column.justify = "right"
    for fate in converted.fates:
        table.add_row(fate.group, str(fate.tensors), f"{fate.numbers:,}", fate.became, fate.to or fate.why)
    console = result_console()
    console.print(table)
    for note in converted.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if load := converted.about.get("backbone", {}).get("load"):
        console.print(f"load with: {load['call']}", soft_wrap=True)
    console.print(f"wrote {out}", soft_wrap=True)
