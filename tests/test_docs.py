"""What the documents say of files, sections and configuration keys, as far as it can be checked."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.config.resolving import leaf_keys
from hvp.methods import METHODS, get_method

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for part in ("*.md", "docs/*.md", "methods/*/*.md", "patches/*.md") for path in ROOT.glob(part))


def sections(document: Path) -> dict[str, str]:
    """The text below each heading, by the heading's anchor."""
    parts = re.split(r"(?m)^#+ (.+)$", document.read_text(encoding="utf-8"))
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[1::2]]
    return dict(zip(anchors, parts[2::2], strict=True))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), target
        assert not anchor or anchor in sections(there), target


def switches() -> Iterator[tuple[str, str]]:
    """Every switch of docs/disagreements.md with a method that it is said to work for."""
    for title, text in sections(ROOT / "docs" / "disagreements.md").items():
        methods = [title] if title in METHODS else ["simclr", "mocov3", "dinov2"]
        for row in re.findall(r"(?m)^\|.*\|$", text)[2:]:
            for key in re.findall(r"`([a-z_0-9]+\.[a-z_0-9]+)`", row.rpartition("| ")[2]):
                yield from ((method, key) for method in methods)


@pytest.mark.parametrize(("method", "key"), sorted(set(switches())))
def test_every_switch_is_one(method, key):
    assert key in leaf_keys(get_method(method).config)


def test_there_are_switches_for_every_method():
    assert {method for method, _ in switches()} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_readme_names_every_file_of_its_method(method):
    folder = ROOT / "methods" / method
    named = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8")))
    assert {file.name for file in folder.glob("*.py")} - {"__init__.py"} <= named


def test_the_examples_of_select_run():
    """README's, with a small network; then that of several resolutions, whose tensors it only names."""
    pair, crops = re.findall(r"(?s)```python\n(.*?)```", sections(ROOT / "README.md")["in-your-own-trainer"])[:2]
    names: dict[str, Any] = {"network": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 8))}
    exec(pair, names)
    pair_loss, kept = names["pair_loss"], names["kept"]
    similarity = -(pair_loss + pair_loss.mT) / 2 + 2 * torch.eye(4)  # the diagonal is no pair
    first, second = kept.index.T
    torch.testing.assert_close(similarity[torch.arange(32), first, second], similarity.flatten(1).min(dim=1).values)
    assert torch.equal(names["x1"], names["views"][first, torch.arange(32)])
    assert torch.equal(names["x2"], names["views"][second, torch.arange(32)])

    names |= {"views": [torch.randn(4, 6, 3, 8, 8), torch.randn(16, 6, 3, 4, 4)], "pair_loss": torch.rand(6, 4, 20)}
    exec(crops, names)
    assert names["global_crops"].shape == (2, 6, 3, 8, 8)
    assert names["local_crops"].shape == (8, 6, 3, 4, 4)
