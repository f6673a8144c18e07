"""The promises around the code: what is installed, what is listed where."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_and_project_list_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == PROJECT["dependencies"]
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_every_folder_with_code_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = set()
    for top in ("cli", "common", "methods", "patches"):
        for file in [*(ROOT / top).rglob("*.py"), *(ROOT / top).rglob("*.yaml")]:
            folders.add("hvp." + ".".join(file.parent.relative_to(ROOT).parts))
    assert folders == packages


@pytest.mark.slow
def test_an_installed_wheel_works_in_any_folder(tmp_path):
    """`pip install .` into an empty environment; the dependencies are lent from this one, to save a download."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            tmp_path,
            _copy(tmp_path / "src"),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("hvp-*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    # after the environment's own packages, and without the editable install's import hook
    (site / "lent.pth").write_text(here)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = _run([python, "-c", "import hvp.common; print(hvp.common.__file__)"], elsewhere)
    assert str(site) in where
    command = environment / "bin" / "hvp"
    assert "vitb16-400ep" in _run([command, "presets", "dino"], elsewhere)
    assert "facebookresearch/dino" in _run([command, "patch", "list"], elsewhere)
    assert re.search(
        r"train\.batch_size +512",
        _run([command, "pretrain", "dino", "--preset", "vits16-100ep", "--dry-run"], elsewhere),
    )


def _copy(to: Path) -> Path:
    """The tracked part of the tree, so that building leaves nothing behind in it."""
    for name in ("cli", "common", "methods", "patches", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        files = (
            [source]
            if source.is_file()
            else [f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        )
        for file in files:
            target = to / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def _run(command: list, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout
