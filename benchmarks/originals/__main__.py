"""Compare our trainer with the patched original, or our selection with HVP's authors':

python -m hvp.benchmarks.originals METHOD --upstream DIR | --hvp-code DIR
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hvp.benchmarks.originals import get_harness
from hvp.benchmarks.originals.comparison import LOSS_TOLERANCE, LR_TOLERANCE, PARAMETER_TOLERANCE, compare
from hvp.benchmarks.originals.harness import Harness
from hvp.benchmarks.originals.on_cpu import SUBSTITUTED
from hvp.benchmarks.released import get_released
from hvp.benchmarks.released.selection import NOTES, REPOSITORY, TOLERANCE, Released, compare_selection
from hvp.cli.main import reported
from hvp.cli.output import result_console
from hvp.common.errors import UserError
from hvp.methods import get_method
from hvp.patches import get_adapter
from hvp.patches.patching import load_patch


def main(
    method: Annotated[str, typer.Argument(help="The method.", show_default=False)],
    upstream: Annotated[
        Path | None, typer.Option(help="Your clone of the original repository.", show_default=False)
    ] = None,
    hvp_code: Annotated[
        Path | None, typer.Option(help="Your clone of automl/hvp, HVP's authors' code.", show_default=False)
    ] = None,
) -> None:
    """Compare with the original trainer, with HVP's authors' code, or with both. On the CPU, at a tiny size.

    --upstream trains the patched original and our trainer side by side, from the same weights, on the same batches, in
    a minute or two. --hvp-code lets the selection of HVP's authors' code and ours choose from the same network outputs,
    in seconds. Exit code 1 if either differs by more than rounding.
    """
    if upstream is None and hvp_code is None:
        raise UserError("nothing to compare with. Give --upstream DIR, --hvp-code DIR, or both")
    harness = get_harness(method) if upstream else None
    released = get_released(method) if hvp_code else None
    agree = [_compare_selection(method, released, hvp_code)] if released and hvp_code else []
    agree += [_compare_training(method, harness, upstream)] if harness and upstream else []
    if not all(agree):
        raise typer.Exit(1)


def _compare_selection(method: str, released: Released, clone: Path) -> bool:
    """Compare the selections, print the result, and return whether they agree."""
    found = compare_selection(released, get_method(method), clone)
    print(
        f"{method}: our selection and that of {REPOSITORY} at {released.commit[:7]}, branch {released.branch}: "
        f"{released.function}."
    )
    table = Table("", "images", "same views", "tied views", "close images", "loss differs by", box=None)
    for name, part in found.items():
        table.add_row(name, *map(str, (part.images, part.equal, part.ties, part.close)), f"{part.loss:.1e}")
    result_console().print(table)
    print(f"Tied: the two chose different views, whose losses are the same up to rounding, {TOLERANCE:g}.")
    print("Close: the two best combinations have the same loss up to rounding, whichever was chosen.")
    print("In the released code:")
    for line in (*NOTES, *released.notes):
        print(f"  {line}")
    return all(part.agrees for part in found.values())


def _compare_training(method: str, harness: Harness, upstream: Path) -> bool:
    """Compare the trainers, print the result, and return whether they agree."""
    patch = load_patch(method)
    found = compare(get_method(method), get_adapter(method), harness, patch, upstream)
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
    print(f"Without our flags, the patched and the untouched original have {same}.")
    print("In the original, at run time:")
    for line in (*SUBSTITUTED, *harness.notes):
        print(f"  {line}")
    return found.agrees


def command_line() -> None:
    """Run the command with the arguments of the process."""
    with reported():
        typer.run(main)


if __name__ == "__main__":
    command_line()
