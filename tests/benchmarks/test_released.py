"""Comparison of our selection with that of HVP's authors, on a repository of stand-ins for their code."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.benchmarks.released import get_released
from hvp.benchmarks.released import selection as released
from hvp.benchmarks.released.selection import Agreement, Released, compare_selection
from hvp.common.errors import UserError
from hvp.methods import get_method
from tests.benchmarks.released_standins import SIMSIAM, STANDINS, repository

RANDOM, NETWORK = "random outputs", "network outputs"


@pytest.fixture(autouse=True)
def _fewer_batches(monkeypatch):
    monkeypatch.setattr(released, "NUM_BATCHES", 2)


def compare_with(
    folder: Path, files: Mapping[str, str], method: str = "simsiam", **changed: Any
) -> dict[str, Agreement]:
    released_here: Released = replace(get_released(method), branch="other", commit=repository(folder, files), **changed)
    return compare_selection(released_here, get_method(method), folder)


# Each case starts a process that imports PyTorch, so `make test` runs one method with two views and one with crops.
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in ("simsiam", "dino") else pytest.mark.slow) for name in STANDINS]
)
def test_a_faithful_selection_agrees(tmp_path, method):
    found = compare_with(tmp_path / "clone", STANDINS[method], method)
    assert list(found) == [RANDOM, NETWORK]
    for part in found.values():
        assert part.agrees
        assert part.images == 64
        assert part.equal + part.ties == 64
        assert part.close <= 2
    assert [path.name for path in (tmp_path / "clone").iterdir()] == [".git"]  # nothing is checked out


@pytest.mark.slow
def test_a_thousandth_of_a_loss_is_more_than_rounding(tmp_path):
    losses = get_released("simsiam").pair_losses
    found = compare_with(tmp_path / "clone", SIMSIAM, pair_losses=lambda batch: 1.001 * losses(batch))
    for part in found.values():
        assert part.equal == 64
        assert part.loss > 1e-4
        assert not part.agrees


def test_an_easiest_selection_does_not_agree(tmp_path):
    files = {
        **SIMSIAM,
        "select_crops.py": SIMSIAM["select_crops.py"].replace("pick(images, -alike", "pick(images, alike"),
    }
    part = compare_with(tmp_path / "clone", files)[RANDOM]
    assert part.equal == 0
    assert not part.agrees


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("return one, other, chosen", "return one.flip(0), other.flip(0), chosen"),
        ("return one, other, chosen", "return one, other, chosen.flip(0)"),
    ],
    ids=["views of other images", "views other than reported"],
)
def test_the_returned_views_must_be_the_selected_ones(tmp_path, line, instead):
    files = {**SIMSIAM, "select_crops.py": SIMSIAM["select_crops.py"].replace(line, instead)}
    part = compare_with(tmp_path / "clone", files)[RANDOM]
    assert part.equal == 0
    assert part.loss < 1e-6
    assert not part.agrees


def two_views_alike(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: part[[0, 1, 2, 2]] for name, part in get_released("simsiam").random(generator).items()}


@pytest.mark.slow
def test_a_tie_may_be_decided_either_way(tmp_path):
    last = SIMSIAM["pick.py"].replace("score.argmax(0)", "len(score) - 1 - score.flip(0).argmax(0)")
    part = compare_with(tmp_path / "clone", {**SIMSIAM, "pick.py": last}, random=two_views_alike)[RANDOM]
    assert part.ties > 10
    assert part.equal == 64 - part.ties
    assert part.close == part.ties
    assert part.agrees


@pytest.mark.slow
def test_the_third_best_is_not_a_tie(tmp_path):
    third = SIMSIAM["pick.py"].replace("score.argmax(0)", "score.argsort(0)[-3]")
    part = compare_with(tmp_path / "clone", {**SIMSIAM, "pick.py": third}, random=two_views_alike)[RANDOM]
    assert part.close > 10
    assert part.equal == part.ties == 0
    assert not part.agrees


def test_the_error_of_the_released_code_is_shown(tmp_path):
    files = {**SIMSIAM, "select_crops.py": "raise RuntimeError('no luck')"}
    with pytest.raises(UserError, match=r"(?s)the released code exited with code 1.*RuntimeError: no luck"):
        compare_with(tmp_path / "clone", files)


def test_a_clone_without_the_commit_is_one_message(tmp_path):
    repository(tmp_path / "clone", SIMSIAM)
    with pytest.raises(UserError) as caught:
        compare_selection(get_released("dino"), get_method("dino"), tmp_path / "clone")
    assert str(caught.value) == (
        f"{tmp_path}/clone does not have commit c1c435fe6fdb of automl/hvp, branch dino. Get it: "
        f"git -C {tmp_path}/clone fetch https://github.com/automl/hvp dino"
    )


def test_a_folder_inside_a_clone_is_accepted(tmp_path):
    """The whole commit is written, although git would archive only that folder."""
    commit = repository(tmp_path / "clone", SIMSIAM)
    (tmp_path / "clone" / "inner").mkdir()
    released_here = replace(get_released("simsiam"), commit=commit)
    released.check_out(released_here, tmp_path / "clone" / "inner", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pick.py", "select_crops.py"]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "is not a folder"), ("plain", "cannot be read as a git repository")]
)
def test_a_folder_that_is_not_a_clone_is_one_message(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=f"{name} {message}.*git clone https://github.com/automl/hvp DIR"):
        compare_selection(get_released("dino"), get_method("dino"), tmp_path / name)


def test_missing_git_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot start git"):
        released.check_out(get_released("dino"), tmp_path, tmp_path / "out")
