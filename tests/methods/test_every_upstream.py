"""Every method's checkpoints convert to its upstream's layout and back without loss, and runs continue from them."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.common.config.resolving import leaf_keys
from hvp.common.convert.report import Converted
from hvp.common.convert.runs import differences, write_run
from hvp.common.convert.training_checkpoints import from_upstream, to_upstream
from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.training.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from hvp.common.training.optimizers import build_optimizer
from hvp.methods import METHODS, get_method
from tests.methods.test_every_method import config_of, leaves, train

STEPS_PER_EPOCH = 4

RESUMABLE = tuple(name for name in METHODS if name != "dinov2")
"""Methods whose upstream does not save FSDP shards."""

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in RESUMABLE),
    ("dino", {"model.use_bn_in_head": True, "model.norm_last_layer": False}),
    ("ibot", {"model.shared_head": True}),
    ("ibot", {"model.shared_head": False}),
    ("simsiam", {"optim.fix_pred_lr": True, "model.projector_bias": True}),
    ("simsiam", {"optim.fix_pred_lr": False, "model.projector_bias": False}),
    ("simclr", {"optim.optimizer": "lars"}),
    ("simclr", {"optim.optimizer": "sgd"}),
    ("mocov3", {"model.arch": "convnet_micro", "optim.optimizer": "lars"}),
]


def checkpoint_of(name: str, changes: dict[str, Any], seed: int, *, fp16: bool = False) -> dict[str, Any]:
    """Make a checkpoint with random weights and moments; a quarter of the parameters was never trained."""
    torch.manual_seed(seed)
    config: Any = config_of(name, changes)
    layout = get_method(name).upstream_layout(config)
    parts = {part.ours: random_like(part.module.state_dict(keep_vars=True)) for part in layout.parts}
    trained = layout.optimizer.ours if layout.optimizer else [{"params": layout.parts[1].module.parameters()}]
    groups = [{**g, "params": [torch.nn.Parameter(torch.randn(p.shape)) for p in g["params"]]} for g in trained]
    optimizer = build_optimizer(config.optim.optimizer, groups)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.01
        for p in group["params"]:
            p.grad = torch.randn_like(p) if torch.rand(()) < 0.75 else None
    optimizer.step()
    scaler = {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    return {
        "method": name,
        "config": config.model_dump(mode="json"),
        "step": STEPS_PER_EPOCH,
        "epoch": 1,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "precision": {"scaler": scaler if fp16 else {}, "skipped_steps": 0},
        "processes": [{"torch": torch.get_rng_state(), "cuda": None, "skipped": []}],
        "optimizer": optimizer.state_dict(),
        **parts,
    }


def random(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Random weights of moderate size, positive vectors, which may be variances, or counts."""
    if not dtype.is_floating_point:
        return torch.randint(0, 99, size, dtype=dtype)
    return torch.randn(size, dtype=dtype) * 0.05 if len(size) > 1 else torch.rand(size, dtype=dtype) + 0.5


