"""Faults that end a run early, what the command says, and what each must leave behind.

    fault                                   what the command says          what is left
    --------------------------------------  -----------------------------  -----------------------------------------
    SIGKILL at any moment, also while a     nothing                        a whole checkpoint, readable rows, events;
    checkpoint is being written                                            resumed: the uninterrupted weights
    SIGINT, SIGTERM, SIGUSR1                the step; code 130, 143, 75    a checkpoint of that very step
    SIGINT, SIGUSR1 before the first step   one line; code 130, 75         what was there
    a second SIGINT, also inside a save     nothing; code 130              the checkpoint that was there
    nobody reads the output any more        nothing                        the run continues
    last.pt truncated, with a flipped bit,  its name and the file used     previous.pt, which is resumed from and kept
    empty, a pipe, incomplete or gone       instead                        until last.pt is whole
    both damaged; unknown version           the files; code 2              both, untouched
    the folder removed, and perhaps         that; code 2                   the other run, untouched
    recreated by another run
    the images moved or fewer               both numbers; code 2           the run, untouched; --data, --force resume
    another configuration                   every difference; code 2       the run, untouched; --force resumes
    a second run into the folder            process and machine; code 2    the first run, untouched
    a loss or gradient that is not finite   step, rate, checkpoint; 2      weights of the step before; nonfinite.json
    full disk, at a checkpoint or a row     the file and why; code 2       the last good checkpoint
    the data set vanishes                   the image; code 2              the last good checkpoint
    a loader worker dies, or hangs          the worker and its image; 2    a checkpoint of that very step
    a signal while the loader hangs         the step; code 130, 143, 75    a checkpoint of that very step
    one of several processes is killed      the rank; code 2               the last good checkpoint; no process left

Every message is printed once, on stderr, without a traceback. Bad configurations, folders and single images are tested
in tests/cli/test_cli.py.
"""

import errno
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from hvp.cli.main import main
from hvp.common.errors import Stopped
from hvp.common.training import checkpoint, log, signals
from hvp.common.training.checkpoint import load_checkpoint, save_checkpoint
from hvp.common.training.distributed import World
from hvp.common.training.folder import claimed
from hvp.common.training.loading import build_loader, open_training_data
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run
from hvp.methods.simsiam.config import SimSiamConfig
from tests.faults.commands import children
from tests.mortal import run_until_killed
from tests.processes import Report, in_two_processes
from tests.runs import SMALL, at_step, rows_of, tiny

HVP = str(Path(sys.executable).with_name("hvp"))
CPU = torch.device("cpu")
STEPS = 10
QUICK = [
    *("pretrain", "dino", "--preset", "tiny", "--epochs", "2", "--batch-size", "8", "--workers", "0"),
    *("--set", "data.shapes.train=40", "--set", "data.shapes.size=32", "--set", "optim.warmup_epochs=1"),
    *("--set", "model.use_bn_in_head=false", "--set", "model.drop_path_rate=0.1", "--set", "selection.start=0"),
    *("--set", "train.log_every=1", "--save-every", "1"),
]

Hvp = Callable[..., tuple[int, str]]


