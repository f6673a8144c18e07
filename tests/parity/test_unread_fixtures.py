"""Test of conftest.py: a fixture that no test reads fails a run over the whole folder, and no other run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ONE = "tests/parity/test_one.py"

READS_ONE_OF_TWO = """
from tests.parity.fixtures import cases, load

def test_reads_the_first():
    assert load(cases("dino_thing")[0]).config == {}

def test_reads_nothing():
    pass
"""


@pytest.mark.parametrize(
    ("names", "arguments", "code"),
    [
        pytest.param(["dino_thing_0", "dino_thing_1"], [], 1, id="unread"),
        pytest.param(["dino_thing_0", "nobodys_0"], [], 1, id="unread, of an unknown method"),
        pytest.param(["dino_thing_0"], [], 0, id="all read"),
        pytest.param(["dino_thing_0", "dino_thing_1"], ["-k", "first"], 0, id="some tests only"),
        pytest.param(
            ["dino_thing_0", "dino_thing_1"], ["tests/parity/test_one.py::test_reads_nothing"], 0, id="one test only"
        ),
    ],
)
def test_unread_fixture_fails_a_whole_run(tmp_path: Path, names: list[str], arguments: list[str], code: int) -> None:
    folder = tmp_path / "tests" / "parity"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for helper in ("conftest.py", "fixtures.py"):
        shutil.copy(Path(__file__).parent / helper, folder)
    (folder / "test_one.py").write_text(READS_ONE_OF_TWO)
    data = tmp_path / "data"
    data.mkdir()
    for name in names:
        meta = {"fixture": name.rpartition("_")[0], "config": {}}
        (data / f"{name}.json").write_text(json.dumps(meta))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *arguments],
        cwd=tmp_path,
        env=os.environ | {"HVP_PARITY": str(data)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert ("were read by no test: " + names[-1] in run.stdout) == (code == 1)
