"""Our trainers beside the patched originals, on the same numbers.

comparison.py       train both on the CPU, from the same weights and on the same batches
harness.py          the settings of a comparison; X.py holds those of method X
on_cpu.py           run an original's script on the CPU, with stand-ins for what a small machine lacks
xformers_on_cpu.py  the stand-in for xFormers
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hvp.patches.patching import find_patch

if TYPE_CHECKING:
    from hvp.benchmarks.originals.harness import Harness


def get_harness(method: str) -> "Harness":
    """Return the settings of a comparison with a method's original.

    Raises:
        UserError: there is no patch for the method.
    """
    find_patch(method)
    harness: Harness = import_module(f"hvp.benchmarks.originals.{method}").HARNESS
    return harness