@pytest.fixture
def hvp(monkeypatch, capsys, tmp_path) -> Hvp:
    """Run the command in this process, in an empty folder; return the exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hvp", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.count("hvp: ") == (code not in (0, 130) or "SIGINT" in said)
        return code, said

    return run


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [HVP, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hvp", *QUICK, "--out", str(out)])
        with pytest.raises(SystemExit, match="0"):
            main()
    return out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def step_of(out: Path) -> int:
    step: int = load_checkpoint(out / "last.pt")["step"]
    return step


def assert_finished_like(out: Path, whole: Path) -> None:
    """Compare weights, centre and optimiser bit for bit, and require every step logged once with the same loss."""
    one, other = (load_checkpoint(folder / "last.pt") for folder in (out, whole))
    for part in ("student", "teacher", "dino_loss"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items()), part
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][number][key]) for key, value in state.items())
    ours, expected = ([(row["step"], row["loss"]) for row in rows_of(folder)] for folder in (out, whole))
    assert ours == expected


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int) -> None:
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < count):
        time.sleep(0.001)


def test_a_killed_run_resumes_as_if_nothing_had_happened(whole, tmp_path):
    """Killed before the first checkpoint, during a write, and between two; each time with a different worker count."""
    out, log = tmp_path / "run", tmp_path / "log"
    run_until_killed([*QUICK, "--out", str(out)], 0, "writing", log)
    run_until_killed(["resume", str(out), "--workers", "1"], 3, "writing", log)
    # a file cut off in the middle of a row is readable up to there
    assert len([json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]) >= 3
    logged = [event.step for file in (out / "tensorboard").iterdir() for event in EventFileLoader(str(file)).Load()]
    assert max(logged) >= 3
    run_until_killed([*QUICK, "--out", str(out), "--resume", "--workers", "2"], 6, 0.01, log)
    process = start("resume", out)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "continuing after step" in said
    assert_finished_like(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(20))
def test_twenty_kill_points_give_twenty_equal_runs(whole, tmp_path, point):
    choose, out = random.Random(point), tmp_path / "run"
    after = choose.randrange(1, STEPS)
    moments: list[float | str] = ["writing", choose.random() * 0.02]
    run_until_killed([*QUICK, "--out", str(out)], after, choose.choice(moments), tmp_path / "log")
    process = start("resume", out, "--workers", point % 3)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert_finished_like(out, whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)], ids=lambda x: str(x)
)
def test_a_signal_stops_after_the_step_with_a_checkpoint(hvp, whole, monkeypatch, tmp_path, number, code):
    acknowledged: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(signals, "_write", acknowledged.append)
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        stopped, said = hvp(*QUICK, "--save-every", "0", "--out", "run")
    assert stopped == code
    again = "; press again to stop without saving" if number == signal.SIGINT else ""
    assert "".join(acknowledged).strip() == f"{number.name}: stopping after this step, saving{again}"
    assert f"{number.name}: stopped after step 3 of 10. Continue with: hvp resume run" in said
    assert step_of(tmp_path / "run") == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert hvp("resume", "run")[0] == 0
    assert_finished_like(tmp_path / "run", whole)


def test_a_second_interrupt_does_not_wait(hvp, monkeypatch, tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    monkeypatch.setattr(signals.os, "_exit", ended)
    assert hvp(*QUICK, "--out", "run")[0] == 130
    assert step_of(tmp_path / "run") == 2


def test_a_second_interrupt_inside_a_save_leaves_the_checkpoint_before(hvp, whole, monkeypatch, tmp_path):
    write = torch.save

    def interrupted(content: dict[str, Any], file: BinaryIO) -> None:
        if content["step"] == 4:
            file.write(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        write(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(signals.os, "_exit", ended)
        patch.setattr(torch, "save", interrupted)
        code, said = hvp(*QUICK, "--out", "run")
    assert (code, "cannot be written" in said) == (130, False)
    assert step_of(tmp_path / "run") == 3
    assert hvp("resume", "run")[0] == 0
    assert_finished_like(tmp_path / "run", whole)


def ended(code: int) -> None:
    """Stand-in for os._exit(), which would end the test process."""
    raise SystemExit(code)


def interrupt(*arguments: object, seconds: float, again: float | None = None) -> str:
    """Start the command, press Ctrl-C after a while and perhaps once more; return stderr."""
    process = start(*arguments)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    if again is not None:
        time.sleep(again)
        process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Exception" not in said
    return said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_before_the_first_step_is_one_line(tmp_path, number, code):
    """Sent as soon as the command handles signals, before PyTorch is imported."""
    process = start(*QUICK, "--out", tmp_path / "run")
    handled = 0
    while not handled & 1 << signal.SIGUSR1 - 1:
        status = dict(line.split(":") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        handled = int(status["SigCgt"], 16)
    process.send_signal(number)
    assert (process.communicate()[1], process.returncode) == ("hvp: interrupted\n", code)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(12))
def test_interrupts_at_any_moment_leave_no_traceback(whole, tmp_path, moment):
    choose = random.Random(moment)
    out = tmp_path / "run"
    arguments = [*QUICK, "--epochs", "200", "--workers", "1", "--out", out]
    said = interrupt(*arguments, seconds=0.4 + 8 * choose.random(), again=choose.choice([None, 0.4 * choose.random()]))
    assert said.count("SIGINT: stopping after this step, saving; press again to stop without saving") <= 1
    if (out / "last.pt").exists():
        step_of(out)


def test_a_run_outlives_the_reader_of_its_output(hvp, whole, monkeypatch, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "wb", 0) as nobody:
        to = io.TextIOWrapper(io.BufferedWriter(nobody), line_buffering=True)
        patch.setattr(sys, "stdout", to)
        patch.setattr(sys, "stderr", to)
        patch.setattr(sys, "argv", ["hvp", *QUICK, "--out", "run"])
        with pytest.raises(SystemExit, match="0"):
            main()
    assert_finished_like(tmp_path / "run", whole)


def damage_checkpoint(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:5000])
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "incomplete":
        content = load_checkpoint(path)
        del content["log"]
        save_checkpoint(path, content)
    else:
        path.unlink()
    if damage == "foreign":
        torch.save({"weight": torch.zeros(2)}, path)
    elif damage == "empty":
        path.touch()
    elif damage == "pipe":
        os.mkfifo(path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "incomplete", "pipe", "gone"])
def test_the_previous_checkpoint_replaces_a_damaged_one(hvp, run, whole, damage):
    last = run / "last.pt"
    damage_checkpoint(last, damage)  # `gone` is a crash between the two renames of a save
    code, said = hvp("resume", run)
    assert code == 0
    assert "continuing after step 9 of 10" in said
    if damage != "gone":
        assert f"{last}: is " in said
        assert f"Using {run / 'previous.pt'} of step 9 instead" in said
    assert_finished_like(run, whole)
    assert load_checkpoint(run / "previous.pt")["step"] == 9  # never replaced by the damaged one


def test_unreadable_checkpoints_are_named_and_kept(hvp, run):
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"PK\x03\x04 half a file")
    code, said = hvp("resume", run)
    assert code == 2
    for name in ("last.pt", "previous.pt"):
        assert f"{run / name}: is truncated, or not a checkpoint" in said
        assert (run / name).read_bytes() == b"PK\x03\x04 half a file"
    assert "No checkpoint of this run can be resumed. Start over with hvp pretrain --overwrite" in said
    assert "weights_only" not in said
    shutil.copy(run / "last.pt", run / "epoch0001.pt")
    assert f"Copy {run / 'epoch0001.pt'} to {run / 'last.pt'}" in hvp("resume", run)[1]


@pytest.mark.parametrize("damage", ["flipped", "incomplete", "empty", "pipe"])
def test_no_command_uses_a_damaged_checkpoint(hvp, run, damage):
    """Damage to one of our checkpoints and, where the bytes are damaged, to an upstream's."""
    last = run / "last.pt"
    files = [last]
    if damage == "flipped":
        assert hvp("convert", last, "--to", "upstream", "--out", "up.pth")[0] == 0
        files.append(Path("up.pth"))
    (run / "previous.pt").unlink()
    for file in files:
        damage_checkpoint(file, damage)
    kept = [file.stat().st_mtime_ns for file in files]
    reading = [
        *([("resume", run), ("convert", last, "--to", "upstream", "--out", "b.pth")]),
        *(("convert", file, "--to", "timm", "--out", "b.pth") for file in files if damage != "incomplete"),
        *(("eval", "knn", file, "--data", "shapes") for file in files if damage != "incomplete"),
        *(("analyze", "diversity", file, "--data", "shapes") for file in files if damage != "incomplete"),
    ]
    if len(files) == 2:
        back = ("--from", "upstream", "--method", "dino", "--preset", "tiny", "--data", "shapes", "--out", "back")
        reading.append(("convert", files[1], *back))
    for command in reading:
        code, said = hvp(*command)
        assert code == 2, command
        assert re.search(r"hvp: \S+\.pth?: is (damaged: \w|empty, no|a named pipe, no)", said), said
    assert kept == [file.stat().st_mtime_ns for file in files]
    assert not Path("b.pth").exists()


