"""Editors and type checkers find the code behind `from hvp.common import ...`."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "file"), [("select", "hardviews.py"), ("rescue", "rescue.py")])
def test_go_to_definition_leads_to_the_file_to_edit(name, file, tmp_path):
    """The package imports these names lazily, and its folders are links."""
    jedi = pytest.importorskip("jedi")
    code = f"from hvp.common import {name}"
    script = jedi.Script(code, project=jedi.Project(tmp_path, added_sys_path=[str(ROOT / "src")]))
    (definition,) = script.goto(1, len(code), follow_imports=True)
    assert definition.type == "function"
    assert definition.module_path.resolve() == ROOT / "common" / file
