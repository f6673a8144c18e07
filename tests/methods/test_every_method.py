"""Behaviour of every trainer, on 32 tiny images: 8 steps of 8 images, all of which select unless configured otherwise.

Each method's own behaviour is tested in its folder.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvp.common.config.resolving import leaf_keys, read_yaml, resolve
from hvp.common.config.sections import RunConfig
from hvp.common.data import open_dataset
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.evaluation.knn import evaluate_knn
from hvp.common.training import loading, rescuing, step
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.run import Run
from hvp.common.views import first_views
from hvp.methods import METHODS, get_method
from tests import runs
from tests.processes import as_rank, start_two
from tests.runs import Trained, killed_at, rows_of, tiny

STEPS, STEPS_PER_EPOCH = 8, 4
SMALL = {**runs.SMALL, "data.shapes.train": 32, "data.shapes.val": 16, "train.epochs": 2}
# Stochastic depth makes a step draw random numbers.
OWN: dict[str, dict[str, Any]] = {
    "dino": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.1},
    "ibot": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.1, "masks.pred_ratio_var": [0.0, 0.1]},
    "simclr": {"optim.warmup_epochs": 1},
    "mocov3": {"optim.warmup_epochs": 1, "selection.hard_views": "hvp", "rescue.enabled": False},
    "dinov2": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.3},
}
"""Settings that a `tiny` preset needs for so short a run."""


def as_many_as_kept(name: str) -> dict[str, Any]:
    """Candidates as few as the views that are trained on."""
    slots = config_of(name, {}).view_slots()
    if "selection.candidates" in leaf_keys(get_method(name).config):
        return {"selection.candidates": slots[0].kept}
    return {"selection.global_candidates": slots[0].kept, "selection.local_candidates": slots[-1].kept}


def values_of(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL, **OWN.get(name, {}), **changes}


def config_of(name: str, changes: dict[str, Any]) -> RunConfig:
    config: RunConfig = tiny(get_method(name).config, name, values_of(name, changes))
    return config


def train(name: str, out: Path, changes: dict[str, Any], *, resume: bool = False) -> Trained:
    return runs.train(name, config_of(name, changes), out, resume=resume)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and numbers in nested containers, with their places."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def assert_same(a: Trained, b: Trained) -> None:
    """Compare networks, optimiser, random numbers and log bit for bit."""
    ours, theirs = dict(leaves(a.state)), dict(leaves(b.state))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        equal = torch.equal(value, theirs[path]) if isinstance(value, torch.Tensor) else value == theirs[path]
        assert equal, path
    assert a.rows == b.rows


def weights_differ(a: Trained, b: Trained) -> bool:
    theirs = dict(leaves(b.state))
    return any(
        not torch.equal(value, theirs[path])
        for path, value in leaves(a.state)
        if path.endswith(".weight") and isinstance(value, torch.Tensor)
    )


def stopped_after(step: int, name: str, out: Path, changes: dict[str, Any], *, resume: bool = False) -> None:
    """Train with a checkpoint after every step, and end abruptly after this one."""
    with killed_at(step + 1):
        train(name, out, {**changes, "train.save_every": 1}, resume=resume)
    assert load_checkpoint(out / "last.pt")["step"] == step


@pytest.fixture(scope="module", params=METHODS)
def name(request) -> str:
    method: str = request.param
    return method


@pytest.fixture(scope="module")
def hard(name, tmp_path_factory) -> Trained:
    """A run with hard views that keeps a checkpoint of every epoch."""
    return train(name, tmp_path_factory.mktemp(name) / "hard", {"train.keep_every": 1})


@pytest.fixture(scope="module")
def vanilla(name, tmp_path_factory) -> Trained:
    """A run without hard views."""
    return train(name, tmp_path_factory.mktemp(name) / "vanilla", {"selection.hard_views": "none"})


def test_a_run_leaves_its_files_and_complete_rows(name, hard):
    assert sorted(path.name for path in hard.out.iterdir()) == [
        ".lock",
        "config.yaml",
        "epoch0001.pt",
        "epoch0002.pt",
        "last.pt",
        "metrics.jsonl",
        "previous.pt",
        "run.json",
        "tensorboard",
    ]
    config = config_of(name, {"train.keep_every": 1})
    content = load_checkpoint(hard.out / "last.pt")
    assert (content["method"], content["step"], content["epoch"]) == (name, STEPS, 2)
    assert content["config"] == config.model_dump(mode="json")
    assert resolve(type(config), [("file", read_yaml(hard.out / "config.yaml"))]).config == config
    rows = rows_of(hard.out)
    assert [row["epoch"] for row in rows] == [1] * STEPS_PER_EPOCH + [2] * STEPS_PER_EPOCH
    assert all(earlier["seconds"] < later["seconds"] for earlier, later in pairwise(rows))
    for row in rows:
        assert 0 < row["spread"] < 1.2
        assert 1e7 < row["peak_memory"] < 1e11
        assert row["images_per_s"] > 0
        assert 0 <= row["wait_share"] <= 1
        assert 0 < row["select_share"] < 1


def test_vanilla_equals_a_run_without_any_selection(name, vanilla, tmp_path, monkeypatch):
    class Absent:
        """A selector with only the calls that a step without hard views may make."""

        first_views: ClassVar = [0, 1]  # of two

        def __init__(self, *_: object): ...

        def acts_on(self, step: int) -> bool:
            return False

        def first(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
            return views

        def statistics(self, kept: None) -> dict[str, float]:
            return {}

    trainer = import_module(f"hvp.methods.{name}.main_{name}")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(step, "ViewSelector", Absent)
    monkeypatch.setattr(trainer, "pair_losses", never)
    monkeypatch.setattr(loading, "ViewSelector", Absent)
    assert_same(vanilla, train(name, tmp_path / "absent", {"selection.hard_views": "none"}))


def test_as_many_candidates_as_kept_views_equals_vanilla(name, vanilla, tmp_path):
    assert_same(vanilla, train(name, tmp_path / "run", as_many_as_kept(name)))


def test_hard_views_change_the_run(name, hard, vanilla):
    assert weights_differ(hard, vanilla)
    slots = config_of(name, {}).combination_slots()
    assert [row["step"] for row in hard.rows] == list(range(1, STEPS + 1))
    for row in hard.rows:
        assert len(row["kept_hist"]) == slots.num_views
        assert sum(row["kept_hist"]) == pytest.approx(slots.num_slots)
        assert row["no_finite_loss"] == 0
    assert not any("kept_hist" in row for row in vanilla.rows)


# Half of the images, with a weight large enough to show in eight steps.
RESCUE = {"rescue.enabled": True, "rescue.k": 4, "rescue.s": 1.0}


@pytest.fixture(scope="module")
def rescued(name, tmp_path_factory) -> Trained:
    """A run with Rescue and without hard views."""
    return train(name, tmp_path_factory.mktemp(name) / "rescued", {"selection.hard_views": "none", **RESCUE})


@pytest.fixture(scope="module")
def both(name, tmp_path_factory) -> Trained:
    """A run with hard views and Rescue."""
    return train(name, tmp_path_factory.mktemp(name) / "both", RESCUE)


@pytest.mark.parametrize("mode", ["vanilla", "hard", "rescued", "both"])
def test_every_choice_of_views_trains_and_acts(name, mode, request):
    trained = {key: request.getfixturevalue(key) for key in ("vanilla", "hard", "rescued", "both")}
    run = trained.pop(mode)
    assert len(run.rows) == STEPS
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    assert all(weights_differ(run, other) for other in trained.values())
    for row in run.rows:
        assert ("kept_hist" in row) == (mode in ("hard", "both"))
        assert ("strong_similarity" in row) == (mode in ("rescued", "both"))
    if mode in ("hard", "both"):
        # views other than the first candidates, those of a vanilla step, are trained on
        config = config_of(name, {})
        first, num_kept = list(first_views(config.view_slots())), config.combination_slots().num_slots
        assert any(sum(row["kept_hist"][view] for view in first) < num_kept for row in run.rows)


def test_strong_views_enter_the_loss(name, rescued, vanilla):
    """In the first step the weights are equal, and so is the method's own loss."""
    first, without = rescued.rows[0], vanilla.rows[0]
    assert first["loss"] - without["loss"] == pytest.approx(-first["strong_similarity"], abs=1e-5)
    assert first["easy_similarity"] > first["strong_similarity"]


def test_rescuing_no_image_equals_vanilla(name, vanilla, tmp_path, monkeypatch):
    monkeypatch.setattr(rescuing, "rescue", None)
    assert_same(vanilla, train(name, tmp_path / "run", {"selection.hard_views": "none", **RESCUE, "rescue.k": 0}))


@pytest.mark.parametrize(
    "change", [{"rescue.feature": "backbone"}, {"rescue.stop_gradient": True}, {"rescue.direction": "push"}], ids=str
)
def test_choices_left_open_by_the_rescue_paper_can_be_switched(name, rescued, tmp_path, change):
    run = train(name, tmp_path / "run", {"selection.hard_views": "none", **RESCUE, **change})
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    assert weights_differ(run, rescued)


def test_a_resumed_run_with_rescue_equals_the_uninterrupted_one(name, both, tmp_path):
    stopped_after(3, name, tmp_path / "run", RESCUE)
    assert_same(both, train(name, tmp_path / "run", RESCUE, resume=True))


@pytest.mark.parametrize("changes", [{"train.accumulate": 2}, {"train.precision": "bf16"}], ids=["parts", "bf16"])
def test_rescue_trains_with_accumulation_and_in_half_precision(name, both, tmp_path, changes):
    run = train(name, tmp_path / "run", {**RESCUE, **changes})
    assert all(math.isfinite(row["loss"]) and abs(row["strong_similarity"]) <= 1 for row in run.rows)
    assert weights_differ(run, both)