def test_an_unknown_version_is_refused_not_replaced(hvp, run, monkeypatch):
    content = load_checkpoint(run / "last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 99)
        save_checkpoint(run / "last.pt", {k: v for k, v in content.items() if k not in ("format", "version")})
    code, said = hvp("resume", run)
    assert code == 2
    assert "has format version 99" in said


def test_another_configuration_is_refused_unless_forced(hvp, run):
    changed = [*QUICK, "--out", run, "--resume", "--epochs", "3", "--set", "optim.base_lr=0.001"]
    code, said = hvp(*changed)
    assert code == 2
    assert "train.epochs: 2 in the checkpoint, 3 now" in said
    assert re.search(r"optim\.base_lr: \S+ in the checkpoint, 0\.001 now", said)
    assert step_of(run) == STEPS
    assert hvp(*changed, "--force")[0] == 0
    assert step_of(run) == 15
    code, said = hvp(*changed, "--set", "model.head_hidden_dim=16", "--force")
    assert code == 2
    assert "student does not fit this configuration" in said


@pytest.mark.parametrize("wrong", [torch.zeros(3), 0.5])
def test_optimizer_moments_of_the_wrong_shape_are_refused(hvp, run, wrong):
    content = load_checkpoint(run / "last.pt")
    content["optimizer"]["state"][0]["exp_avg"] = wrong
    save_checkpoint(run / "last.pt", content)
    code, said = hvp("resume", run)
    assert code == 2
    assert "optimizer does not fit this configuration: exp_avg is " in said


def test_a_folder_without_a_run_cannot_be_resumed(hvp, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "nowhere"):
        code, said = hvp("resume", name)
        assert code == 2
        assert f"{name}: holds no run" in said


def test_a_second_run_into_the_folder_is_refused(hvp, run):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    before = (run / "last.pt").stat()
    for arguments in (("resume", run), (*QUICK, "--out", run, "--overwrite")):
        code, said = hvp(*arguments)
        assert code == 2
        assert f"another run is writing here: process {os.getpid()} on " in said
    assert (run / "last.pt").stat() == before
    holder.kill()  # a crash releases the lock
    holder.wait()
    assert hvp("resume", run)[0] == 0


@pytest.mark.parametrize(
    ("moment", "anew"), [("a row", False), ("a row", True), ("a save", True), ("inside a save", True)]
)
def test_a_folder_removed_during_a_run(hvp, monkeypatch, tmp_path, moment, anew):
    out = tmp_path / "run"

    def replace() -> None:
        shutil.rmtree(out)
        if anew:
            out.mkdir()
            (out / ".lock").write_text("process 1 on another\n")

    fsync, synced = os.fsync, []

    def replacing(number: int) -> None:
        synced.append(number)
        if len(synced) == 5:
            replace()
        fsync(number)

    if moment == "inside a save":
        monkeypatch.setattr(os, "fsync", replacing)
    else:
        at_step(monkeypatch, 3, replace)
    code, said = hvp(*QUICK, "--set", f"train.log_every={1 if moment == 'a row' else 100}", "--out", out)
    assert code == 2
    if moment == "inside a save":
        assert "last.pt: cannot be written: " in said
    else:
        assert f"{out}: was removed while this run was writing into it: " in said
        assert ("another run has begun" in said) == anew
    assert not anew or [path.name for path in out.iterdir()] == [".lock"]
    assert anew or not out.exists()


def test_a_non_finite_loss_never_reaches_the_weights(hvp, monkeypatch, tmp_path):
    check = Run._check

    def checking(self: Run, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        return check(self, loss * float("nan") if self.step == 3 else loss, optimizer)

    monkeypatch.setattr(Run, "_check", checking)
    code, said = hvp(*QUICK, "--out", "run")
    assert code == 2
    assert re.search(r"step 4: the loss is nan, lr 0\.000\d+\. ", said)
    assert "Last good checkpoint: run/last.pt, step 3" in said
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["student"].values())
    about = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert about["step"] == 4
    assert len({image["index"] for image in about["images"]}) == 8
    assert about["images"][0]["name"].startswith("shapes train ")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_non_finite_gradient_never_reaches_the_weights(hvp, monkeypatch, tmp_path, value):
    unscale, steps = Precision.unscale, []

    def unscaling(self: Precision, optimizer: torch.optim.Optimizer) -> None:
        unscale(self, optimizer)
        steps.append(optimizer)
        if len(steps) == 4:
            optimizer.param_groups[0]["params"][1].grad.view(-1)[0] = float(value)

    monkeypatch.setattr(Precision, "unscale", unscaling)
    code, said = hvp(*QUICK, "--out", "run")
    assert code == 2
    assert re.search(rf"step 4: the loss is \d\.\d+, but its gradient {value}, lr 0\.000\d+\. ", said)
    assert "Last good checkpoint: run/last.pt, step 3" in said
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["student"].values())
    about = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert about["gradient_norm"] == value
    assert len(about["images"]) == 8


