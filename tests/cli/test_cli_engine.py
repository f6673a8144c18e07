"""`hvp pretrain --engine upstream` on stand-ins for the originals: scripts that record how they were started."""

import hashlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hvp.common.training.signals import EXIT_CODES
from hvp.patches import job, patching
from tests.upstreams import clone_of

TRAINER = """import json, os, sys
rank = os.environ.get("RANK", "none")
json.dump([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")], open(f"started-{rank}.json", "w"))
sys.exit(7)
"""
METHODS = {
    "dino": "vits16-100ep",
    "ibot": "vits16-100ep",
    "simsiam": "rn50-100ep",
    "simclr": "rn50-100ep",
    "mocov3": "rn50-800ep",
    "dinov2": "vitl16-100ep",
}


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A stand-in for the upstream repository of every method, on a machine with 8 GPUs."""
    folder = tmp_path / "standin"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINER)
    (folder / "utils.py").write_text("")
    file = tmp_path / "patch.toml"
    file.write_text(
        'upstream = "https://github.com/owner/standin"\nlicence = "MIT"\nbrings = ["HVP"]\ntrainer = "train.py"\n'
        f'commit = "{"0" * 40}"\n[[files]]\npath = "train.py"\n'
        f'sha256 = "{hashlib.sha256(TRAINER.encode()).hexdigest()}"\n'
        '[[files.changes]]\nwhat = "ours"\nafter = 1\nlines = "patched = True\\n"\n'
    )
    monkeypatch.setattr(patching, "patches", lambda: dict.fromkeys(METHODS, file))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (tmp_path / "data" / "train").mkdir(parents=True)
    return folder


@pytest.fixture
def signals_restored():
    """Restore the signal handlers that the launcher replaces."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(method: str, clone: Path, *more: object) -> list[object]:
    return ["pretrain", method, "--preset", METHODS[method], "--engine", "upstream", "--upstream", clone, *more]


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_a_dry_run_prints_the_command_and_starts_nothing(hvp, clone, tmp_path):
    ran = hvp(*arguments("dino", clone, "--out", "a run", "--devices", 2, "--set", "optim.base_lr=0.002", "--dry-run"))
    assert ran.code == 0
    words = shlex.split(ran.out.splitlines()[0])
    run = tmp_path / "a run"
    assert words[:3] == ["cd", str(run), "&&"]
    assert words[4:9] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        str(run / "upstream" / "train.py"),
    ]
    assert [flag(words, name) for name in ("--lr", "--batch_size_per_gpu", "--use_hvp")] == ["0.002", "256", "true"]
    assert "  data.loader = fast; the original: pil\n" in ran.out
    assert "  optim.clip_by = tensor; the original: the same\n" in ran.out
    assert not run.exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_value_is_a_flag_or_listed(hvp, clone, method):
    """The list also says what the original does instead."""
    patch = clone.parent / "patch.toml"
    patch.write_text(patch.read_text().replace('["HVP"]', '["HVP", "Rescue"]'))
    ran = hvp(*arguments(method, clone, "--dry-run"))
    listed = ran.out.partition("no flag for:\n")[2].splitlines()
    assert listed
    assert all("; the original: " in line for line in listed)


def test_the_elastic_launcher_starts_the_patched_copy(hvp, clone, tmp_path, signals_restored):
    ran = hvp(*arguments("dino", clone, "--out", "run", "--data", "data", "--devices", 2))
    assert ran.code == 7, ran.err
    assert "note: data.loader = fast; the original: pil\n" in ran.err
    assert sorted(path.name for path in (tmp_path / "run").glob("*.json")) == ["started-0.json", "started-1.json"]
    assert str(tmp_path / "data" / "train") in (tmp_path / "run" / "started-1.json").read_text()
    assert "patched = True" in (tmp_path / "run" / "upstream" / "train.py").read_text()
    assert (clone / "train.py").read_text() == TRAINER


