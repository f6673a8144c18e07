"""hvp doctor"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hvp.cli.output import progress_console, result_console
from hvp.common.errors import UserError

if TYPE_CHECKING:
    from hvp.cli.checks import Check

STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    method: Annotated[
        str | None, typer.Argument(help="The method that is going to be run.", show_default=False)
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Its preset; `hvp presets METHOD` lists them.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images, or `shapes`, the embedded dataset.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder.", show_default="runs/METHOD/PRESET/seedN", metavar="DIR"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of values, over the preset.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One value, as in `hvp pretrain`.", metavar="KEY=VALUE")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file, too.", metavar="FILE")] = None,
) -> None:
    """Say whether machine, dataset and disk are fit for a run; exit code 1 if not.

    With a METHOD and its preset, memory and disk are held against what that run takes.
    """
    from hvp.cli.checks import examine
    from hvp.cli.pretrain import resolve_flags, run_folder

    run: Any = None
    build_modules = None
    if method is not None:
        from hvp.methods import get_method

        run = resolve_flags(method, preset, config, {"data.path": data}, set_ or []).config
        build_modules = get_method(method).build_modules
        out = out or run_folder(method, preset, run.train.seed)
        data = run.data.path
    elif preset or config or set_:
        raise UserError("--preset, --config and --set say what is run, so they need the method: hvp doctor dino ...")

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    checks: list[Check] = []
    with progress_console().status("Examining ..."):
        for check in examine(data, out or Path("runs"), run, build_modules):
            checks.append(check)
            found = Text(check.found)
            if check.advice:
                found.append(f"\n-> {check.advice}", style="bold")
            table.add_row(Text(check.status, style=STYLES[check.status]), check.name, found)
    result_console().print(table)
    failures = sum(check.status == "failure" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    print(f"\n{_count(failures, 'failure')}, {_count(warnings, 'warning')}")
    if json is not None:
        from hvp.common.evaluation.results import write_result

        write_result({"ok": failures == 0, "checks": [check.as_dict() for check in checks]}, json)
        print(f"wrote {json}")
    if failures:
        raise typer.Exit(1)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
