"""What holds for every trainer, on 32 tiny images: 8 steps of 8, all of which select unless said otherwise.

What a method does of its own is tested in its folder.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.config.sections import RunConfig
from hvp.common.data import open_dataset
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.evaluation.knn import evaluate_knn
from hvp.common.training import loading, rescuing, step
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.run import Run
from hvp.common.views import first_views
from hvp.methods import METHODS, get_method, get_preset

STEPS, STEPS_PER_EPOCH = 8, 4
SMALL = {
    "data.workers": 0,
    "data.shapes.train": 32,
    "data.shapes.val": 16,
    "data.shapes.size": 32,
    "train.batch_size": 8,
    "train.epochs": 2,
    "train.log_every": 1,
    "selection.start": 0.0,
}
# Stochastic depth, so that random numbers are drawn in a step.
OWN = {
    "dino": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.1},
    "ibot": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.1, "masks.pred_ratio_var": [0.0, 0.1]},
    "simclr": {"optim.warmup_epochs": 1},
    "mocov3": {"optim.warmup_epochs": 1, "selection.hard_views": "hvp", "rescue.enabled": False},
    "dinov2": {"optim.warmup_epochs": 1, "model.drop_path_rate": 0.3},
}
"""What a method's `tiny` preset needs for so short a run."""

MULTI_CROP = {"selection.global_candidates": 1, "selection.local_candidates": 2}
TWO_VIEWS = {"selection.candidates": 2}
AS_MANY_AS_KEPT = {
    **dict.fromkeys(("dino", "ibot", "dinov2"), MULTI_CROP),
    **dict.fromkeys(("simsiam", "simclr"), TWO_VIEWS),
    "mocov3": {"selection.candidates": 1},
}

ABOUT = {"format", "version", "versions", "method", "config"}
"""What a checkpoint says of the run, rather than what training has made of it."""
CLOCK = {"seconds", "images_per_s", "wait_share", "select_share", "peak_memory"}


def values_of(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL, **OWN.get(name, {}), **changes}


def config_of(name: str, changes: dict[str, Any]) -> RunConfig:
    layers = [("preset", read_yaml(get_preset(name, "tiny"))), ("test", values_of(name, changes))]
    config: RunConfig = resolve(get_method(name).config, layers).config
    return config


@dataclass
class Trained:
    out: Path

    @property
    def state(self) -> dict[str, Any]:
        """Everything that training changes."""
        return {key: part for key, part in load_checkpoint(self.out / "last.pt").items() if key not in ABOUT}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The log, but for how long things took, and how much memory."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def train(name: str, out: Path, changes: dict[str, Any], *, resume: bool = False) -> Trained:
    console = Console(quiet=True)
    path = get_method(name).train(config_of(name, changes), out, console=console, resume=resume)
    assert path == out / "last.pt"
    return Trained(out)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and numbers in nested containers."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def assert_same(a: Trained, b: Trained) -> None:
    """Bit for bit: networks, optimiser, random numbers, and the log."""
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


def stopped_at(
    stop: int, out: Path, name: str, changes: dict[str, Any], patch: pytest.MonkeyPatch, *, resume: bool = False
) -> None:
    """A run that ends without a word after so many steps, with a checkpoint of each."""

    class Killed(Exception):
        pass

    record = Run.record

    def killed(run: Run, loss: float, **values: Any) -> None:
        if run.step == stop:
            raise Killed
        record(run, loss, **values)

    with patch.context() as patched:
        patched.setattr(Run, "record", killed)
        with pytest.raises(Killed):
            train(name, out, {**changes, "train.save_every": 1}, resume=resume)
    assert load_checkpoint(out / "last.pt")["step"] == stop


@pytest.fixture(scope="module", params=METHODS)
def name(request) -> str:
    method: str = request.param
    return method


@pytest.fixture(scope="module")
def hard(name, tmp_path_factory) -> Trained:
    """A run that selects, and keeps every epoch."""
    return train(name, tmp_path_factory.mktemp(name) / "hard", {"train.keep_every": 1})


@pytest.fixture(scope="module")
def vanilla(name, tmp_path_factory) -> Trained:
    """A run without hard views."""
    return train(name, tmp_path_factory.mktemp(name) / "vanilla", {"selection.hard_views": "none"})


