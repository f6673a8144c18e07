"""hvp patch: our patches of the original trainers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hvp.cli.output import result_console

app = typer.Typer(
    help="Add HVP and Rescue to a clone of an original trainer, with patches that hold our lines only.",
    no_args_is_help=True,
)

PatchedMethod = Annotated[str, typer.Argument(help="Method of the patch; see `hvp patch list`.", show_default=False)]
Upstream = Annotated[
    Path, typer.Option(help="Your clone of the original repository.", metavar="DIR", show_default=False)
]

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@app.command("list")
def list_patches(
    markdown: Annotated[bool, typer.Option("--markdown", help="List every change, as patches/README.md does.")] = False,
) -> None:
    """List the patches with their repository, commit, features and line counts."""
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
def check(method: PatchedMethod, upstream: Upstream) -> None:
    """Check that a clone can be patched."""
    from hvp.patches.patching import load_patch, patch_clone

    patch = load_patch(method)
    found, remarks = patch_clone(patch, upstream)
    _print_notes(remarks)
    names = ", ".join(file.path for file in found)
    print(f"{upstream} can be patched for {method}: {names}, {patch.num_added} lines")


@app.command()
def apply(
    method: PatchedMethod,
    upstream: Upstream,
    out: Annotated[Path, typer.Option(help="New folder for the patched copy.", metavar="DIR", show_default=False)],
) -> None:
    """Write a patched copy of a clone and leave the clone unchanged."""
    from hvp.patches.patching import apply_patch, load_patch

    patch = load_patch(method)
    _print_notes(apply_patch(patch, upstream, out))
    names = ", ".join(file.path for file in patch.files)
    print(f"Wrote {out}: {upstream} with {patch.num_added} lines of ours in {names}.")
    needed = "".join(f", {name}" for name in patch.needs)
    print(
        f"Run {out / patch.trainer} like the original, in an environment that has hvp{needed}; --help lists our flags."
    )


@app.command()
def diff(
    method: PatchedMethod,
    upstream: Upstream,
    stat: Annotated[bool, typer.Option("--stat", help="Only count each file's lines.")] = False,
) -> None:
    """Show the changes to a clone as a unified diff."""
    from hvp.patches.patching import diff_lines, load_patch, patch_clone

    patch = load_patch(method)
    found, remarks = patch_clone(patch, upstream)
    _print_notes(remarks)
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


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