def test_the_same_seed_gives_the_same_run_for_any_workers(name, hard, tmp_path):
    assert_same(hard, train(name, tmp_path / "workers", {"data.workers": 2}))
    assert weights_differ(hard, train(name, tmp_path / "seed", {"train.seed": 1}))


def test_a_resumed_run_equals_the_uninterrupted_one(name, hard, tmp_path):
    """Stopped in both epochs, and resumed with another number of workers."""
    stopped_after(2, name, tmp_path / "run", {"data.workers": 0})
    stopped_after(STEPS_PER_EPOCH + 1, name, tmp_path / "run", {"data.workers": 1}, resume=True)
    assert_same(hard, train(name, tmp_path / "run", {"train.save_every": 1}, resume=True))


@pytest.mark.parametrize("changes", [{"train.accumulate": 2}, {"train.precision": "bf16"}], ids=["parts", "bf16"])
def test_runs_train_with_accumulation_and_in_half_precision(name, hard, tmp_path, changes):
    run = train(name, tmp_path / "run", changes)
    assert [(row["step"], row["lr"]) for row in run.rows] == [(row["step"], row["lr"]) for row in hard.rows]
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    # batch norm sees smaller batches, and bfloat16 has three digits
    assert weights_differ(run, hard)
    kinds = {value.dtype for _, value in leaves(run.state) if isinstance(value, torch.Tensor)}
    assert kinds == {value.dtype for _, value in leaves(hard.state) if isinstance(value, torch.Tensor)}


def test_every_and_start_choose_the_selecting_steps(name, hard, tmp_path):
    run = train(name, tmp_path / "run", {"selection.start": 0.25, "selection.every": 3})
    assert [row["step"] - 1 for row in run.rows if "kept_hist" in row] == [2, 5]
    assert weights_differ(run, hard)


def test_the_scoring_mode_matters(name, hard, tmp_path):
    """In the first step the weights are equal, so only batch statistics and stochastic depth can differ."""
    run = train(name, tmp_path / "run", {"selection.mode": "eval", "train.epochs": 1})
    assert run.rows[0]["kept_loss"] != hard.rows[0]["kept_loss"]


