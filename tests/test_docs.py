"""The documents, as far as a program can check them: links, examples, commands, configuration keys, and lengths."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from hvp.cli.app import app
from hvp.common.config.resolving import leaf_keys
from hvp.methods import METHODS, get_method

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for part in ("*.md", "docs/*.md", "methods/*/*.md", "patches/*.md") for path in ROOT.glob(part))


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose(document: Path) -> str:
    """Return a document without its fenced code."""
    return re.sub(r"(?ms)^```.*?^```$", "", read(document))


def sections(document: Path) -> dict[str, str]:
    """Return the text below each heading, by the heading's anchor."""
    parts = re.split(r"(?m)^#+ (.+)$", prose(document))
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[1::2]]
    return dict(zip(anchors, parts[2::2], strict=True))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), target
        assert not anchor or anchor in sections(there), target


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= 900


def test_every_page_is_in_the_navigation_and_linked_from_the_first():
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    navigation = read("mkdocs.yml").partition("\nnav:\n")[2].partition("\ntheme:\n")[0]
    assert pages <= set(re.findall(r": (\S+\.md)", navigation))
    assert pages - {"index.md"} <= set(re.findall(r"\]\(([\w-]+\.md)", read("docs/index.md")))


def commands() -> Iterator[tuple[str, str]]:
    """Yield every `hvp` command of the documents, with its document. The changelog names those that are gone."""
    for document in DOCUMENTS:
        if document.name != "CHANGELOG.md":
            text = read(document)
            for line in re.findall(r"(?m)^(?: {4})?(hvp .+)$", text) + re.findall(r"`(hvp [^`]+)`", text):
                yield name_of(document), re.sub(r"\s+", " ", line.partition("  #")[0])


def unknown_words(line: str) -> list[str]:
    """Return the subcommands and options of a command line that do not exist; another command may follow ` -- `."""
    own, _, nested = line.removeprefix("hvp ").partition(" -- ")
    command: Any = typer.main.get_command(app)
    words = own.split()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    wrong = [word for word in words if re.match(r"--\w", word) and word.partition("=")[0] not in options | {"--help"}]
    if hasattr(command, "commands") and words and words[0].islower() and not words[0].startswith("-"):
        wrong.append(words[0])
    return wrong + (unknown_words(nested) if nested else [])


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("hvp pretrain dino --preset tiny --rescue", []),
        ("hvp COMMAND --help", []),
        ("hvp bench loader", ["bench"]),
        ("hvp eval knn RUN --data D --preset dino", ["--preset"]),
        ("hvp launch slurm --out job.sh --sbatch=--exclusive -- pretrain dino --gpus 2", ["--gpus"]),
    ],
)
def test_unknown_words_are_found(line, wrong):
    assert unknown_words(line) == wrong


def test_every_command_exists_with_its_options():
    found = list(commands())
    assert len(found) > 50
    assert [(document, line) for document, line in found if unknown_words(line)] == []


def switches() -> Iterator[tuple[str, str]]:
    """Yield every switch of docs/disagreements.md with each method it applies to."""
    for title, text in sections(ROOT / "docs" / "disagreements.md").items():
        methods = [title] if title in METHODS else ["simclr", "mocov3", "dinov2"]
        for row in re.findall(r"(?m)^\|.*\|$", text)[2:]:
            for key in re.findall(r"`([a-z_0-9]+\.[a-z_0-9]+)`", row.rpartition("| ")[2]):
                yield from ((method, key) for method in methods)


@pytest.mark.parametrize(("method", "key"), sorted(set(switches())))
def test_every_switch_is_a_key_of_its_method(method, key):
    assert key in leaf_keys(get_method(method).config)


def test_there_are_switches_for_every_method():
    assert {method for method, _ in switches()} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_readme_names_every_file_of_its_method(method):
    named = set(re.findall(r"`(\w+\.py)`", read(f"methods/{method}/README.md")))
    assert {file.name for file in (ROOT / "methods" / method).glob("*.py")} - {"__init__.py"} <= named


def test_the_examples_for_a_trainer_of_your_own_run():
    """With a small network; the later examples name tensors, which are given here."""
    pair, crops, easy = re.findall(r"(?s)```python\n(.*?)```", read("docs/your-own-trainer.md"))
    names: dict[str, Any] = {"network": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 8))}
    exec(pair, names)
    pair_loss, kept = names["pair_loss"], names["kept"]
    similarity = -(pair_loss + pair_loss.mT) / 2 + 2 * torch.eye(4)  # the diagonal is not a pair
    first, second = kept.index.T
    torch.testing.assert_close(similarity[torch.arange(32), first, second], similarity.flatten(1).min(dim=1).values)
    assert torch.equal(names["x1"], names["views"][first, torch.arange(32)])
    assert torch.equal(names["x2"], names["views"][second, torch.arange(32)])

    names |= {"views": [torch.randn(4, 6, 3, 8, 8), torch.randn(16, 6, 3, 4, 4)], "pair_loss": torch.rand(6, 4, 20)}
    exec(crops, names)
    assert names["global_crops"].shape == (2, 6, 3, 8, 8)
    assert names["local_crops"].shape == (8, 6, 3, 4, 4)

    z_a, z_b = torch.randn(2, 6, 8)
    names |= {
        "z_a": z_a,
        "z_b": z_b,
        "strong": lambda index: z_b[index] + 1,
        "encode": lambda views: views,
        "loss": 1.0,
    }
    exec(easy, names)
    alike = torch.cosine_similarity(z_a, z_b).argsort(descending=True)[:4]
    assert torch.equal(names["found"].index, alike)
    expected = 1 - 0.75 * torch.cosine_similarity(z_a, z_b + 1)[alike].mean()
    torch.testing.assert_close(names["loss"], expected)


def test_the_citation_names_the_version_of_the_package():
    from hvp import __version__

    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__
    assert f"## {__version__}" in read("CHANGELOG.md")
