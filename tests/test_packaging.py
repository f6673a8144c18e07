"""Packaging: what an installation holds, which versions are listed, and what importing costs."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from setuptools import PEP420PackageFinder

import hvp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_and_project_list_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == PROJECT["dependencies"]
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_every_folder_with_code_but_benchmarks_is_packaged():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = set(PEP420PackageFinder.find(ROOT / find["where"][0], exclude=find["exclude"]))
    for top in ("cli", "common", "methods", "patches"):
        for file in [*(ROOT / top).rglob("*.py"), *(ROOT / top).rglob("*.yaml"), *(ROOT / top).rglob("*.toml")]:
            assert "hvp." + ".".join(file.parent.relative_to(ROOT).parts) in packages
    assert not [package for package in packages if "benchmarks" in package]


def test_the_package_knows_its_version():
    assert hvp.__version__ == version("hvp")


def test_no_command_needs_pytorch_to_start():
    """PyTorch takes seconds to import, and `hvp` has to configure OpenMP before that."""
    code = """
import sys, typer
import hvp.cli.main, hvp.common.config.resolving, hvp.methods
from hvp.cli.app import app
def names(command):
    return [command.name, *(name for part in getattr(command, "commands", {}).values() for name in names(part))]
assert "knn" in names(typer.main.get_command(app))
print(*sorted({"torch", "pydantic", "numpy"} & {name.partition(".")[0] for name in sys.modules}))
"""
    assert _run([sys.executable, "-c", code.replace("hvp.common.config.resolving, ", "")], ROOT).strip() == ""
    assert _run([sys.executable, "-c", code], ROOT).split() == ["pydantic"]


def test_waiting_threads_do_not_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    code = "import hvp.common, torch; torch.rand(9)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    settings = dict(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))
    if "GOMP_SPINCOUNT" not in settings:
        pytest.skip("PyTorch has another OpenMP here")
    assert settings == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def test_the_users_wait_policy_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert _run([sys.executable, "-c", "import hvp, os; print(os.environ['OMP_WAIT_POLICY'])"], ROOT) == "active\n"


@pytest.mark.slow
def test_an_installed_wheel_works_in_any_folder(tmp_path):
    """`pip install .` in an empty environment, which borrows this one's dependencies to save a download."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([*build, _copy(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("hvp-*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    # Listed after the environment's own packages, and without the path of this editable install.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = _run([python, "-c", "import hvp.common; print(hvp.common.__file__, hvp.__file__)"], elsewhere)
    assert where.count(str(site)) == 2
    assert not (site / "hvp" / "benchmarks").exists()
    command = environment / "bin" / "hvp"
    assert "vitb16-400ep" in _run([command, "presets", "dino"], elsewhere)
    assert "facebookresearch/dino" in _run([command, "patch", "list"], elsewhere)
    planned = _run([command, "pretrain", "dino", "--preset", "vits16-100ep", "--dry-run"], elsewhere)
    assert re.search(r"train\.batch_size +512", planned)


def _copy(to: Path) -> Path:
    """Copy what a build reads, so that building leaves nothing behind in the repository."""
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("benchmarks", "cli", "common", "methods", "patches", "src"):
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def _run(command: list[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout
