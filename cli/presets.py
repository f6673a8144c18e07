"""hvp presets"""

from typing import Annotated

import typer
from rich.table import Table

from hvp.cli.output import result_console


def presets(
    method: Annotated[str | None, typer.Argument(help="List the presets of this method.", show_default=False)] = None,
    name: Annotated[str | None, typer.Argument(help="Print only this preset.", show_default=False)] = None,
) -> None:
    """List the presets, or print one with the source of every value."""
    from hvp.methods import METHODS, get_preset
    from hvp.methods import presets as known

    if method and name:
        print(get_preset(method, name).read_text(encoding="utf-8"), end="")
        return
    table = Table("method", "preset", "description", box=None)
    for each in [method] if method else METHODS:
        for preset, file in known(each).items():
            title = file.read_text(encoding="utf-8").partition("\n")[0]
            table.add_row(each, preset, title.removeprefix("# "))
    result_console().print(table)
