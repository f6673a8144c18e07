"""Our patches of the original trainers: one folder per method, and the code that applies the patches and runs them."""

from importlib import import_module
from typing import TYPE_CHECKING

from hvp.patches.patching import find_patch

if TYPE_CHECKING:
    from hvp.patches.adapter import Adapter


def get_adapter(method: str) -> "Adapter":
    """Return the adapter of a method's original trainer.

    Raises:
        UserError: there is no patch for the method.
    """
    find_patch(method)
    adapter: Adapter = import_module(f"hvp.patches.{method}.adapter").ADAPTER
    return adapter
