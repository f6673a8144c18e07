"""Start, interruption and output of every command."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TextIO

import pytest
import torch

import hvp as package
from hvp.cli import presets
from hvp.cli.output import _Droppable, _outliving
from hvp.common.training import distributed, signals
from hvp.common.training import session as training
from hvp.common.training.distributed import World, threads_beside_loader


def commands() -> list[list[str]]:
    """Return the words that call each command and group."""
    import typer

    from hvp.cli.app import app

    def below(command, words):
        yield words
        for name, part in getattr(command, "commands", {}).items():
            yield from below(part, [*words, name])

    return list(below(typer.main.get_command(app), []))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help(hvp, words):
    long, short = hvp(*words, "--help"), hvp(*words, "-h")
    assert (long.code, short.code) == (0, 0)
    assert short.out == long.out
    assert "<bool>" not in long.out
    assert "default: ()" not in long.out


def test_the_version(hvp):
    assert hvp("--version").out == f"hvp {package.__version__}\n"


def test_the_shell_completes_commands():
    environment = {**os.environ, "_HVP_COMPLETE": "complete_bash", "COMP_WORDS": "hvp pre", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("hvp")
    done = subprocess.run([command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pretrain", "presets"]


def test_rows_in_a_pipe_are_not_wrapped(hvp, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    rows = [row.strip() for row in hvp("presets").out.splitlines()]
    assert len(rows) > 20
    assert all(re.match(r"(method +preset +description|\w+ +[\w-]+ +\S)", row) for row in rows)
    assert max(map(len, rows)) > 80
    shown = hvp("pretrain", "dino", "--preset", "tiny", "--set", f"data.path={'long/' * 40}", "--dry-run").out
    assert f"{'long/' * 39}long --set" in re.sub(" +", " ", shown)


NAME = "[/]:cat:[bold]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "dino", "--preset", "tiny", "--data", NAME, "--dry-run"],
        ["pretrain", "dino", "--preset", "tiny", "--data", NAME, "--out", NAME],
        ["pretrain", NAME],
        ["pretrain", "dino", "--preset", NAME],
        ["pretrain", "dino", "--set", f"train.{NAME}=1"],
        ["pretrain", "dino", "--config", NAME],
        ["pretrain", "dino", f"--{NAME}"],
        ["resume", NAME],
        ["eval", "knn", NAME, "--data", "shapes"],
        ["convert", NAME, "--to", "timm", "--out", "x.pth"],
        ["analyze", "diversity", NAME, "--data", "shapes"],
        ["presets", NAME],
        ["patch", "check", "dino", "--upstream", NAME],
        ["launch", "slurm", "--", "pretrain", NAME],
    ],
    ids=" ".join,
)
def test_user_input_is_printed_literally(hvp, arguments):
    ran = hvp(*arguments)
    assert ran.code == 2
    assert NAME in ran.out + ran.err


LONG = "long" * 1200


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "dino", "--preset", "tiny", "--data", LONG, "--dry-run"],
        ["pretrain", "dino", "--preset", "tiny", "--data", "shapes", "--out", LONG],
        ["pretrain", "dino", "--preset", "tiny", "--config", LONG],
        ["pretrain", "dino", "--preset", LONG],
        ["resume", LONG],
        ["eval", "knn", LONG, "--data", "shapes"],
        ["eval", "linear", LONG, "--data", "shapes"],
        ["convert", LONG, "--to", "timm", "--out", "x.pth"],
        ["convert", LONG, "--from", "upstream", "--method", "dino", "--preset", "tiny", "--out", "x"],
        ["analyze", "diversity", LONG, "--data", "shapes"],
        ["demo", "--out", LONG],
        ["doctor", "dino", "--preset", "tiny", "--out", LONG],
        ["patch", "check", "dino", "--upstream", LONG],
        ["launch", "slurm", "--out", LONG, "--", "eval", "knn", "x", "--data", "y"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG"),
)
def test_a_path_that_is_too_long_is_one_message(hvp, arguments):
    ran = hvp(*arguments)
    assert ran.code == 2
    assert ran.err.count("hvp: ") == 1


def stream(number: int, dropped: set[int], buffered: bool = True) -> TextIO:
    file = io.FileIO(number, "w", closefd=False)
    raw = io.TextIOWrapper(
        io.BufferedWriter(file) if buffered else file, line_buffering=buffered, write_through=not buffered
    )
    wrapped = _outliving(raw, dropped)
    assert wrapped is not raw
    return wrapped


@pytest.mark.parametrize("buffered", [True, False])
def test_output_without_a_reader_is_dropped(buffered):
    reader, writer = os.pipe()
    to = stream(writer, {errno.EPIPE}, buffered)
    print("read", file=to)
    assert os.read(reader, 9) == b"read\n"
    os.close(reader)
    print("not read", file=to)
    to.close()
    os.close(writer)


def test_results_that_a_full_disk_refuses_are_an_error():
    with open("/dev/full", "wb") as full:
        print("progress", file=stream(full.fileno(), {errno.ENOSPC}))
        with pytest.raises(OSError, match="No space left"):
            _Droppable(full.fileno(), {errno.EPIPE}).write(b"results")


def test_another_exception_does_not_hide_an_interrupt(hvp, monkeypatch):
    def interrupted(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("enforce fail") from None

    written: list[str] = []
    monkeypatch.setattr(presets, "result_console", interrupted)
    monkeypatch.setattr(signals, "_write", written.append)
    assert hvp("presets").code == 130
    assert "".join(written).strip() == "hvp: interrupted"


@pytest.mark.parametrize("where", ["import", "destructor", "twice"])
def test_an_interrupt_where_python_would_print_a_traceback(hvp, monkeypatch, tmp_path, where):
    class Ended(BaseException): ...

    ends: list[int] = []

    def end(code: int) -> None:
        ends.append(code)
        if where != "destructor":
            raise Ended

    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted() -> None:
        if where == "import":
            import_module("interrupts_itself")
        elif where == "destructor":
            Destroyed()
        else:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "interrupts_itself.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    written: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(presets, "result_console", interrupted)
    monkeypatch.setattr(signals, "_write", written.append)
    monkeypatch.setattr(signals.os, "_exit", end)
    with suppress(Ended):
        hvp("presets")
    assert ends == [130]
    if where != "twice":  # there, Ended would have ended the process
        assert written[0].strip() == "hvp: interrupted"


def test_training_on_the_cpu_leaves_cores_to_the_loader(monkeypatch):
    assert [threads_beside_loader(cores) for cores in (1, 2, 4, 16)] == [1, 1, 3, 12]
    monkeypatch.setattr(training, "available_cores", lambda: 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(16)
        for asked, world, device, threads in (
            (None, World(), "cpu", 12),
            (None, World(0, 2, 0, 2), "cpu", 6),
            (None, World(), "cuda", 16),
            ("16", World(), "cpu", 16),
        ):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if asked:
                monkeypatch.setenv("OMP_NUM_THREADS", asked)
            with training._cores_for_loader(torch.device(device), world):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 16
    finally:
        torch.set_num_threads(before)
    assert distributed.threads_beside_loader(2) == 1
