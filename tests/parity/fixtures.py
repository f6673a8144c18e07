"""Reading the parity fixtures, and keeping track of those that were read.

A fixture is a pair `NAME.json` (description) and `NAME.safetensors` (tensors); `NAME` is `<fixture>_<case>`.
`checkpoint_keys.json.gz` holds one entry per reference model; each counts as a case `checkpoint_keys:<model>`.

    @pytest.mark.parametrize("case", cases("knn"))
    def test_knn(case: str) -> None:
        f = load(case)
        f.tensors["train_features"], f.config["T"], f.scalars["10"]["top1"], f.tolerance["abs_percent"]

The folder is `tests/parity/data`, or the one the environment variable HVP_PARITY names. conftest.py fails a run over
the whole of tests/parity if no test reads a case of an existing method.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and the tests of conftest.py need no tensors
    from torch import Tensor

# First match wins. A case with none of these prefixes belongs to no method and must be read.
OWNERS = (
    ("hvp_dino_", "hvp.methods.dino"),
    ("dino_", "hvp.methods.dino"),
    ("hvp_simsiam_", "hvp.methods.simsiam"),
    ("simsiam_", "hvp.methods.simsiam"),
    ("hvp_simclr_", "hvp.methods.simclr"),
    ("simclr_", "hvp.methods.simclr"),
    ("ibot_", "hvp.methods.ibot"),
    ("mocov3_", "hvp.methods.mocov3"),
    ("dinov2_", "hvp.methods.dinov2"),
    ("koleo_", "hvp.methods.dinov2"),
    ("knn_", "hvp.common.evaluation"),
    ("lars_", "hvp.common.training"),
)
CHECKPOINT_KEYS = "checkpoint_keys"

_read: set[str] = set()


@dataclass(frozen=True)
class Fixture:
    """One case: its description and its tensors."""

    name: str
    meta: dict[str, Any]
    """The whole JSON file."""
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def scalars(self) -> dict[str, Any]:
        return self.meta["scalars"]

    @property
    def tolerance(self) -> dict[str, Any]:
        return self.meta["tolerance"]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `<prefix>.<key>`, by key: `group("state")` is a state dict."""
        return {k.removeprefix(f"{prefix}."): t for k, t in self.tensors.items() if k.startswith(f"{prefix}.")}


def folder() -> Path:
    """Folder of the fixtures."""
    return Path(os.environ.get("HVP_PARITY") or Path(__file__).parent / "data")


def cases(fixture: str) -> list[str]:
    """Names of all cases of a fixture, for `pytest.mark.parametrize`; may be empty."""
    return [name for name, meta in _descriptions(folder()).items() if meta["fixture"] == fixture]


def load(case: str) -> Fixture:
    """Load a case, with its tensors on the CPU, and mark it as read."""
    _read.add(case)
    return Fixture(case, _descriptions(folder())[case], _tensors(folder() / f"{case}.safetensors"))


def assert_close(actual: Tensor | None, expected: Tensor, f: Fixture, what: str) -> None:
    """Check a tensor against a fixture's, at the fixture's tolerance; `what` names it in the message."""
    import torch

    assert actual is not None, what
    rtol, atol = f.tolerance["rtol"], f.tolerance["atol"]
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def checkpoint_models(
    prefix: str, having: str = "entries", suits: Callable[[dict[str, Any]], bool] = lambda facts: True
) -> list[str]:
    """Names of the models in `checkpoint_keys.json.gz` that start with `prefix`, have the field `having` and satisfy
    `suits`, which receives the model's facts."""
    models = _checkpoint_keys(folder()).items()
    return [name for name, facts in models if name.startswith(prefix) and having in facts and suits(facts)]


def load_checkpoint_keys(model: str) -> dict[str, Any]:
    """Load the facts of a reference model from `checkpoint_keys.json.gz`, and mark it as read."""
    _read.add(f"{CHECKPOINT_KEYS}:{model}")
    return _checkpoint_keys(folder())[model]


def unread() -> list[str]:
    """Cases that no test has read so far, except those of methods that do not exist yet."""
    known = [*_descriptions(folder()), *(f"{CHECKPOINT_KEYS}:{model}" for model in _checkpoint_keys(folder()))]
    return [case for case in known if case not in _read and _owner_exists(case.removeprefix(f"{CHECKPOINT_KEYS}:"))]


def _owner_exists(name: str) -> bool:
    module = next((module for prefix, module in OWNERS if name.startswith(prefix)), None)
    return module is None or importlib.util.find_spec(module) is not None


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():  # a fixture without tensors
        return {}
    from safetensors.torch import load_file

    return load_file(file)


@cache
def _descriptions(path: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))}


@cache
def _checkpoint_keys(path: Path) -> dict[str, dict[str, Any]]:
    file = path / f"{CHECKPOINT_KEYS}.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))["models"] if file.exists() else {}
