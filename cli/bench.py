"""hvp bench"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hvp.cli.pretrain import Device

if TYPE_CHECKING:
    from hvp.common.benchmark import Row

app = typer.Typer(
    help="Measure speed: ratios of two procedures taken in one run, never bare times.", no_args_is_help=True
)

ToFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.", metavar="FILE")]
Rounds = Annotated[int | None, typer.Option(help="Measurements of each side.", min=1, show_default="enough for 5 %")]


@app.command()
def select(json: ToFile = None, rounds: Rounds = None) -> None:
    """Scoring and selecting combinations, against the plain loop."""
    from hvp.methods.dino.benchmark import select_rows

    _report(select_rows(rounds or 5), json)


@app.command()
def loader(json: ToFile = None, rounds: Rounds = None) -> None:
    """The multi-view loader, against torchvision's transforms on Pillow images."""
    from hvp.common.views.benchmark import loader_rows

    _report(loader_rows(rounds or 7), json)


@app.command()
def overhead(
    json: ToFile = None,
    rounds: Rounds = None,
    device: Annotated[Device, typer.Option(help="On the CPU ViT-Ti in fp32, on a GPU ViT-S in bf16.")] = Device.cpu,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step.", min=1, show_default="4 on cpu, 64 on cuda")
    ] = None,
) -> None:
    """The DINO step with hard views, over the vanilla step."""
    from hvp.common.engine.precision import pick_device
    from hvp.methods.dino.benchmark import overhead_rows

    _report(overhead_rows(rounds or 5, pick_device(device.value), batch_size), json)


def _report(rows: "list[Row]", path: Path | None) -> None:
    from hvp.common.evaluation.results import write_result

    table = Table("case", "ratio", "target", "ok", "extra memory", box=None)
    dicts: list[dict[str, Any]] = [row.as_dict() for row in rows]
    for row in dicts:
        target = "-" if row["target"] is None else f"{row['bound']} {row['target']:g}"
        memory = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.1f} MB"
        table.add_row(row["case"], f"{row['ratio']:.2f}", target, "yes" if row["ok"] else "NO", memory)
    Console().print(table)
    if path is not None:
        write_result(dicts, path)
        print(f"wrote {path}")
