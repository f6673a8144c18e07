"""Imports point one way: benchmarks -> cli -> patches -> methods -> common. docs/architecture.md draws the folders."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "cli", "patches", "methods", "common")
"""From the top down: a module imports from its own folder and those after it, and a method from no other method."""

BASE = ("training", "views", "data", "networks", "losses")
"""Folders of common/ that import neither common/evaluation nor common/convert."""


MODULES = {
    ".".join(("hvp", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}
"""File of every module, by its full name; a package has the name of its folder."""


def imports(tree: ast.AST, *, at_import_time: bool = False) -> Iterator[tuple[str, int]]:
    """Yield every module of hvp that the code imports, with the line; `at_import_time` skips functions and types.

    `from hvp.common import views` counts as hvp.common.views, and `from hvp.common import select` as hvp.common.
    """
    for node in ast.iter_child_nodes(tree):
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from imports(ast.Module([child], []), at_import_time=True)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.partition(".")[0] == "hvp")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hvp":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule if submodule in MODULES else str(node.module)), node.lineno
        else:
            yield from imports(node, at_import_time=at_import_time)


def wrong(importer: str, imported: str) -> bool:
    """Whether one module of hvp must not import the other."""
    mine, theirs = importer.split("."), imported.split(".")
    if len(theirs) < 2:  # `import hvp`
        return False
    if FOLDERS.index(theirs[1]) < FOLDERS.index(mine[1]):
        return True
    if mine[1] == theirs[1] == "methods" and len(mine) > 2 and len(theirs) > 2:
        return mine[2] != theirs[2]
    if mine[1] != "common" or len(mine) < 3 or mine[2] not in BASE:
        return False
    return theirs[:3] in (["hvp", "common", "evaluation"], ["hvp", "common", "convert"])


@pytest.mark.parametrize(
    ("importer", "imported", "forbidden"),
    [
        ("hvp.cli.pretrain", "hvp.methods", False),
        ("hvp.common.training.run", "hvp.common.views", False),
        ("hvp.methods.dino.score", "hvp", False),
        ("hvp.methods.dino.score", "hvp.methods.dino.multi_crop", False),
        ("hvp.methods.dino.score", "hvp.methods.ibot.score", True),
        ("hvp.methods.dino.score", "hvp.patches.patching", True),
        ("hvp.common.hardviews", "hvp.methods", True),
        ("hvp.cli.app", "hvp.benchmarks.timing", True),
        ("hvp.common.data.folder", "hvp.common.convert", True),
        ("hvp.common.convert.upstream", "hvp.common.evaluation.checkpoints", False),
    ],
)
def test_the_rule(importer, imported, forbidden):
    assert wrong(importer, imported) == forbidden


def test_imports_point_one_way():
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {imported}"
        for importer, file in MODULES.items()
        for imported, line in imports(ast.parse(file.read_text(encoding="utf-8")))
        if wrong(importer, imported)
    ]
    assert not found


def test_no_import_is_relative():
    """The rule above reads full names only."""
    for file in MODULES.values():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), file


def test_no_modules_import_each_other_in_a_circle():
    """Importing a.b.c runs a and a.b as well, but an __init__ may import its own submodules."""
    graph = {}
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[name] = {imported for imported, _ in imports(tree, at_import_time=True) if imported in MODULES} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_at_import_time_are_told_from_others():
    code = """
from typing import TYPE_CHECKING
import hvp
from hvp.common import hardviews, select
if TYPE_CHECKING:
    from hvp.common.rescue import rescue
else:
    import hvp.common.errors
try:
    import hvp.cli
except ImportError:
    pass
class Late:
    from hvp.methods import METHODS
    def method(self):
        import hvp.patches
"""
    every = {name for name, _ in imports(ast.parse(code))}
    early = {name for name, _ in imports(ast.parse(code), at_import_time=True)}
    assert every - early == {"hvp.common.rescue", "hvp.patches"}
    assert early == {"hvp", "hvp.common", "hvp.common.hardviews", "hvp.common.errors", "hvp.cli", "hvp.methods"}
