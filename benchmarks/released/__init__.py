"""The selection in the code that HVP's authors released, beside ours: selection.py, and one file per method."""

from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from hvp.common.errors import UserError
from hvp.methods import METHODS

if TYPE_CHECKING:
    from hvp.benchmarks.released.selection import Released


def get_released(name: str) -> "Released":
    """Return the settings of a comparison with the released selection of a method.

    Raises:
        UserError: the authors released none for this method.
    """
    known = [method for method in METHODS if (files("hvp.benchmarks.released") / f"{method}.py").is_file()]
    if name not in known:
        raise UserError(f"HVP's authors released no code for {name}. They did for {', '.join(known)}")
    released: Released = import_module(f"hvp.benchmarks.released.{name}").RELEASED
    return released
