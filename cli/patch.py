"""hvp patch: our lines in the original trainers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hvp.cli.output import result_console
from hvp.common.errors import UserError

if TYPE_CHECKING:
    from hvp.common.originals.original import Original
    from hvp.common.originals.patching import Patch
    from hvp.common.originals.released import Released

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
    from hvp.common.originals.patching import load_patch, markdown_table, patches

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
    from hvp.common.originals.patching import load_patch, patch_clone

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
    from hvp.common.originals.patching import apply_patch, load_patch

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
    from hvp.common.originals.patching import diff_lines, load_patch, patch_clone

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


@app.command()
def compare(
    method: MethodArgument,
    upstream: Annotated[
        Path | None, typer.Option(help="Your clone of the original repository.", show_default=False)
    ] = None,
    hvp_code: Annotated[
        Path | None, typer.Option(help="Your clone of automl/hvp, HVP's authors' code.", show_default=False)
    ] = None,
) -> None:
    """Compare with the original trainer, or with HVP's authors' code, or both. On the CPU, at a tiny size.

    --upstream trains the patched original and our trainer side by side, from the same weights, on the same batches, in
    a minute or two. --hvp-code lets the selection of HVP's authors' code and ours choose from the same network outputs,
    in seconds. Exit code 1 if either differs by more than rounding.
    """
    from hvp.common.originals.patching import load_patch
    from hvp.methods import get_original, get_released

    if upstream is None and hvp_code is None:
        raise UserError("nothing to compare with. Give --upstream DIR, --hvp-code DIR, or both")
    original = upstream and (get_original(method), load_patch(method), upstream)
    released = hvp_code and (get_released(method), hvp_code)
    agree = [_compare_selection(method, *released)] if released else []
    agree += [_compare_training(method, *original)] if original else []
    if not all(agree):
        raise typer.Exit(1)


def _compare_selection(method: str, released: "Released", clone: Path) -> bool:
    from hvp.common.originals.released import NOTES, REPOSITORY, TOLERANCE, compare_selection
    from hvp.methods import get_method

    found = compare_selection(released, get_method(method), clone)
    print(
        f"{method}: our selection and that of {REPOSITORY} at {released.commit[:7]}, branch {released.branch}: "
        f"{released.function}."
    )
    table = Table("", "images", "same views", "tied views", "close images", "loss differs by", box=None)
    for name, part in found.items():
        table.add_row(name, *map(str, (part.images, part.equal, part.ties, part.close)), f"{part.loss:.1e}")
    result_console().print(table)
    print(f"Tied: other views were chosen, whose loss is the same up to rounding, {TOLERANCE:g}.")
    print("Close: so is that of the two best combinations, whichever was chosen.")
    print("There:")
    for line in (*NOTES, *released.notes):
        print(f"  {line}")
    return all(part.agrees for part in found.values())


def _compare_training(method: str, original: "Original", patch: "Patch", upstream: Path) -> bool:
    from hvp.common.originals.comparison import LOSS_TOLERANCE, LR_TOLERANCE, PARAMETER_TOLERANCE, compare
    from hvp.common.originals.on_cpu import SUBSTITUTED
    from hvp.methods import get_method

    found = compare(get_method(method), original, patch, upstream)
    brings = " and ".join(patch.brings)
    print(f"{method}: {found.steps} steps of ours and of {patch.repository} with our patch, both with {brings}.")
    table = Table("", "largest difference", "rounding is up to", box=None)
    table.add_row("loss of a step", f"{found.loss:.1e}", f"{LOSS_TOLERANCE:g}")
    table.add_row("learning rate", f"{found.lr:.1e}", f"{LR_TOLERANCE:g}")
    table.add_row("final tensor", f"{found.parameters:.1e}", f"{PARAMETER_TOLERANCE:g}")
    result_console().print(table)
    if found.parameters:
        print(f"The tensor that differs most is {found.worst}.")
    same = "the same losses and tensors, bit for bit" if found.untouched else "NOT the same losses and tensors"
    print(f"With our flags left out, the patched original and the untouched one: {same}.")
    print("In the original, at run time:")
    for line in (*SUBSTITUTED, *original.notes):
        print(f"  {line}")
    return found.agrees


def _remark(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
