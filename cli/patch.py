"""hvp patch: our lines in the original trainers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hvp.cli.output import result_console

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="HVP and Rescue in the original trainers: a patch for a clone of each, which holds our lines only.",
    no_args_is_help=True,
)

MethodArgument = Annotated[str, typer.Argument(help="Whose original: see `hvp patch list`.", show_default=False)]
UpstreamOption = Annotated[Path, typer.Option(help="Your clone of the original repository.", show_default=False)]

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@app.command("list")
def list_patches(
    markdown: Annotated[bool, typer.Option("--markdown", help="Every change, as in patches/README.md.")] = False,
) -> None:
    """List the patches: for which repository and commit, what they bring, and how many lines."""
    from hvp.patches.patching import load_patch, markdown_table, patches

    if markdown:
        print(markdown_table(), end="")
        return
    table = Table("method", "upstream", "commit", "licence", "brings", "lines", box=None, pad_edge=False)
    for method in patches():
        patch = load_patch(method)
        brings, lines = ", ".join(patch.brings), f"+{patch.num_added} -{patch.num_removed}"
        table.add_row(method, patch.repository, patch.commit[:7], patch.licence, brings, lines)
    result_console().print(table)


@app.command()
def check(method: MethodArgument, upstream: UpstreamOption) -> None:
    """Say whether a clone can be patched."""
    from hvp.patches.patching import load_patch, patch_clone

    patch = load_patch(method)
    found, remarks = patch_clone(patch, upstream)
    _remark(remarks)
    names = ", ".join(file.path for file in found)
    print(f"{upstream} can be patched for {method}: {names}, {patch.num_added} lines")


@app.command()
def apply(
    method: MethodArgument,
    upstream: UpstreamOption,
    out: Annotated[Path, typer.Option(help="A new folder for the patched copy.", show_default=False)],
) -> None:
    """Write a patched copy of a clone, which itself stays as it is."""
    from hvp.patches.patching import apply_patch, load_patch

    patch = load_patch(method)
    _remark(apply_patch(patch, upstream, out))
    names = ", ".join(file.path for file in patch.files)
    print(f"Wrote {out}: {upstream} with {patch.num_added} lines of ours in {names}.")
    needed = "".join(f", {name}" for name in patch.needs)
    print(f"Run {out / patch.trainer} as the original, in an environment that has hvp{needed}; --help shows our flags.")


@app.command()
def diff(
    method: MethodArgument,
    upstream: UpstreamOption,
    stat: Annotated[bool, typer.Option("--stat", help="Only count the lines of each file.")] = False,
) -> None:
    """Show what the patch changes in a clone, as a unified diff."""
    from hvp.patches.patching import diff_lines, load_patch, patch_clone

    patch = load_patch(method)
    found, remarks = patch_clone(patch, upstream)
    _remark(remarks)
    console = result_console()
    if stat:
        table = Table("file", "added", "removed", box=None)
        for file in patch.files:
            table.add_row(file.path, f"+{file.num_added}", f"-{file.num_removed}")
        table.add_row("all", f"+{patch.num_added}", f"-{patch.num_removed}")
        console.print(table)
        return
    for changed in found:
        for line in diff_lines(changed):
            if console.is_terminal:
                console.print(Text(line, style=_STYLES.get(line[0], "")), end="", soft_wrap=True)
            else:
                sys.stdout.write(line)


def _remark(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
