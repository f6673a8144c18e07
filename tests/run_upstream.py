"""Runs an original trainer's script, with stand-ins for what a machine that tests hvp need not have:

    python run_upstream.py SCRIPT [ARGUMENTS]

Packages that only the original imports, and what `torch.hub` would ask the network for.
"""

import importlib.util
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch

PACKAGES = ("tensorboardX", "sklearn", "munkres", "omegaconf", "fvcore", "xformers", "timm.models.layers.helpers")


class StandIns:
    """Finds what nobody before it has found."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if any(name == package or name.startswith(package + ".") for package in PACKAGES):
            return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None: ...


if __name__ == "__main__":
    sys.meta_path.append(StandIns())  # type: ignore[arg-type]
    torch.hub.list = lambda *_, **__: []
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
