"""Checkpoints with wrong content or damaged bytes: each is used correctly, or refused with a message that names it."""

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.training.checkpoint import load_checkpoint, save_checkpoint
from tests.faults.fuzzing import EXAMPLES, examples, hvp, named

METHODS = ("dino", "simclr") if EXAMPLES else ("dino",)
SMALL = (
    *("--preset", "tiny", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--save-every", "1"),
    *("--set", "data.shapes.train=8", "--set", "data.shapes.val=8", "--set", "data.shapes.size=32"),
)
OWN = {
    "dino": ("--set", "optim.warmup_epochs=0", "--set", "model.head_hidden_dim=16"),
    "simclr": ("--set", "optim.warmup_epochs=0", "--set", "model.proj_hidden_dim=16"),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch warns about the unusual tensors used as damage

Place = tuple[Any, ...]
"""Keys and indices that lead to a value in nested containers."""


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory) -> Path:
    """A run of two steps, with its checkpoints of both."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    code, said = hvp("pretrain", request.param, *SMALL, *OWN[request.param], "--out", out)
    assert code == 0, said
    (out / "step1.pt").write_bytes((out / "previous.pt").read_bytes())
    (out / "step2.pt").write_bytes((out / "last.pt").read_bytes())
    return out


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def mapping_of_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = value
    return value


REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "None": lambda old: None,
    "text": lambda old: "\x00[/]\N{SNOWMAN}",
    "bytes": lambda old: b"x",
    "nan": lambda old: math.nan,
    "infinity": lambda old: math.inf,
    "minus one": lambda old: -1,
    "huge": lambda old: 2**70,
    "true": lambda old: True,
    "empty list": lambda old: [],
    "empty mapping": lambda old: {},
    "tuple": lambda old: (old,),
    "list of itself": lambda old: itself(),
    "mapping of itself": lambda old: mapping_of_itself(),
    "number for a key": lambda old: {1: old},
    "scalar": lambda old: torch.tensor(1.0),
    "empty tensor": lambda old: torch.empty(0),
    "sparse": lambda old: torch.eye(3).to_sparse(),
    "compressed": lambda old: torch.eye(3).to_sparse_csr(),
    "meta": lambda old: torch.empty(3, device="meta"),
    "other shape": lambda old: old.unsqueeze(0) if isinstance(old, torch.Tensor) else torch.zeros(2, 3),
    "other type": lambda old: old.to(torch.complex64) if isinstance(old, torch.Tensor) else str(old),
    "quantized": lambda old: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse like it": lambda old: old.to_sparse() if isinstance(old, torch.Tensor) and old.ndim else None,
    "meta like it": lambda old: old.to("meta") if isinstance(old, torch.Tensor) else None,
    "expanded": lambda old: torch.zeros(()).expand(10**6, 10**6),
}
"""Replacements for a value, by description."""


def places(value: Any, place: Place = (), deepest: int = 5) -> Iterator[Place]:
    """Yield the places of all values in nested containers, outermost first."""
    if len(place) >= deepest or not isinstance(value, dict | list | tuple):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*place, key)
        yield from places(item, (*place, key), deepest)


def mutated(content: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """Return the content with one to three values removed or replaced, at any level with equal probability."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        depth = data.draw(st.integers(1, 5))
        at_depth = [place for place in places(content) if len(place) == depth]
        if not at_depth:
            continue
        *parents, key = data.draw(st.sampled_from(at_depth))
        container: Any = content
        for parent in parents:
            container = container[parent]
        what = data.draw(st.sampled_from(["removed", *REPLACEMENTS]))
        if isinstance(container, tuple):
            continue
        if what == "removed":
            del container[key]
        else:
            container[key] = REPLACEMENTS[what](container[key])
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint as hvp does, so that only the content is wrong; if hvp cannot, as PyTorch does."""
    try:
        save_checkpoint(path, content)
    except Exception:  # content that no run would have
        torch.save(content, path)


def copy_of(run: Path, folder: Path) -> Path:
    """Return a copy of a run that a test may damage."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("tensorboard", "step*.pt"))
    return out


def same(one: Path, other: Path) -> bool:
    """Return whether the networks in two checkpoints are equal."""
    contents = [torch.load(path, map_location="cpu", weights_only=True) for path in (one, other)]
    networks = [
        {key: content[key] for key in ("student", "teacher", "model") if key in content} for content in contents
    ]
    return networks[0].keys() == networks[1].keys() and all(
        torch.equal(value, networks[1][name][key])
        for name, state in networks[0].items()
        for key, value in state.items()
    )


@examples(10)
@given(data=st.data())
def test_wrong_content_is_refused_by_resume(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    out = copy_of(run, tmp_path)
    write(out / "last.pt", mutated(load_checkpoint(run / "step1.pt"), data))
    (out / "previous.pt").unlink()
    code, said = hvp("resume", out)
    assert code in (0, 2), said
    assert "weights_only" not in said


@examples(10)
@given(data=st.data())
def test_wrong_content_is_refused_by_evaluation(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "checkpoint.pt"
    write(path, mutated(load_checkpoint(run / "step2.pt"), data))
    with named(path):
        load_encoder(path)


@examples(10)
@given(data=st.data(), to=st.sampled_from(["upstream", "timm", "torchvision", "safetensors"]))
def test_wrong_content_is_refused_by_conversion(run: Path, tmp_path: Path, data: st.DataObject, to: str) -> None:
    path = tmp_path / "checkpoint.pt"
    write(path, mutated(load_checkpoint(run / "step2.pt"), data))
    code, said = hvp("convert", path, "--to", to, "--out", tmp_path / "converted.safetensors", "--overwrite")
    assert code in (0, 2), said


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Return the bytes of a file with some damage."""
    kind = data.draw(st.sampled_from(["flipped", "zeroed", "truncated", "lengthened", "repeated"]))
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.sampled_from([1, 16, 512, 4096]))
    changed = bytearray(content)
    if kind == "flipped":
        changed[start] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "zeroed":
        changed[start : start + length] = bytes(len(changed[start : start + length]))
    elif kind == "truncated":
        del changed[start:]
    elif kind == "lengthened":
        changed += bytes(length)
    else:
        changed[start:start] = changed[start : start + length]
    return bytes(changed)


@examples(10)
@given(data=st.data())
def test_damage_never_reaches_the_weights_of_a_run(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    out = copy_of(run, tmp_path)
    (out / "last.pt").write_bytes(damaged((run / "step1.pt").read_bytes(), data))
    (out / "previous.pt").unlink()
    code, said = hvp("resume", out)
    assert code in (0, 2), said
    assert "weights_only" not in said
    if code == 0:
        assert same(out / "last.pt", run / "step2.pt"), "damage went unnoticed"


@examples(10)
@given(data=st.data())
def test_damage_never_reaches_an_evaluation(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damaged((run / "step2.pt").read_bytes(), data))
    with named(path):
        encoder, _ = load_encoder(path)
        whole = load_encoder(run / "step2.pt")[0].state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in encoder.state_dict().items())