def test_a_run_leaves_what_it_promises(name, hard):
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
    rows = [json.loads(line) for line in (hard.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1] * STEPS_PER_EPOCH + [2] * STEPS_PER_EPOCH
    assert all(earlier["seconds"] < later["seconds"] for earlier, later in pairwise(rows))
    for row in rows:
        assert 0 < row["spread"] < 1.2
        assert 1e7 < row["peak_memory"] < 1e11
        assert row["images_per_s"] > 0
        assert 0 <= row["wait_share"] <= 1
        assert 0 < row["select_share"] < 1


def test_vanilla_is_the_run_without_any_selection(name, vanilla, tmp_path, monkeypatch):
    class Absent:
        """A selector as if HVP had never been written: nothing else of it can be called."""

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


def test_as_many_candidates_as_kept_views_is_vanilla(name, vanilla, tmp_path):
    assert_same(vanilla, train(name, tmp_path / "run", AS_MANY_AS_KEPT[name]))


def test_hard_views_change_the_run(name, hard, vanilla):
    assert weights_differ(hard, vanilla)
    slots = config_of(name, {}).combination_slots()
    assert [row["step"] for row in hard.rows] == list(range(1, STEPS + 1))
    for row in hard.rows:
        assert len(row["kept_hist"]) == slots.num_views
        assert sum(row["kept_hist"]) == pytest.approx(slots.num_slots)
        assert row["no_finite_loss"] == 0
    assert not any("kept_hist" in row for row in vanilla.rows)


# Half of the images, at a weight that shows in eight steps.
RESCUE = {"rescue.enabled": True, "rescue.k": 4, "rescue.s": 1.0}


@pytest.fixture(scope="module")
def rescued(name, tmp_path_factory) -> Trained:
    """A run with Rescue, and without hard views."""
    return train(name, tmp_path_factory.mktemp(name) / "rescued", {"selection.hard_views": "none", **RESCUE})


@pytest.fixture(scope="module")
def both(name, tmp_path_factory) -> Trained:
    """A run with hard views and Rescue."""
    return train(name, tmp_path_factory.mktemp(name) / "both", RESCUE)


@pytest.mark.parametrize("mode", ["vanilla", "hard", "rescued", "both"])
def test_every_choice_of_views_trains_and_acts(name, mode, request):
    runs = {key: request.getfixturevalue(key) for key in ("vanilla", "hard", "rescued", "both")}
    run = runs.pop(mode)
    assert len(run.rows) == STEPS
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    assert all(weights_differ(run, other) for other in runs.values())
    for row in run.rows:
        # hard views: others than the first of the sampled ones, which are the random ones, are trained on
        assert ("kept_hist" in row) == (mode in ("hard", "both"))
        # Rescue: strong views were made and compared
        assert ("strong_similarity" in row) == (mode in ("rescued", "both"))
    if mode in ("hard", "both"):
        config = config_of(name, {})
        first, num_kept = list(first_views(config.view_slots())), config.combination_slots().num_slots
        assert any(sum(row["kept_hist"][view] for view in first) < num_kept for row in run.rows)


def test_strong_views_enter_the_loss(name, rescued, vanilla):
    """Before the first step the weights are equal, and so is the method's own loss."""
    first, without = rescued.rows[0], vanilla.rows[0]
    assert first["loss"] - without["loss"] == pytest.approx(-first["strong_similarity"], abs=1e-5)
    assert first["easy_similarity"] > first["strong_similarity"]


def test_rescuing_no_image_is_vanilla(name, vanilla, tmp_path, monkeypatch):
    monkeypatch.setattr(rescuing, "rescue", None)
    assert_same(vanilla, train(name, tmp_path / "run", {"selection.hard_views": "none", **RESCUE, "rescue.k": 0}))


@pytest.mark.parametrize(
    "change", [{"rescue.feature": "backbone"}, {"rescue.stop_gradient": True}, {"rescue.direction": "push"}], ids=str
)
def test_what_the_rescue_paper_leaves_open_can_be_switched(name, rescued, tmp_path, change):
    run = train(name, tmp_path / "run", {"selection.hard_views": "none", **RESCUE, **change})
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    assert weights_differ(run, rescued)


def test_a_resumed_run_with_rescue_is_the_uninterrupted_one(name, both, tmp_path, monkeypatch):
    stopped_at(3, tmp_path / "run", name, RESCUE, monkeypatch)
    assert_same(both, train(name, tmp_path / "run", RESCUE, resume=True))


@pytest.mark.parametrize("changes", [{"train.accumulate": 2}, {"train.precision": "bf16"}], ids=["parts", "bf16"])
def test_rescue_in_parts_and_half_precision_trains(name, both, tmp_path, changes):
    run = train(name, tmp_path / "run", {**RESCUE, **changes})
    assert all(math.isfinite(row["loss"]) and abs(row["strong_similarity"]) <= 1 for row in run.rows)
    assert weights_differ(run, both)


def test_the_same_seed_gives_the_same_run_for_any_workers(name, hard, tmp_path):
    assert_same(hard, train(name, tmp_path / "workers", {"data.workers": 2}))
    assert weights_differ(hard, train(name, tmp_path / "seed", {"train.seed": 1}))


def test_a_resumed_run_is_the_uninterrupted_one(name, hard, tmp_path, monkeypatch):
    """Stopped in both epochs, and gone on from with another number of workers."""

    stopped_at(2, tmp_path / "run", name, {"data.workers": 0}, monkeypatch)
    stopped_at(STEPS_PER_EPOCH + 1, tmp_path / "run", name, {"data.workers": 1}, monkeypatch, resume=True)
    assert_same(hard, train(name, tmp_path / "run", {"train.save_every": 1}, resume=True))


@pytest.mark.parametrize("changes", [{"train.accumulate": 2}, {"train.precision": "bf16"}], ids=["parts", "bf16"])
def test_parts_of_a_batch_and_half_precision_train(name, hard, tmp_path, changes):
    run = train(name, tmp_path / "run", changes)
    assert [(row["step"], row["lr"]) for row in run.rows] == [(row["step"], row["lr"]) for row in hard.rows]
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    # batch norm sees other batches, and bfloat16 has three digits
    assert weights_differ(run, hard)
    kinds = {value.dtype for _, value in leaves(run.state) if isinstance(value, torch.Tensor)}
    assert kinds == {value.dtype for _, value in leaves(hard.state) if isinstance(value, torch.Tensor)}


def test_every_and_start_choose_the_steps(name, hard, tmp_path):
    run = train(name, tmp_path / "run", {"selection.start": 0.25, "selection.every": 3})
    assert [row["step"] - 1 for row in run.rows if "kept_hist" in row] == [2, 5]
    assert weights_differ(run, hard)


def test_the_mode_of_scoring_acts(name, hard, tmp_path):
    """Before the first step the weights are equal, so only batch statistics and stochastic depth can differ."""
    run = train(name, tmp_path / "run", {"selection.mode": "eval", "train.epochs": 1})
    assert run.rows[0]["kept_loss"] != hard.rows[0]["kept_loss"]


def test_the_callers_randomness_is_given_back(name, tmp_path):
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


def test_gradients_are_exchanged_while_the_backward_pass_goes_on(name, tmp_path, monkeypatch):
    """In half precision with hard views and Rescue, as DDP does where neither is on: a bucket is sent once it is full.
    In one process, whose exchange is noted and does nothing."""
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

    def recorded(run: Run, loss: float, **values: Any) -> None:
        events.append("step")
        record(run, loss, **values)

    monkeypatch.setattr(import_module(f"hvp.methods.{name}.main_{name}"), "data_parallel", data_parallel)
    monkeypatch.setattr(Run, "record", recorded)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(name, tmp_path / "run", {**RESCUE, "train.precision": "bf16", "data.shapes.train": 16, "train.epochs": 1})
    finally:
        dist.destroy_process_group()
    second = " ".join(events).split("step")[1].split()  # its buckets are in the order of the first step's gradients
    layers, buckets = second.count("layer"), [i for i, event in enumerate(second) if event == "bucket"]
    assert len(buckets) >= 4
    assert layers - second[: buckets[len(buckets) // 2]].count("layer") > 0.1 * layers, "half of the gradients wait"


# Each process draws its own stochastic depth. SimSiam's preset has a learning rate that multiplies rounding tenfold in
# a step; this is the usual one.
NO_DROP_PATH = {"model.drop_path_rate": 0.0}
# DINOv2 compares the images of a process for KoLeo, and draws whether and how much of a crop is masked among those of a
# process; with every crop masked by a fixed share there is nothing to draw.
ONE_MASK = {"ibot.mask_sample_probability": 1.0, "ibot.mask_ratio_min_max": [0.3, 0.3]}
ALIKE = {
    "dino": NO_DROP_PATH,
    "ibot": NO_DROP_PATH,
    "simsiam": {"optim.base_lr": 0.05},
    # Three rescued images do not divide. Batch norm, which the others have, would see the one that fills up.
    "dinov2": {**NO_DROP_PATH, **ONE_MASK, "dino.koleo_loss_weight": 0.0, "rescue.k": 3},
}
# Sums of float32 numbers in another order, a few units of rounding, 1.2e-7 each, which the optimiser carries on. Where
# a convolution meets ReLU, rounding may also move a value across its kink, and with it the gradient of one position.
# SimSiam's losses are cosines near 0, so absolute. Another batch, view or combination moves the second digit.
TOLERANCE = {
    "dino": {"rel": 1e-5},
    "ibot": {"rel": 1e-5},
    "dinov2": {"rel": 1e-5},
    "simclr": {"rel": 1e-4},
    "simsiam": {"abs": 1e-5},
    "mocov3": {"rel": 1e-4},
}


# Ten seconds each: make test has a network with batch norm in it, and one without that is sharded elsewhere.
@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[] if m in ("simclr", "dinov2") else pytest.mark.slow) for m in METHODS],
    indirect=True,
)
def test_two_processes_give_the_losses_and_selections_of_one(name, tmp_path):
    # all images, as batch norm over few makes rounding grow; who is chosen is tested with rescue() itself
    changes = {**RESCUE, "rescue.k": 8, **ALIKE.get(name, {})}
    one = train(name, tmp_path / "one", changes)
    out = tmp_path / "two"
    # --standalone takes a free port; without, every run of the machine meets at 29500
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(sys.executable).with_name("hvp")), "pretrain", name, "--preset", "tiny", "--out", str(out)]
    for key, value in values_of(name, changes).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    two = Trained(out)
    assert len(two.state["processes"]) == 2
    for ours, theirs in zip(two.rows, one.rows, strict=True):
        assert ours["lr"] == theirs["lr"]
        for key in ("loss", "kept_loss", "strong_similarity"):
            assert ours[key] == pytest.approx(theirs[key], **TOLERANCE[name]), (key, ours["step"])
        assert ours["kept_hist"] == theirs["kept_hist"], ours["step"]
