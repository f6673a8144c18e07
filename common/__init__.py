"""Code that two or more methods share."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvp.common.hardviews import Selection, Slots, select
    from hvp.common.rescue import Rescued, rescue

__all__ = ["Rescued", "Selection", "Slots", "rescue", "select"]

_MODULES = {name: "rescue" if name in ("Rescued", "rescue") else "hardviews" for name in __all__}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` on first use, so that the command line starts without PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hvp.common.{_MODULES[name]}"), name)


class _Package(ModuleType):
    """Type of this package. Importing the module `rescue` would bind its name to the module; it stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.rescue if name == "rescue" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
