"""Every tensor is accounted for; results are written completely, with a description, and replace nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvp.common.convert.report import Account, Converted, Fate, claim, saver, write
from hvp.common.errors import UserError
from hvp.common.evaluation.descriptions import META

A, B, C = torch.zeros(2, 3), torch.zeros(4), torch.zeros(5)
CONTENT = {"student": {"module.backbone.a": A, "module.head.b": B}, "optimizer": {"state": [{"c": C}]}, "epoch": 3}


def test_tensors_are_settled_by_place_and_by_identity() -> None:
    account = Account(CONTENT, "x.pth")
    account.settle("renamed", only=[A], to="backbone")
    account.settle("left out", ("student",), why="a head")
    account.settle("kept", ("optimizer",), to="optimizer")
    assert account.close() == [
        Fate("student.backbone", 1, 6, "renamed", "backbone"),
        Fate("student.head", 1, 4, "left out", "", "a head"),
        Fate("optimizer", 1, 5, "kept", "optimizer"),
    ]


def test_a_tensor_is_settled_once() -> None:
    account = Account({"a": A, "b": A}, "x.pth")
    account.settle("kept")
    account.settle("left out", why="twice")
    assert [(fate.group, fate.tensors, fate.became) for fate in account.close()] == [("weights", 2, "kept")]


def test_a_tensor_that_is_not_accounted_for_is_refused() -> None:
    account = Account(CONTENT, "x.pth")
    account.settle("kept", ("student",))
    with pytest.raises(UserError, match=r"x\.pth: 1 tensors have no place in the result: optimizer\.state\.0\.c$"):
        account.close()


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    source, out = tmp_path / "last.pt", tmp_path / "out.pth"
    source.touch()
    claim(out, source, overwrite=False)
    for there in (out, tmp_path / f"out.pth{META}"):
        there.touch()
        with pytest.raises(UserError, match=f"{there.name}: exists"):
            claim(out, source, overwrite=False)
        claim(out, source, overwrite=True)
        there.unlink()
    with pytest.raises(UserError, match="is the file to convert"):
        claim(tmp_path / "a" / ".." / "last.pt", source, overwrite=True)
    with pytest.raises(UserError, match="there is no folder"):
        claim(tmp_path / "nowhere" / "out.pth", source, overwrite=True)
    out.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        claim(out, source, overwrite=True)


def test_suffixes_of_file_names(tmp_path: Path) -> None:
    for name, state_dict, only_safetensors, allowed in [
        ("a.pth", True, False, True),
        ("a.safetensors", True, False, True),
        ("a.safetensors", False, False, False),
        ("a.pth.tar", False, False, True),
        ("a.pth", True, True, False),
        ("a", False, False, False),
        ("a.json", True, False, False),
    ]:
        if allowed:
            saver(tmp_path / name, state_dict=state_dict, only_safetensors=only_safetensors)
        else:
            with pytest.raises(UserError, match="must end in"):
                saver(tmp_path / name, state_dict=state_dict, only_safetensors=only_safetensors)


def test_tensor_views_are_copied(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory or are not contiguous."""
    source, out = tmp_path / "last.pt", tmp_path / "out.safetensors"
    source.touch()
    whole = torch.arange(6.0).reshape(2, 3)
    converted = Converted({"a": whole.T, "b": whole[0]}, [], {"layout": "timm"}, ["a note"])
    write(converted, source, out, saver(out, state_dict=True))
    found = load_file(out)
    assert torch.equal(found["a"], whole.T)
    assert torch.equal(found["b"], whole[0])
    about = json.loads((tmp_path / f"out.safetensors{META}").read_text())
    assert (about["format"], about["layout"], about["notes"]) == ("hvp-conversion", "timm", ["a note"])