def test_a_disk_that_fills_up_during_a_checkpoint(hvp, monkeypatch, tmp_path):
    fsync, synced = os.fsync, []

    def full(number: int) -> None:
        synced.append(number)
        if len(synced) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    code, said = hvp(*QUICK, "--out", "run")
    assert code == 2
    assert "last.pt: cannot be written: No space left on device. The previous last.pt is intact." in said
    assert step_of(tmp_path / "run") >= 3
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_disk_that_fills_up_during_a_log_write(hvp, monkeypatch, tmp_path):
    add = log.Events.add

    def full(self: log.Events, step: int, values: dict[str, float]) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, step, values)

    monkeypatch.setattr(log.Events, "add", full)
    code, said = hvp(*QUICK, "--out", "run")
    assert code == 2
    assert "run: the log cannot be written: No space left on device" in said
    assert step_of(tmp_path / "run") == 3


@pytest.fixture
def on_images(hvp, tmp_path, monkeypatch) -> Path:
    """A finished run of one epoch with `--data images`, made in its own folder; later commands run elsewhere."""
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(home / "images" / f"{i}.png")
    with monkeypatch.context() as patch:
        patch.chdir(home)
        assert hvp(*QUICK, "--epochs", "1", "--data", "images", "--out", "run")[0] == 0
    return home


