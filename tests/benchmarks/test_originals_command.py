"""`python -m hvp.benchmarks.originals`: its output, its exit codes, and the comparisons on real clones.

HVP_UPSTREAMS names the folder of clones.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from hvp.benchmarks.originals import get_harness
from hvp.benchmarks.originals.__main__ import command_line
from hvp.benchmarks.released import get_released, selection
from hvp.patches.patching import load_patch
from tests.benchmarks.released_standins import SIMSIAM, repository
from tests.upstreams import clone_at, clone_of


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """Run the command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["originals", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command_line()
        code = stop.value.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run


def test_an_unknown_method_is_one_message(compare):
    ran = compare("nosuch", "--upstream", "anywhere")
    assert ran.code == 2
    assert ran.err.startswith("hvp: there is no patch for nosuch. Known: dino, ")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dinov2", "ibot", "mocov3", "simclr", "simsiam"])
def test_the_patched_original_agrees_with_our_trainer(compare, method):
    """On a real clone."""
    for package in get_harness(method).needs:
        pytest.importorskip(package)
    ran = compare(method, "--upstream", clone_of(load_patch(method)))
    assert ran.code == 0, ran.out + ran.err
    assert f"{method}: 20 steps of ours and of" in ran.out


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("simsiam", [], "nothing to compare with. Give --upstream DIR, --hvp-code DIR, or both\n"),
        (
            "mocov3",
            ["--hvp-code", "."],
            "HVP's authors released no code for mocov3. They did for dino, ibot, simsiam, sim",
        ),
        (
            "dinov2",
            ["--hvp-code", "."],
            "HVP's authors released no code for dinov2. They did for dino, ibot, simsiam, sim",
        ),
        (
            "simsiam",
            ["--hvp-code", "nowhere"],
            "nowhere is not a folder. Get a clone: git clone https://github.com/automl/hvp",
        ),
    ],
)
def test_a_missing_comparison_is_one_message(compare, method, options, message):
    ran = compare(method, *options)
    assert ran.code == 2
    assert ran.err.startswith(f"hvp: {message}")
    assert ran.err.count("\n") == 1
    assert ran.out == ""


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.001, 1)])
def test_a_selection_is_compared(compare, monkeypatch, tmp_path, scale, code):
    commit, losses = repository(tmp_path / "clone", SIMSIAM), get_released("simsiam").pair_losses
    released_here = replace(get_released("simsiam"), commit=commit, pair_losses=lambda batch: scale * losses(batch))
    monkeypatch.setattr("hvp.benchmarks.released.simsiam.RELEASED", released_here)
    monkeypatch.setattr(selection, "NUM_BATCHES", 1)
    ran = compare("simsiam", "--hvp-code", tmp_path / "clone")
    assert ran.code == code
    assert f"automl/hvp at {commit[:7]}, branch main: select_crops.select_crops_cross.\n" in ran.out
    assert [line.split()[:5] for line in ran.out.splitlines() if line.startswith(" random")] == [
        ["random", "outputs", "32", "32", "0"]
    ]


@pytest.mark.parametrize("method", ["dino", "ibot", "simsiam", "simclr"])
def test_the_released_selection_agrees_with_ours(compare, method):
    """On a real clone."""
    ran = compare(method, "--hvp-code", clone_at(selection.REPOSITORY, "hvpcode"))
    assert ran.code == 0, ran.out + ran.err
    rows = {line.split("outputs")[0].strip(): line.split("outputs")[1].split() for line in ran.out.splitlines()[2:4]}
    assert rows.keys() == {"random", "network"}
    for name, images in (("random", 256), ("network", 64)):
        assert rows[name][0] == str(images)
        assert int(rows[name][1]) >= images - 1


@pytest.mark.parametrize(
    ("method", "name", "wrong"),
    [("simclr", "TEMPERATURE", 0.11), ("ibot", "WEIGHTS", {"lambda1": 1.0, "lambda2": 0.6}), ("dino", "EPOCH", 6)],
)
def test_another_value_in_our_loss_is_detected(compare, monkeypatch, method, name, wrong):
    """On a real clone. Only our value changes: the released code runs in a process of its own."""
    clone = clone_at(selection.REPOSITORY, "hvpcode")
    monkeypatch.setattr(f"hvp.benchmarks.released.{method}.{name}", wrong)
    assert compare(method, "--hvp-code", clone).code == 1
