"""Command line of the benchmarks: `python -m hvp.benchmarks`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hvp.benchmarks.loading import loader_rows, strong_rows
from hvp.benchmarks.overhead import CASES, overhead_rows, rescue_rows
from hvp.benchmarks.timing import Row
from hvp.cli.main import reported
from hvp.cli.options import Device
from hvp.cli.output import result_console
from hvp.common.errors import UserError
from hvp.common.evaluation.results import write_result
from hvp.common.training.precision import pick_device
from hvp.methods import get_method

app = typer.Typer(
    help="Measure speed. Every figure is a ratio of two procedures that take turns in one run.",
    no_args_is_help=True,
    add_completion=False,
)

MethodName = Annotated[str, typer.Argument(help="The method.", metavar="[METHOD]")]
ToFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.", metavar="FILE")]
Rounds = Annotated[int | None, typer.Option(help="Measurements of each side.", min=1, show_default="enough for 5 %")]


@app.command()
def scoring(method: MethodName = "dino", json: ToFile = None, rounds: Rounds = None) -> None:
    """Time scoring and selecting combinations against the plain loop."""
    module = import_module(f"hvp.benchmarks.scoring.{get_method(method).name}")
    _report(module.scoring_rows(rounds or 5), json)


@app.command()
def loader(json: ToFile = None, rounds: Rounds = None) -> None:
    """Time the multi-view loader against torchvision's transforms on Pillow images."""
    _report(loader_rows(rounds or 7), json)


@app.command()
def overhead(
    method: MethodName = "dino",
    json: ToFile = None,
    rounds: Rounds = None,
    device: Annotated[
        Device, typer.Option(help="Small networks in fp32 on the CPU, those of the papers in bf16 on a GPU.")
    ] = "cpu",
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step.", min=1, show_default="a few on cpu, 64 on cuda")
    ] = None,
) -> None:
    """Time a method's training step with hard views against its vanilla step."""
    _report(overhead_rows(get_method(method), rounds or 5, pick_device(device), batch_size), json)


@app.command()
def rescue(
    method: MethodName = "simclr",
    json: ToFile = None,
    rounds: Rounds = None,
    device: Annotated[Device, typer.Option(help="fp32 on the CPU, bf16 on a GPU.")] = "cpu",
) -> None:
    """Time a method's training step with Rescue against its vanilla step, and the loading of strong views."""
    measured = [name for name, case in CASES.items() if case.rescue_batch]
    if get_method(method).name not in measured:
        raise UserError(f"{method}: the step with Rescue is not measured. Methods that are: {', '.join(measured)}")
    rows = rescue_rows(get_method(method), rounds or 3, pick_device(device))
    _report([*rows, *strong_rows(rounds or 7)], json)


def _report(rows: list[Row], path: Path | None) -> None:
    table = Table("case", "ratio", "target", "ok", "extra memory", box=None)
    dicts: list[dict[str, Any]] = [row.as_dict() for row in rows]
    for row in dicts:
        target = "-" if row["target"] is None else f"{row['bound']} {row['target']:g}"
        memory = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.1f} MB"
        table.add_row(row["case"], f"{row['ratio']:.2f}", target, "yes" if row["ok"] else "NO", memory)
    result_console().print(table)
    if path is not None:
        write_result(dicts, path)
        print(f"wrote {path}")


def command_line() -> None:
    """Run the command with the arguments of the process."""
    with reported():
        app()


if __name__ == "__main__":
    command_line()