def test_images_are_found_from_any_folder(hvp, on_images, monkeypatch):
    run, images = on_images / "run", on_images / "images"
    same = [*QUICK, "--epochs", "1", "--out", run, "--resume", "--data"]
    assert f"path: {images}\n" in (run / "config.yaml").read_text()
    assert load_checkpoint(run / "last.pt")["config"]["data"]["path"] == str(images)
    assert "continuing after step 2 of 2" in hvp("resume", run)[1]
    (on_images / "link").symlink_to(images)
    assert hvp(*same, on_images / "link")[0] == 0
    (on_images / "file.yaml").write_text("data:\n  path: images\n")
    with monkeypatch.context() as patch:
        patch.chdir(on_images)
        assert hvp(*same[:-1], "--config", "file.yaml")[0] == 0
    shutil.copytree(images, on_images / "others")
    code, said = hvp(*same, on_images / "others")
    assert code == 2
    assert f"data.path: {images} in the checkpoint, {on_images / 'others'} now" in said
    assert f"If the same images have moved: hvp resume {run} --data DIR" in said


def test_a_relative_data_path_resolves_from_the_current_folder(hvp, on_images, monkeypatch):
    """Early versions wrote relative paths."""
    run = on_images / "run"
    content = load_checkpoint(run / "last.pt")
    content["config"]["data"]["path"] = "images"
    del content["data"]
    save_checkpoint(run / "last.pt", content)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(on_images / "images"), "images"))
    code, said = hvp("resume", run)
    assert code == 2
    assert f"{Path.cwd() / 'images'}: the run's images are not there. If they have moved, give --data DIR" in said
    monkeypatch.chdir(on_images)
    assert hvp("resume", run)[0] == 0


def test_a_run_resumes_with_moved_images(hvp, on_images):
    run, moved = on_images / "run", on_images / "moved"
    (on_images / "images").rename(moved)
    code, said = hvp("resume", run)
    assert code == 2
    assert "images: the run's images are not there" in said
    assert hvp("resume", run, "--data", moved)[0] == 0
    assert f"path: {moved}\n" in (run / "config.yaml").read_text()


def test_a_different_number_of_images_is_refused(hvp, on_images):
    """Even when an epoch has as many steps as before, because the order of the images changes."""
    run, images = on_images / "run", on_images / "images"
    Image.new("RGB", (40, 40)).save(images / "more.png")
    code, said = hvp("resume", run)
    assert code == 2
    assert f"images: {images} (16 images) in the checkpoint, {images} (17 images) now; steps per epoch: 2 and 2" in said
    for name in ("more.png", "0.png"):
        (images / name).unlink()
    for moved in ((), ("--data", images)):
        code, said = hvp("resume", run, *moved)
        assert code == 2
        assert f"{images} (15 images) now; steps per epoch: 2 and 1" in said
    content = load_checkpoint(run / "last.pt")
    del content["data"]  # as in checkpoints of early versions
    save_checkpoint(run / "last.pt", content)
    said = hvp("resume", run)[1]
    assert f"images: {images} in the checkpoint, {images} (15 images) now; steps per epoch: 2 and 1" in said


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A separate, small file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_real_full_disk(hvp, small_disk):
    assert hvp(*QUICK, "--out", small_disk / "run")[0] == 0
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**16))
    code, said = hvp(*QUICK, "--out", small_disk / "run", "--resume", "--epochs", "3", "--force")
    assert code == 2
    assert "No space left on device" in said
    assert step_of(small_disk / "run") == 10


def test_a_data_set_deleted_during_a_run(hvp, monkeypatch, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "images"))
    code, said = hvp(*QUICK, "--data", "images", "--out", "run")
    assert code == 2
    assert ".png: " in said
    assert step_of(tmp_path / "run") == 3
    assert hvp("resume", "run")[0] == 2