def test_an_original_that_starts_its_own_processes_is_started_once(hvp, clone, tmp_path, monkeypatch):
    def in_its_place(program: str, words: list[str], environment: dict[str, str]) -> None:
        sys.exit(subprocess.run(words, executable=program, env=environment).returncode)

    monkeypatch.setattr(os, "execve", in_its_place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    ran = hvp(*arguments("simsiam", clone, "--out", "run", "--data", "data", "--devices", 2, "--workers", 3))
    assert ran.code == 7, ran.err
    started = (tmp_path / "run" / "started-none.json").read_text()
    assert '"--workers", "6"' in started
    assert '"3,5"' in started


@pytest.mark.parametrize("method", ["simsiam", "mocov3"])
def test_the_processes_of_a_run_meet_at_a_free_port(hvp, clone, method):
    with socket.create_server(("localhost", 0)) as taken:
        ran = hvp(*arguments(method, clone, "--dry-run", "--no-rescue"))
        port = int(flag(shlex.split(ran.out.splitlines()[0]), "--dist-url").rpartition(":")[2])
        assert port != taken.getsockname()[1]
    socket.create_server(("localhost", port)).close()


def test_packages_that_the_original_lacks_are_named_before_anything_is_written(hvp, clone, tmp_path):
    patch = clone.parent / "patch.toml"
    patch.write_text(patch.read_text().replace("trainer =", 'needs = ["torch", "no-such-package"]\ntrainer ='))
    ran = hvp(*arguments("dino", clone, "--out", "run", "--data", "data"))
    assert ran.code == 2
    assert "owner/standin needs no-such-package, not installed here: pip install no-such-package" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def packaged(clone) -> Path:
    """The same stand-in with its trainer inside a package, which it imports."""
    (clone / "train.py").unlink()
    (clone / "package").mkdir()
    script = "import package\n" + TRAINER
    (clone / "package" / "train.py").write_text(script)
    file = clone.parent / "patch.toml"
    text = file.read_text().replace('"train.py"', '"package/train.py"').replace('"HVP"', '"HVP", "Rescue"')
    sums = (hashlib.sha256(content.encode()).hexdigest() for content in (TRAINER, script))
    file.write_text(text.replace(*sums))
    return clone


@pytest.mark.parametrize(
    ("method", "goes_on"), [("dino", True), ("ibot", False), ("simsiam", False), ("simclr", False), ("mocov3", False)]
)
def test_an_earlier_run_is_not_overwritten(hvp, clone, tmp_path, monkeypatch, method, goes_on):
    (tmp_path / "data" / "stl10_binary").mkdir()
    assert hvp("patch", "apply", method, "--upstream", clone, "--out", tmp_path / "run" / "upstream").code == 0
    (tmp_path / "run" / "checkpoint.pth").write_text("of weeks")
    monkeypatch.setattr(job.Job, "run", lambda _: 7)
    command = arguments(method, clone, "--out", "run", "--data", "data", "--no-rescue")
    ran = hvp(*command)
    if goes_on:
        assert ran.code == 7
        return
    assert ran.code == 2
    assert f"{tmp_path / 'run'} holds an earlier run (checkpoint.pth), and owner/standin would start over" in ran.err
    assert hvp(*command, "--dry-run").code == 0


def test_a_trainer_in_a_package_finds_it(hvp, packaged, tmp_path, monkeypatch, signals_restored):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    run = tmp_path / "run"
    shell = hvp(*arguments("dino", packaged, "--out", "run", "--dry-run")).out.splitlines()[0]
    assert f"&& env PYTHONPATH={run / 'upstream'}:elsewhere " in shell
    ran = hvp(*arguments("dino", packaged, "--out", "run", "--data", "data"))
    assert ran.code == 7, ran.err
    assert (run / "started-0.json").exists()


def test_checkpoints_with_objects_are_loaded_only_if_trusted(hvp, packaged, tmp_path, monkeypatch):
    np.save(tmp_path / "data" / "entries-TRAIN.npy", np.zeros(1_281_167, dtype=np.uint8))
    assert hvp("patch", "apply", "dinov2", "--upstream", packaged, "--out", tmp_path / "run" / "upstream").code == 0
    monkeypatch.setattr(job.Job, "run", lambda _: 7)
    command = arguments("dinov2", packaged, "--out", "run", "--data", "data")
    (tmp_path / "run" / "config.yaml").write_text("of a run that stopped before its first checkpoint")
    assert hvp(*command).code == 7
    (tmp_path / "run" / "model_final.rank_0.pth").write_text("of weeks")
    ran = hvp(*command)
    assert ran.code == 2
    assert "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment to resume; or give another --out" in ran.err
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert hvp(*command).code == 7


def test_variables_of_the_batch_system_are_unset(hvp, packaged, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = shlex.split(hvp(*arguments("dinov2", packaged, "--out", "run", "--dry-run")).out.splitlines()[0])
    assert words[3:6] == ["env", "-u", "SLURM_JOB_ID"]


def test_an_unchanged_copy_is_reused_and_a_changed_one_refused(hvp, clone, tmp_path):
    assert hvp("patch", "apply", "dino", "--upstream", clone, "--out", tmp_path / "run" / "upstream").code == 0
    assert "The patched copy does not exist yet" not in hvp(*arguments("dino", clone, "--out", "run", "--dry-run")).out
    (tmp_path / "run" / "upstream" / "utils.py").write_text("changed\n")
    ran = hvp(*arguments("dino", clone, "--out", "run", "--data", "data"))
    assert ran.code == 2
    assert "run/upstream is not" in ran.err
    assert (tmp_path / "run" / "upstream" / "utils.py").read_text() == "changed\n"


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dino", ["--resume"], "--resume works with our own engine only"),
        ("dino", ["--overwrite"], "--overwrite works with our own engine only"),
        ("dino", ["--force"], "--force works with our own engine only"),
        ("dino", ["--dry-run", "--measure"], "--measure works with our own engine only"),
        ("dino", ["--rescue"], "rescue.enabled is on, but the patched owner/standin has only HVP"),
        ("dino", ["--loader", "fast"], "--loader: owner/standin has no flag for it (data.loader = fast; the"),
        ("dino", ["--set", "optim.clip_by=global"], "no flag for it (optim.clip_by = global; the original: tensor)"),
        ("dino", ["--set", "model.arch=vit_micro"], "model.arch = vit_micro is ours"),
        ("dino", ["--devices", "3"], "train.batch_size = 512 does not divide among 3 processes"),
        ("dino", ["--devices", "16"], "needs a GPU for each of 16 processes; this machine has 8"),
        ("dino", ["--data", "shapes"], "--data shapes: owner/standin reads a folder of images"),
        ("dino", ["--data", "data/train"], "data/train: owner/standin reads train/CLASS/ in it"),
        ("dino", ["--out", "data"], "data holds something other than a run of owner/standin"),
        ("dino", ["--upstream", "nowhere"], "nowhere is not a folder. Get a clone: git clone"),
        ("dino", ["--engine", "hvp"], "--engine upstream and --upstream DIR, your clone of the original, go together"),
    ],
)
def test_errors_are_one_message_and_nothing_is_written(hvp, clone, tmp_path, method, more, message):
    before = sorted(tmp_path.rglob("*"))
    ran = hvp(*arguments(method, clone, *(["--data", "data"] if "--data" not in more else []), *more))
    assert ran.code == 2
    assert ran.err.startswith("hvp: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_options_and_changed_clones_are_one_message(hvp, clone):
    assert (
        "--upstream DIR, your clone of the original, go together" in hvp("pretrain", "dino", "--engine", "upstream").err
    )
    assert "no images: give --data DIR" in hvp(*arguments("dino", clone)).err
    (clone / "train.py").write_text("another\n")
    assert "train.py differs" in hvp(*arguments("dino", clone, "--dry-run")).err


@pytest.mark.parametrize(
    ("folder", "name", "size"), [("stl10_binary", "stl10", 96), ("cifar-10-batches-py", "cifar10", 32)]
)
def test_simclr_recognises_its_images_by_their_folder(hvp, clone, tmp_path, folder, name, size):
    (tmp_path / "data" / folder).mkdir()
    ran = hvp(*arguments("simclr", clone, "--data", "data", "--set", "optim.base_lr=0.01", "--dry-run"))
    assert ran.code == 0, ran.err
    words = shlex.split(ran.out.splitlines()[0])
    assert [flag(words, option) for option in ("-data", "-dataset-name")] == [str(tmp_path / "data"), name]
    assert [flag(words, option) for option in ("--lr", "--rescue-k")] == ["0.16", "0"]
    assert "--use-hvp" in words
    assert f"  views.crop_size = 224; the original: {size}\n" in ran.out
    assert "  optim.optimizer = lars; the original: adam\n" in ran.out
    assert "note: the original does not normalise images\n" in ran.err


@pytest.mark.parametrize(
    ("folders", "more", "message"),
    [
        (
            [],
            [],
            "data: owner/standin reads STL-10 (stl10_binary/) or CIFAR-10 (cifar-10-batches-py/) in it, and there",
        ),
        ([], ["--data", "shapes"], "Give one that has STL-10 (stl10_binary/) or CIFAR-10 (cifar-10-batches-py/)\n"),
        (["stl10_binary", "cifar-10-batches-py"], [], "data: stl10_binary and cifar-10-batches-py are both there"),
        (["stl10_binary"], ["--devices", "2"], "--devices 2: sthalles/SimCLR trains on one GPU"),
        (["stl10_binary"], ["--seed", "3"], "(train.seed = 3; the original: 0, except for strong views)"),
        (["stl10_binary"], ["--batch-size", "200000"], "train.batch_size = 200000, but stl10 has 100000 images"),
        (["stl10_binary"], ["--set", "optim.min_lr=0.1"], "(optim.min_lr = 0.1; the original: 4.8 for 11 epochs, then"),
    ],
)
def test_unsupported_simclr_options_are_one_message(hvp, clone, tmp_path, folders, more, message):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir()
    ran = hvp(*arguments("simclr", clone, *(["--data", "data"] if "--data" not in more else []), *more))
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_an_original_cannot_be_queued(hvp, clone):
    ran = hvp("launch", "slurm", "--", *arguments("dino", clone))
    assert ran.code == 2
    assert "--engine upstream cannot be queued" in ran.err


@pytest.mark.parametrize("method", METHODS)
def test_the_original_understands_the_flags(hvp, tmp_path, method):
    """Run the parser of the original, in the clones that HVP_UPSTREAMS has; it exits with 2 at an unknown flag."""
    devices = 1 if method == "simclr" else 8
    ran = hvp(*arguments(method, clone_of(patching.load_patch(method)), "--dry-run", "--devices", devices))
    assert ran.code == 0, ran.err
    words = shlex.split(ran.out.splitlines()[0])
    trainer = next(word for word in words if word.endswith(".py"))
    apply = next(line for line in ran.out.splitlines() if line.startswith("  hvp patch apply"))
    assert hvp(*shlex.split(apply)[1:]).code == 0
    script = (
        "import argparse, runpy, sys\n"
        "from hvp.benchmarks.originals.on_cpu import substitute\n"
        "substitute()\n"
        "parse = argparse.ArgumentParser.parse_args\n"
        "def parse_and_stop(*given):\n"
        "    parse(*given)\n"
        "    sys.exit(33)\n"
        "argparse.ArgumentParser.parse_args = parse_and_stop\n"
        "sys.argv = sys.argv[1:]\n"
        f"sys.path.insert(0, {str(Path(trainer).parent)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = words[words.index(trainer) :]
    told = dict(word.split("=", 1) for word in words[: words.index(trainer)] if word.startswith("PYTHONPATH="))
    environment = {**os.environ, **told}
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 33, done.stderr