def random_like(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random values for a state dict on the meta device; shared tensors stay shared."""
    values: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in values:
            values[id(tensor)] = random(tensor.shape, tensor.dtype)
    return {key: values[id(tensor)] for key, tensor in state.items()}


def through_a_file(content: Any, path: Path) -> Any:
    torch.save(content, path)
    return torch.load(path, weights_only=True)


def there_and_back(name: str, changes: dict[str, Any], checkpoint: dict[str, Any], path: Path) -> Converted:
    layout = get_method(name).upstream_layout(config_of(name, changes))
    theirs = to_upstream(checkpoint, layout, "last.pt").content
    fp16 = bool(checkpoint["precision"]["scaler"])
    return from_upstream(through_a_file(theirs, path), layout, "up.pth", fp16=fp16)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32), fp16=st.booleans(), number=st.sampled_from(range(len(CASES))))
def test_random_checkpoints_survive_the_round_trip(seed: int, fp16: bool, number: int, tmp_path_factory: Any) -> None:
    check_round_trip(*CASES[number], seed=seed, fp16=fp16, path=tmp_path_factory.mktemp("a") / "up.pth")


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_configuration_survives_the_round_trip(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(name, changes, seed=0, fp16=False, path=tmp_path / "up.pth")


def check_round_trip(name: str, changes: dict[str, Any], *, seed: int, fp16: bool, path: Path) -> None:
    checkpoint = checkpoint_of(name, changes, seed, fp16=fp16)
    back = there_and_back(name, changes, checkpoint, path).content
    assert back["epoch"] == checkpoint["epoch"]
    parts = [part.ours for part in get_method(name).upstream_layout(config_of(name, changes)).parts]
    for entry in parts:
        assert list(back[entry]) == list(checkpoint[entry])
    expected = {entry: checkpoint[entry] for entry in parts} | {"state": checkpoint["optimizer"]["state"]}
    found = dict(leaves({entry: back[entry] for entry in parts} | {"state": back["optimizer"]["state"]}))
    for where, value in leaves(expected):
        assert torch.equal(found.pop(where), value), where
    assert not found
    for ours, again in zip(checkpoint["optimizer"]["param_groups"], back["optimizer"]["param_groups"], strict=True):
        # the trainer sets lr and weight decay before every step
        assert {**again, "lr": 0.1, "weight_decay": 0.01} == ours
    if name != "simsiam":  # its upstream has no gradient scaler
        assert back["precision"] == checkpoint["precision"]


@pytest.mark.parametrize("name", RESUMABLE)
def test_every_tensor_is_accounted_for(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, {}, 1)
    layout = get_method(name).upstream_layout(config_of(name, {}))
    there = to_upstream(checkpoint, layout, "last.pt")
    back = from_upstream(there.content, layout, "up.pth", fp16=False)
    for source, fates in ((checkpoint, there.fates), (there.content, back.fates)):
        tensors = [value for _, value in leaves(source) if isinstance(value, torch.Tensor)]
        assert sum(fate.tensors for fate in fates) == len(tensors)
        assert sum(fate.numbers for fate in fates) == sum(tensor.numel() for tensor in tensors)
    assert {fate.group for fate in there.fates if fate.became == "left out"} == {"processes"}
    assert not [fate for fate in back.fates if fate.became == "left out"]


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_run_continues_bit_for_bit_after_the_round_trip(name: str, tmp_path: Path) -> None:
    """Stochastic depth is off: the upstream does not save the random state that it needs."""
    changes: dict[str, Any] = {"train.keep_every": 1}
    if "model.drop_path_rate" in leaf_keys(get_method(name).config):
        changes["model.drop_path_rate"] = 0.0
    whole = train(name, tmp_path / "whole", changes)
    config = config_of(name, changes)
    layout = get_method(name).upstream_layout(config)
    theirs = to_upstream(load_checkpoint(whole.out / "epoch0001.pt"), layout, "epoch0001.pt").content
    torch.save(theirs, tmp_path / "up.pth")
    write_run(tmp_path / "up.pth", name, config, layout, tmp_path / "back", overwrite=False)
    again = train(name, tmp_path / "back", changes, resume=True)
    assert again.rows == whole.rows[STEPS_PER_EPOCH:]
    first, second = whole.state, again.state
    for state in (first, second):
        del state["processes"]
    found = dict(leaves(second))
    for where, value in leaves(first):
        other = found.pop(where)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, where
    assert not found


@pytest.mark.parametrize("name", METHODS)
def test_an_upstream_checkpoint_is_evaluated_like_ours(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, {}, 2)
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    layout = get_method(name).upstream_layout(config_of(name, {}))
    torch.save(to_upstream(checkpoint, layout, "last.pt").content, tmp_path / "up.pth")
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = (load_encoder(tmp_path / file)[0] for file in ("last.pt", "up.pth"))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RESUMABLE])
def test_a_checkpoint_for_evaluation_only_is_complete_but_refused_for_runs(name: str) -> None:
    """Every network is there, and every tensor has a name of its own."""
    checkpoint = checkpoint_of(name, {}, 9)
    layout = get_method(name).upstream_layout(config_of(name, {}))
    there = to_upstream(checkpoint, layout, "last.pt")
    for part in layout.parts:
        for key, value in checkpoint[part.ours].items():
            assert torch.equal(there.content[part.theirs][part.their_key(key)], value)
    own = {entry for part in layout.parts for entry in [part.ours]}
    names = sum(len(checkpoint[entry]) for entry in own)
    assert sum(len(there.content[entry]) for entry in {part.theirs for part in layout.parts} - own) == names
    left_out = {fate.group for fate in there.fates if fate.became == "left out"}
    assert left_out == {"optimizer", "processes"}
    with pytest.raises(UserError, match=r"up\.pth: no run can continue from a checkpoint of .* FSDP"):
        from_upstream(there.content, layout, "up.pth", fp16=False)


def broken(content: dict[str, Any], how: str) -> dict[str, Any]:
    """Break one thing in a DINO checkpoint of the upstream."""
    content = {**content, "student": dict(content["student"]), "optimizer": {**content["optimizer"]}}
    if how == "no optimizer":
        del content["optimizer"]
    elif how == "no epoch":
        del content["epoch"]
    elif how == "missing tensor":
        del content["student"]["module.backbone.norm.weight"]
    elif how == "left over tensor":
        content["student"]["module.backbone.fc.weight"] = torch.zeros(1)
    elif how == "left over entry":
        content["queue"] = torch.zeros(2, 2)
    elif how == "other width":
        content["student"]["module.head.mlp.0.weight"] = torch.zeros(3, 3)
    elif how == "no weights":
        content["student"] = {"module.backbone.norm.weight": 3.0}
    elif how == "other groups":
        content["optimizer"]["param_groups"] = content["optimizer"]["param_groups"][:1]
    elif how == "other betas":
        first, second = content["optimizer"]["param_groups"]
        content["optimizer"]["param_groups"] = [{**first, "betas": (0.9, 0.95)}, second]
    elif how == "moments with another shape":
        state = content["optimizer"]["state"]
        number = next(iter(state))
        content["optimizer"]["state"] = {**state, number: {**state[number], "exp_avg": torch.zeros(7)}}
    elif how == "twice":
        content["student"]["backbone.norm.weight"] = content["student"]["module.backbone.norm.weight"] + 1
    elif how == "no moments":
        content["optimizer"] = {"state": None}
    elif how == "ours":
        content["format"] = FORMAT
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no optimizer", r"up\.pth: has no optimizer; it has: student, teacher"),
        ("no epoch", "does not say how many epochs"),
        ("missing tensor", r"missing \(1\): backbone\.norm\.weight"),
        ("left over tensor", r"left over \(1\): backbone\.fc\.weight"),
        ("left over entry", "1 tensors have no place in the result: queue"),
        ("other width", r"head\.mlp\.0\.weight \[3, 3\] instead of"),
        ("no weights", "its entry student holds values other than weights"),
        ("other groups", "its optimiser has groups of"),
        ("other betas", r"betas = \(0\.9, 0\.95\), but adamw has \(0\.9, 0\.999\) here"),
        ("moments with another shape", "exp_avg of parameter 0 has another shape"),
        ("twice", r"its entry student holds backbone\.norm\.weight with and without module\."),
        ("no moments", "its entry optimizer is not an optimiser's state"),
        ("ours", "is a checkpoint of hvp already"),
    ],
)
def test_broken_checkpoints_are_refused(how: str, message: str) -> None:
    checkpoint = checkpoint_of("dino", {}, 3)
    checkpoint["optimizer"]["state"][0] = {"exp_avg": torch.zeros_like(checkpoint["student"]["backbone.cls_token"])}
    layout = get_method("dino").upstream_layout(config_of("dino", {}))
    content = broken(to_upstream(checkpoint, layout, "last.pt").content, how)
    with pytest.raises(UserError, match=message):
        from_upstream(content, layout, "up.pth", fp16=False)


def test_separate_heads_are_not_loaded_as_a_shared_one() -> None:
    """A separate patch head has the same names and shapes as a shared one."""
    separate, shared = ({"model.shared_head": on} for on in (False, True))
    checkpoint = checkpoint_of("ibot", separate, 4)
    content = to_upstream(checkpoint, get_method("ibot").upstream_layout(config_of("ibot", separate)), "").content
    layout = get_method("ibot").upstream_layout(config_of("ibot", shared))
    with pytest.raises(UserError, match=r"different head\.last_layer2\.weight_[gv] and head\.last_layer\.weight_[gv]"):
        from_upstream(content, layout, "up.pth", fp16=False)


def test_a_parameter_trained_there_but_fixed_here_is_refused() -> None:
    trained, fixed = ({"model.norm_last_layer": on} for on in (False, True))
    checkpoint = checkpoint_of("dino", trained, 5)
    content = to_upstream(checkpoint, get_method("dino").upstream_layout(config_of("dino", trained)), "").content
    with pytest.raises(UserError, match="its optimiser has groups of"):
        from_upstream(content, get_method("dino").upstream_layout(config_of("dino", fixed)), "up.pth", fp16=False)


def test_gradient_scaler() -> None:
    layout = get_method("dino").upstream_layout(config_of("dino", {}))
    with_scaler = to_upstream(checkpoint_of("dino", {}, 6, fp16=True), layout, "").content
    assert with_scaler["fp16_scaler"]["scale"] == 1024.0
    without = to_upstream(checkpoint_of("dino", {}, 6), layout, "").content
    assert "fp16_scaler" not in without
    dropped = from_upstream(with_scaler, layout, "", fp16=False)
    assert dropped.content["precision"]["scaler"] == {}
    assert "fp16_scaler is left out: train.precision is not fp16 here" in dropped.notes
    fresh = from_upstream(without, layout, "", fp16=True)
    assert fresh.content["precision"]["scaler"]["scale"] == 65536.0
    assert "the file has no gradient scaler: fp16 starts with a new one" in fresh.notes


def test_notes_for_the_user() -> None:
    layout = get_method("dino").upstream_layout(config_of("dino", {}))
    checkpoint = checkpoint_of("dino", {}, 7) | {"step": STEPS_PER_EPOCH + 1}
    assert any("step 5 is 1 of 4 steps into epoch 1" in note for note in to_upstream(checkpoint, layout, "").notes)
    assert any("no network like vit_micro" in note for note in layout.notes)
    content = to_upstream(checkpoint, layout, "").content | {"total_time": 3}
    assert "left out, as nothing here reads it: total_time" in from_upstream(content, layout, "", fp16=False).notes


def test_a_different_weight_decay_is_noted() -> None:
    """SimSiam's is constant; DINO's follows a schedule."""
    for name, number in (("simsiam", 1), ("dino", 0)):
        layout = get_method(name).upstream_layout(config_of(name, {"optim.weight_decay": 0.0005}))
        notes = from_upstream(
            to_upstream(checkpoint_of(name, {}, 10), layout, "").content, layout, "", fp16=False
        ).notes
        note = "the upstream trained with weight decay 0.01, the run continues with 0.0005"
        assert notes.count(note) == number


def test_arguments_that_differ_are_listed() -> None:
    config = config_of("dino", {"optim.base_lr": 0.5, "views.global_crops_scale": [0.4, 1.0]})
    args = argparse.Namespace(lr=0.0005, epochs=2, global_crops_scale=(0.4, 1.0), output_dir="elsewhere")
    assert differences(args, config) == [
        "the upstream trained with base_lr = 0.0005, the run continues with optim.base_lr = 0.5"
    ]
    assert differences(None, config) == []


def test_a_run_is_written_only_to_a_free_folder(tmp_path: Path) -> None:
    config = config_of("simsiam", {})
    layout = get_method("simsiam").upstream_layout(config)
    content = to_upstream(checkpoint_of("simsiam", {}, 8), layout, "").content
    torch.save(content, tmp_path / "up.pth")
    torch.save({**content, "epoch": 3}, tmp_path / "longer.pth")
    with pytest.raises(UserError, match=r"3 epochs are finished, but train\.epochs = 2"):
        write_run(tmp_path / "longer.pth", "simsiam", config, layout, tmp_path / "run", overwrite=False)
    assert not (tmp_path / "run").exists()
    run = tmp_path / "run"
    write_run(tmp_path / "up.pth", "simsiam", config, layout, run, overwrite=False)
    torch.save(content, run / "up.pth")
    with pytest.raises(UserError, match=r"up\.pth: lies in .*, which the new run would replace"):
        write_run(run / "up.pth", "simsiam", config, layout, run, overwrite=True)
    assert (run / "up.pth").exists()
    write_run(tmp_path / "up.pth", "simsiam", config, layout, run, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "config.yaml",
        "last.pt",
        "last.pt.meta.json",
        "run.json",
    ]
    shutil.rmtree(run)
    run.mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="run: is not empty"):
        write_run(tmp_path / "up.pth", "simsiam", config, layout, tmp_path / "run", overwrite=False)
    with pytest.raises(UserError, match="holds files but no run"):
        write_run(tmp_path / "up.pth", "simsiam", config, layout, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()