def to_workers(number: signal.Signals) -> None:
    """Send a signal to every loader worker of this process."""
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, number)


@pytest.mark.parametrize("step", [2, 5])
def test_a_loader_worker_that_dies(hvp, whole, monkeypatch, tmp_path, step):
    """In the middle of an epoch, and at its end, before the worker is asked for the next."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: to_workers(signal.SIGKILL))
        code, said = hvp(*QUICK, "--workers", "1", "--save-every", "0", "--out", "run")
    assert code == 2
    assert "was killed by SIGKILL" in said
    assert step <= step_of(tmp_path / "run") < STEPS
    assert f"Step {step_of(tmp_path / 'run')} is saved. Continue with: hvp resume run" in said
    assert hvp("resume", "run", "--workers", "0")[0] == 0
    assert_finished_like(tmp_path / "run", whole)


@pytest.mark.parametrize("ended_by", ["timeout", "SIGTERM"])
def test_a_loader_worker_that_hangs(hvp, whole, monkeypatch, tmp_path, ended_by):
    def hang() -> None:
        to_workers(signal.SIGSTOP)
        if ended_by == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, 2, hang)
        limit = ["--set", f"data.timeout={1 if ended_by == 'timeout' else 0}"]
        code, said = hvp(*QUICK, *limit, "--workers", "1", "--save-every", "0", "--out", "run")
    step = step_of(tmp_path / "run")
    assert 2 <= step <= 4
    if ended_by == "SIGTERM":
        assert code == 143
        assert f"SIGTERM: stopped after step {step} of 10" in said
    else:
        assert code == 2
        assert re.search(r"No image was read for 1 seconds. Waiting for loader worker \d+ \(stopped\), .* shapes", said)
        assert "data.timeout" in said
        assert f"Step {step} is saved" in said
    assert not multiprocessing.active_children()
    assert hvp("resume", "run", "--workers", "0")[0] == 0
    assert_finished_like(tmp_path / "run", whole)


def _hang_in_one(out: Path, world: World, report: Report) -> None:
    def hang() -> None:
        if world.rank == 1:
            to_workers(signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    torch.manual_seed(0)  # equal weights in both processes
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    parts: dict[str, Any] = {"layer": layer, "optimizer": optimizer}
    precision, console = Precision("fp32", CPU), Console(quiet=True)
    changes = {"data.path": "shapes", "data.shapes.train": 40, "data.workers": 1, "train.epochs": 2}
    config = tiny(SimSiamConfig, "simsiam", SMALL, changes, train__device="cpu")
    rescuer = Rescuer(config, layer, None, world, CPU)  # type: ignore[arg-type]
    source = open_training_data(config)
    with (
        closing(build_loader(config, source, CPU, world)) as loader,
        claimed(out, world, resume=False, overwrite=False) as claim,
        Run("simsiam", config, out, claim, loader, parts, layer, precision, rescuer, console, world) as run,
    ):
        try:
            for epoch in run.epochs:
                for step, (part,) in run.steps(epoch):
                    if step == 1:
                        hang()
                    run.views(part)
                    run.backward(run.model(torch.ones(1, 1)).mean())
                    run.optimize(optimizer)
                    run.record()
        except Stopped as stopped:
            report(str(stopped))
            report(run.step)
    report(len(multiprocessing.active_children()))


def test_a_signal_stops_a_process_waiting_for_its_worker_and_the_process_waiting_for_it(tmp_path):
    out = tmp_path / "run"
    for said, step, left in in_two_processes(partial(_hang_in_one, out), tmp_path):
        assert said.startswith(f"SIGTERM: stopped after step {step} of 10")
        assert step == step_of(out)
        assert left == 0


def test_several_processes_stop_together_and_die_together(tmp_path):
    out = tmp_path / "run"
    process = start(*QUICK, "--epochs", "200", "--out", out, "--devices", "2")
    wait_for_rows(process, out, 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert said.count("hvp: ") == 1
    assert "SIGTERM: stopped after step" in said
    stopped = step_of(out)
    assert rows_of(out)[-1]["step"] == stopped

    process = start("resume", out, "--devices", "2")
    wait_for_rows(process, out, stopped + 3)
    # the launcher's children are the ranks and its own helpers
    victims = [pid for pid in children(process.pid) if b"hvp.cli.main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert step_of(out) >= stopped + 2
