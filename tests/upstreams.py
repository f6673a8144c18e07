"""Clones of the original trainers, where the environment variable HVP_UPSTREAMS names the folder that holds them: one
folder each, called like the method or like the repository."""

import os
from pathlib import Path

import pytest

from hvp.common.originals.patching import Patch


def clone_of(patch: Patch) -> Path:
    """The clone; the test is skipped where there is none."""
    top = os.environ.get("HVP_UPSTREAMS")
    if not top:
        pytest.skip("HVP_UPSTREAMS names no folder of clones")
    owner, name = patch.repository.split("/")
    for folder in (patch.method, name, f"{owner}+{name}"):
        if (Path(top) / folder).is_dir():
            return Path(top) / folder
    pytest.skip(f"no clone of {patch.repository} in {top}")
