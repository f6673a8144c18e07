"""`hvp demo`: a short one that must write all files, and the real one, which must learn."""

import json
import shlex
import sys
from contextlib import suppress

import pytest
from PIL import Image

from hvp.cli import options
from hvp.cli.main import main

SHORT = [
    *("data.shapes.train=40", "data.shapes.val=20", "data.shapes.size=32", "data.workers=0"),
    *("train.epochs=1", "train.batch_size=8"),
]


def demo(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hvp", "demo", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    return json.loads((folder / "demo" / "results.json").read_text())


@pytest.mark.parametrize("vanilla", [False, True])
def test_a_short_demo_writes_all_files_and_can_be_repeated(monkeypatch, tmp_path, capsys, vanilla):
    monkeypatch.setattr(
        "hvp.cli.demo.resolve_flags",
        lambda method, preset, config, flags, _: options.resolve_flags(method, preset, config, flags, SHORT),
    )
    arguments = ["--vanilla"] if vanilla else []
    first = demo(monkeypatch, tmp_path, *arguments)
    again = demo(monkeypatch, tmp_path, *arguments)
    assert first["gain"] == again["gain"]
    assert first["gain"]["knn_top1"] == pytest.approx(first["trained"]["knn_top1"] - first["untrained"]["knn_top1"])
    assert (tmp_path / "demo" / "run" / "last.pt").exists()
    out = capsys.readouterr().out
    assert ("Selection starts after" in out) is not vanilla
    # the demo's remarks on its encoder are true
    convert = shlex.split(next(line for line in out.splitlines() if "hvp convert" in line).partition("hvp ")[2])
    monkeypatch.setattr(sys, "argv", ["hvp", *convert])
    with suppress(SystemExit):
        main()
    assert (tmp_path / "demo" / "backbone.safetensors").exists()
    for library in ("timm", "torchvision"):
        assert "timm and torchvision have none like it" in out
        monkeypatch.setattr(sys, "argv", ["hvp", "convert", "demo/run", "--to", library, "--out", "x.pth"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert f"{library} has no network like this one" in capsys.readouterr().err
    picture = tmp_path / "demo" / "selection.png"
    assert picture.exists() is not vanilla
    if not vanilla:
        assert Image.open(picture).size[0] > 1000


@pytest.mark.slow
def test_the_demo_learns(monkeypatch, tmp_path):
    result = demo(monkeypatch, tmp_path)
    assert result["gain"]["knn_top1"] >= 20
    assert result["gain"]["linear_top1"] >= 10
