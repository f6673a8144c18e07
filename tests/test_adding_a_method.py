"""docs/adding-a-method.md to the letter: its files, in a copy of the repository, train, evaluate and convert."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = re.findall(
    r'(?ms)^```\w+ title="([^"]+)"\n(.*?)^```$', (ROOT / "docs" / "adding-a-method.md").read_text("utf-8")
)
LIST = re.compile(r"(?m)^METHODS = \(.*\)$")

SMALL = [
    *("--preset", "tiny", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--workers", "0"),
    *("--set", "data.shapes.train=64", "--set", "data.shapes.val=16", "--set", "optim.warmup_epochs=0"),
    *("--set", "train.log_every=1"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository with the page's files; its list of methods is the page's."""
    root: Path = tmp_path_factory.mktemp("repository")
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("cli", "common", "methods", "patches", "src"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=leave_out)
    (line, methods), *files = FILES
    assert line == "methods/__init__.py"
    old = (root / line).read_text("utf-8")
    assert len(LIST.findall(old)) == 1
    (root / line).write_text(LIST.sub(methods.strip(), old), "utf-8")
    for path, text in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "utf-8")
    return root


def python(copy: Path, code: str, *arguments: str) -> str:
    """Run code in the copy and return its output."""
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


COMMANDS = {
    "vanilla": ["pretrain", "barlowtwins", *SMALL, "--hard-views", "none", "--no-rescue", "--out", "vanilla"],
    "hard": ["pretrain", "barlowtwins", *SMALL, "--hard-views", "hvp", "--no-rescue", "--out", "hard"],
    "rescued": ["pretrain", "barlowtwins", *SMALL, "--hard-views", "none", "--rescue", "--out", "rescued"],
    "eval": ["eval", "knn", "hard", "--data", "shapes", "--k", "2", "--out", "knn.json"],
    "convert": ["convert", "hard", "--to", "upstream", "--out", "checkpoint.pth"],
    "presets": ["presets", "barlowtwins"],
    "config": ["config", "barlowtwins", "loss"],
}


@pytest.fixture(scope="module")
def outputs(copy) -> dict[str, str]:
    """Return the output of each command, run one after the other in one process, to import PyTorch once."""
    code = """
import json, sys
from hvp.cli.main import main
for name, arguments in json.loads(sys.argv[1]).items():
    print(f"<<{name}>>", flush=True)
    sys.argv = ["hvp", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
    parts = re.split(r"<<(\w+)>>\n", python(copy, code, json.dumps(COMMANDS)))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_lists_the_present_methods():
    present = LIST.findall((ROOT / "methods" / "__init__.py").read_text("utf-8"))
    assert FILES[0][1].strip() == present[0].replace(")", ', "barlowtwins")')


def test_the_method_trains_with_hard_views_and_rescue(copy, outputs):
    losses = {}
    for name in ("vanilla", "hard", "rescued"):
        rows = [json.loads(row) for row in (copy / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
        assert ("kept_hist" in rows[0]) == (name == "hard")
        assert ("strong_similarity" in rows[0]) == (name == "rescued")
        losses[name] = rows[0]["loss"]
    # Same weights and images: the pairs that agree least cost more than the first ones, which are vanilla's.
    assert losses["hard"] > losses["vanilla"] != losses["rescued"]


def test_the_commands_know_the_method(copy, outputs):
    assert "a small convolutional network" in outputs["presets"]
    assert "redundancy" in outputs["config"]
    assert json.loads((copy / "knn.json").read_text())
    keys = torch.load(copy / "checkpoint.pth", weights_only=True)["model"]
    assert {"module.projector.6.weight", "module.bn.running_mean"} < keys.keys()


def test_loss_and_score_follow_their_formulas(copy):
    """Both written out with loops over features, images and views."""
    code = """
import torch
from hvp.methods import get_method
from hvp.methods.barlowtwins.barlow_twins_loss import barlow_twins_loss
from hvp.methods.barlowtwins.main_barlowtwins import build_model
from hvp.methods.barlowtwins.score import pair_losses

torch.manual_seed(0)
a, b = torch.randn(2, 5, 3)
c = [[sum(a[n, i] * b[n, j] for n in range(5)) / 5 for j in range(3)] for i in range(3)]
expected = sum((c[i][j] - 1) ** 2 if i == j else 0.1 * c[i][j] ** 2 for i in range(3) for j in range(3))
torch.testing.assert_close(barlow_twins_loss(a, b, 0.1), expected)

config = get_method("barlowtwins").config.model_validate({"model": {"arch": "convnet_micro", "proj_dim": 8}})
model = build_model(config, torch.device("cpu"))
views = torch.randn(4, 5, 3, 32, 32)
with torch.no_grad():
    losses = pair_losses(model, [views])
    z = [model.projector[:7](model.backbone(view)) for view in views]
    z = [(x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in z]
assert losses.shape == (5, 4, 4)
for n in range(5):
    for t in range(4):
        for v in range(4):
            torch.testing.assert_close(losses[n, t, v], -(z[t][n] * z[v][n]).mean())
"""
    python(copy, code)
