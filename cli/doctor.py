"""hvp doctor"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hvp.cli import options
from hvp.cli.checks import Check, examine
from hvp.cli.output import counted, progress_console, result_console
from hvp.common.errors import UserError

STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    method: Annotated[str | None, typer.Argument(help="Method of the run.", show_default=False)] = None,
    preset: options.Preset = None,
    data: options.Data = None,
    out: options.RunFolder = None,
    config: options.ConfigFile = None,
    set_: options.Assignments = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.", metavar="FILE")] = None,
) -> None:
    """Check that the machine, the dataset and the disk are fit for a run; exit with code 1 if not.

    With a METHOD and its preset, compare memory and disk with what that run needs.
    """
    run: Any = None
    build_modules = None
    if method is not None:
        from hvp.methods import get_method

        run = options.resolve_flags(method, preset, config, {"data.path": data}, set_ or []).config
        build_modules = get_method(method).build_modules
        out = out or options.run_folder(method, preset, run.train.seed)
        data = run.data.path
    elif preset or config or set_:
        raise UserError("--preset, --config and --set describe a run, so they need its method: hvp doctor dino ...")

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
    print(f"\n{counted(failures, 'failure')}, {counted(warnings, 'warning')}")
    if json is not None:
        from hvp.common.evaluation.results import write_result

        write_result({"ok": failures == 0, "checks": [check.as_dict() for check in checks]}, json)
        print(f"wrote {json}")
    if failures:
        raise typer.Exit(1)
