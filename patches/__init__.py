"""Our lines in the original trainers: one folder per method, and the code that patches and runs them."""

from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from hvp.common.errors import UserError
from hvp.methods import METHODS

if TYPE_CHECKING:
    from hvp.patches.original import Original


def get_original(name: str) -> "Original":
    """Return the adapter of a method's original trainer.

    Raises:
        UserError: there is none, or no such method.
    """
    known = [method for method in METHODS if (files("hvp.patches") / method / "original.py").is_file()]
    if name not in known:
        raise UserError(
            f"{name} is not compared with its original, nor started by --engine upstream. Those that are: "
            f"{', '.join(known)}"
        )
    original: Original = import_module(f"hvp.patches.{name}.original").ORIGINAL
    return original
