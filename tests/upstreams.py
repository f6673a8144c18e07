"""Clones of the original trainers, in the folder that the environment variable HVP_UPSTREAMS names.

Each clone has the name of its method or of its repository.
"""

import os
from pathlib import Path

import pytest

from hvp.patches.patching import Patch


def clone_of(patch: Patch) -> Path:
    """Return the clone of a patch's original. Skips the test where there is none."""
    return clone_at(patch.repository, patch.method)


def clone_at(repository: str, *names: str) -> Path:
    """Return the clone of a repository, in a folder of its name or of one of the given names. Skips as above."""
    owner, name = repository.split("/")
    return clone_in(*names, name, f"{owner}+{name}")


def clone_in(*folders: str) -> Path:
    """Return the first of these folders of clones that exists. Skips as above."""
    top = os.environ.get("HVP_UPSTREAMS")
    if not top:
        pytest.skip("HVP_UPSTREAMS names no folder of clones")
    for folder in folders:
        if (path := Path(top).resolve() / folder).is_dir():
            return path
    pytest.skip(f"{top} has none of {', '.join(folders)}")