def test_the_callers_random_state_is_restored(name, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(name, tmp_path / "run", {"train.epochs": 1})
    assert torch.equal(torch.rand(3), expected)


def test_the_encoder_is_evaluated(name, hard):
    encoder, meta = load_encoder(hard.out / "last.pt")
    fresh = get_method(name).build_encoder(config_of(name, {}))
    assert encoder.state_dict().keys() == fresh.state_dict().keys()
    shapes = config_of(name, {}).data.shapes
    sources = (open_dataset("shapes", split, shapes=shapes, labels=True) for split in ("train", "val"))
    result = evaluate_knn(encoder, *sources, ks=(5,), resolution=32, checkpoint=meta.summary())
    assert 0 <= result["results"][0]["top1"] <= 100


def test_gradients_are_exchanged_during_the_backward_pass(name, tmp_path, monkeypatch):
    """With hard views and Rescue in half precision, DDP still sends a bucket as soon as it is full.

    One process suffices: its exchange is noted and does nothing.
    """
    events: list[str] = []

    def exchanged(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append("bucket")
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def note_layer(_: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _: events.append("layer"))

    def data_parallel(module: torch.nn.Module, *_: Any) -> DistributedDataParallel:
        for part in module.modules():
            part.register_forward_hook(note_layer)
        size = sum(p.nbytes for p in module.parameters() if p.requires_grad) / 2**20
        model = DistributedDataParallel(module, bucket_cap_mb=size / 8, gradient_as_bucket_view=True)
        model.register_comm_hook(None, exchanged)
        return model

    record = Run.record

    def recorded(run: Run, **values: Any) -> None:
        events.append("step")
        record(run, **values)

    monkeypatch.setattr(step, "data_parallel", data_parallel)
    monkeypatch.setattr(Run, "record", recorded)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(name, tmp_path / "run", {**RESCUE, "train.precision": "bf16", "data.shapes.train": 16, "train.epochs": 1})
    finally:
        dist.destroy_process_group()
    second = " ".join(events).split("step")[1].split()  # DDP orders its buckets by the first step's gradients
    layers, buckets = second.count("layer"), [i for i, event in enumerate(second) if event == "bucket"]
    assert len(buckets) >= 4
    assert layers - second[: buckets[len(buckets) // 2]].count("layer") > 0.1 * layers, "half of the gradients wait"


# Each process draws its own stochastic depth.
NO_DROP_PATH = {"model.drop_path_rate": 0.0}
# DINOv2 computes KoLeo over the images of a process, and chooses among the crops of a process those to mask and how
# much; with every crop masked at a fixed ratio there is nothing to choose.
ONE_MASK: dict[str, Any] = {"ibot.mask_sample_probability": 1.0, "ibot.mask_ratio_min_max": [0.3, 0.3]}
ALIKE: dict[str, dict[str, Any]] = {
    "dino": NO_DROP_PATH,
    "ibot": NO_DROP_PATH,
    # The preset's learning rate multiplies rounding tenfold in a step; this is the usual one.
    "simsiam": {"optim.base_lr": 0.05},
    # Three rescued images do not divide evenly. With batch norm, which the other methods have, the image that fills up
    # the second process's share would count.
    "dinov2": {**NO_DROP_PATH, **ONE_MASK, "dino.koleo_loss_weight": 0.0, "rescue.k": 3},
}
# float32 sums in another order differ by a few units of rounding, 1.2e-7 each, and the optimiser carries them on. Where
# a convolution meets ReLU, rounding may also move a value across the kink, and with it the gradient of one position.
# SimSiam's losses are cosines near 0, so its tolerance is absolute. Another batch, view or combination moves the second
# digit.
TOLERANCE: dict[str, dict[str, Any]] = {
    "dino": {"rel": 1e-5},
    "ibot": {"rel": 1e-5},
    "dinov2": {"rel": 1e-5},
    "simclr": {"rel": 1e-4},
    "simsiam": {"abs": 1e-5},
    "mocov3": {"rel": 1e-4},
}


def in_two_processes(name: str, out: Path, changes: dict[str, Any]) -> None:
    start_two(_one_of_two, 1, name, out, changes)


def _one_of_two(rank: int, ports: list[int], name: str, out: Path, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with as_rank(rank, ports[0]):
        train(name, out, changes)


def under_torchrun(name: str, out: Path, changes: dict[str, Any]) -> None:
    # --standalone takes a free port; without it, every run on the machine meets at 29500
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(sys.executable).with_name("hvp")), "pretrain", name, "--preset", "tiny", "--out", str(out)]
    for key, value in values_of(name, changes).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        *[(method, in_two_processes) for method in METHODS],
        *[pytest.param(method, under_torchrun, marks=pytest.mark.slow) for method in METHODS],
    ],
    indirect=["name"],
)
def test_two_processes_give_the_losses_and_selections_of_one(name, launch, tmp_path):
    # all images, because batch norm over few amplifies rounding; tests of rescue() check the choice of images
    changes = {**RESCUE, "rescue.k": 8, **ALIKE.get(name, {})}
    one = train(name, tmp_path / "one", changes)
    launch(name, tmp_path / "two", changes)
    two = Trained(tmp_path / "two", said="")
    assert len(two.state["processes"]) == 2
    for ours, theirs in zip(two.rows, one.rows, strict=True):
        assert ours["lr"] == theirs["lr"]
        for key in ("loss", "kept_loss", "strong_similarity"):
            assert ours[key] == pytest.approx(theirs[key], **TOLERANCE[name]), (key, ours["step"])
        assert ours["kept_hist"] == theirs["kept_hist"], ours["step"]
