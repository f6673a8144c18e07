"""python -m hvp.benchmarks: ratios of two procedures, timed in one run."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli.main import reported
from hvp.cli.output import result_console
from hvp.cli.pretrain import Device

if TYPE_CHECKING:
    from hvp.benchmarks.timing import Row

app = typer.Typer(
    help="Measure speed: ratios of two procedures taken in one run, never bare times.", no_args_is_help=True
)

MethodName = Annotated[str, typer.Argument(help="The method.", metavar="[METHOD]")]
ToFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.", metavar="FILE")]
Rounds = Annotated[int | None, typer.Option(help="Measurements of each side.", min=1, show_default="enough for 5 %")]


@app.command()
def scoring(method: MethodName = "dino", json: ToFile = None, rounds: Rounds = None) -> None:
    """Scoring and selecting combinations, against the plain loop."""
    _report(_benchmark(method).scoring_rows(rounds or 5), json)


@app.command()
def loader(json: ToFile = None, rounds: Rounds = None) -> None:
    """The multi-view loader, against torchvision's transforms on Pillow images."""
    from hvp.benchmarks.loading import loader_rows

    _report(loader_rows(rounds or 7), json)


@app.command()
def overhead(
    method: MethodName = "dino",
    json: ToFile = None,
    rounds: Rounds = None,
    device: Annotated[
        Device, typer.Option(help="Small networks in fp32 on the CPU, those of the papers in bf16 on a GPU.")
    ] = Device.cpu,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step.", min=1, show_default="a few on cpu, 64 on cuda")
    ] = None,
) -> None:
    """A method's step with hard views, over its vanilla step."""
    from hvp.common.training.precision import pick_device

    _report(_benchmark(method).overhead_rows(rounds or 5, pick_device(device.value), batch_size), json)


@app.command()
def rescue(
    method: MethodName = "simclr",
    json: ToFile = None,
    rounds: Rounds = None,
    device: Annotated[Device, typer.Option(help="fp32 on the CPU, bf16 on a GPU.")] = Device.cpu,
) -> None:
    """A method's step with Rescue over the step without, and the loading of strong views."""
    from hvp.benchmarks.loading import strong_rows
    from hvp.common.errors import UserError
    from hvp.common.training.precision import pick_device

    benchmark = _benchmark(method)
    if not hasattr(benchmark, "rescue_rows"):
        raise UserError(f"{method}: its step with Rescue has no benchmark; that of simclr has")
    rows = benchmark.rescue_rows(rounds or 3, pick_device(device.value))
    _report([*rows, *strong_rows(rounds or 7)], json)


def _benchmark(method: str) -> Any:
    """Import the module of a method's benchmarks, with `scoring_rows()`."""
    from hvp.methods import get_method

    return import_module(f"hvp.benchmarks.scoring.{get_method(method).name}")


def _report(rows: "list[Row]", path: Path | None) -> None:
    from hvp.common.evaluation.results import write_result

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
