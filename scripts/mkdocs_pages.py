"""MkDocs hook: add the pages outside docs/ and an API page for every module, and point links at them.

Links in our Markdown are paths in the repository, so they work on a Git host. On the site, a link to a page leads to
that page, a link to a module to its API page, and a link to any other file becomes plain text. A link to nothing stays
as it is, and `mkdocs build --strict` fails on it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "patches/README.md"]
PAGES += [file.relative_to(ROOT).as_posix() for file in ROOT.glob("methods/*/README.md")]
"""Pages outside docs/, as paths in the repository; they keep these paths on the site."""

DOCUMENTED = ("common", "methods")
"""Folders with an API reference."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)\s#]+)(#[^)\s]*)?\)")


def _modules() -> dict[str, str]:
    """Return the name of every documented module, by its path in the repository; a package precedes its modules."""
    files = [file for folder in DOCUMENTED for file in (ROOT / folder).rglob("*.py") if file.stat().st_size]
    paths = sorted(file.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__") for file in files)
    return {path: f"hvp.{path.replace('/', '.')}" for path in paths}


MODULES = _modules()


def _api_page(path: str) -> str:
    return f"reference/{MODULES[path]}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the API reference to the navigation, one group per folder."""
    groups: dict[str, list[Any]] = {}
    for path, name in MODULES.items():
        folder = path if (ROOT / path).is_dir() else posixpath.dirname(path)
        groups.setdefault(folder, []).append({name: _api_page(path)})
    assert config.nav is not None
    config.nav.append({"API": [{f"{folder}/": pages} for folder, pages in groups.items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and the API pages."""
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, name in MODULES.items():
        files.append(File.generated(config, _api_page(path), content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the page's links from paths in the repository into paths on the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in PAGES else f"docs/{source}")

    def site_link(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        module = path.removesuffix(".py").removesuffix("/__init__")
        there = _api_page(module) if module in MODULES else path if path in PAGES else path.removeprefix("docs/")
        if files.get_file_from_path(there) is None:
            return text if (ROOT / path).exists() else link[0]
        return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(source) or '.')}{anchor})"

    return LINK.sub(site_link, markdown)
