"""Clones of the original trainers, where the environment variable HVP_UPSTREAMS names the folder that holds them: one
folder each, called like the method or like the repository."""

import os
from pathlib import Path

import pytest

from hvp.patches.patching import Patch


def clone_of(patch: Patch) -> Path:
    """The clone; the test is skipped where there is none."""
    return clone_at(patch.repository, patch.method)


def clone_at(repository: str, *names: str) -> Path:
    """The clone of a repository, in a folder of its name or of one of the given ones; skips as above."""
    top = os.environ.get("HVP_UPSTREAMS")
    if not top:
        pytest.skip("HVP_UPSTREAMS names no folder of clones")
    owner, name = repository.split("/")
    for folder in (*names, name, f"{owner}+{name}"):
        if (Path(top) / folder).is_dir():
            return Path(top) / folder
    pytest.skip(f"no clone of {repository} in {top}")
