"""The campaign covers every fault and method, its choices depend on the seed alone, and it detects failures."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hvp
from hvp import methods
from tests.faults.campaign import METHODS, plan, report, strike
from tests.faults.cases import STEPS, WHOLE, Case
from tests.faults.commands import Failure, Zygote, alive, check_said
from tests.faults.faults import DAMAGES, FAULTS


class Done:
    """A command that has ended, or never will."""

    pid = 2**22 + 1  # no process has it: Linux counts up to 2**22

    def __init__(self, log: Path, code: int | None, said: str = "") -> None:
        self.log, self.code = log, code
        log.write_text(said)

    def wait(self, seconds: float) -> int | None:
        return self.code


class NoZygote:
    """A stand-in whose commands end with code 0 and write nothing."""

    def start(self, arguments: Sequence[str], log: Path, **surroundings: Any) -> Done:
        return Done(log, 0)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    reference, case = tmp_path / "reference", Case(3, "dino", tmp_path / "case", tmp_path / "reference", NoZygote())
    for folder in (reference, case.out):
        write(folder, torch.arange(3.0))
    return case


def write(folder: Path, weight: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"student": {"weight": weight}, "versions": {"torch": str(folder)}}, folder / "last.pt")
    rows = [f'{{"step": {step + 1}, "loss": {step}}}\n' for step in range(STEPS)]
    (folder / "metrics.jsonl").write_text("".join(rows))


def test_every_fault_meets_every_method():
    assert sorted(METHODS) == sorted(methods.METHODS)
    met = {plan(seed) for seed in range(len(FAULTS) * len(METHODS))}
    assert len(met) == len(FAULTS) * len(METHODS)
    assert {fault for _, fault in map(plan, range(7, 7 + len(FAULTS)))} == set(FAULTS)


def test_choices_depend_on_the_seed_alone(tmp_path: Path):
    seeds = {"a": 1, "b": 1, "c": 2}
    drawn = [Case(seed, "dino", tmp_path / name, tmp_path, NoZygote()).choose.random() for name, seed in seeds.items()]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_equal_run_passes(case: Case):
    case.finish()


@pytest.mark.parametrize("difference", ["one bit", "lacking", "row twice"])
def test_a_differing_run_is_detected(case: Case, difference: str):
    weight = torch.arange(3.0)
    if difference == "one bit":
        weight.view(torch.int32)[2] ^= 1
    write(case.out, weight)
    if difference == "lacking":
        torch.save({"teacher": {"weight": weight}}, case.out / "last.pt")
    if difference == "row twice":
        with (case.out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 10, "loss": 9}\n')
    with pytest.raises(Failure, match=r"differ|lacks"):
        case.finish()


@pytest.mark.parametrize(
    ("code", "said", "problem"),
    [
        (None, "", "still running after 1 s"),
        (1, "", "code 1, not one of"),
        (0, "hvp: stopped\nTraceback (most recent call last):\n", "says 'Traceback'"),
        (0, "Exception ignored in atexit callback", "says 'Exception ignored'"),
    ],
)
def test_a_command_that_does_not_end_cleanly_is_detected(
    case: Case, tmp_path: Path, code: int | None, said: str, problem: str
):
    with pytest.raises(Failure, match=problem):
        case.ended(Done(tmp_path / "0.log", code, said), {0, 130}, 1)


def test_a_process_left_behind_is_detected():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    assert alive(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not alive(process.pid)


def test_a_report_lists_fault_and_logs(case: Case):
    def fault(struck: Case) -> None:
        (struck.folder / "0.log").write_text("last words\n")
        raise Failure("it hangs")

    with pytest.raises(Failure) as failure:
        strike(case, fault)
    said = report(case, str(failure.value))
    assert "it hangs" in said
    assert "fault on dino" in said
    assert "last words" in said


def test_a_zygote_runs_a_command(tmp_path: Path):
    with Zygote() as zygote:
        command = zygote.start(["--version"], tmp_path / "0.log")
        assert command.wait(WHOLE) == 0
    assert hvp.__version__ in command.log.read_text()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_changes_the_file(case: Case, damage):
    path = case.folder / "file"
    path.write_bytes(bytes(range(1, 256)) * 100)
    damage(path, case.choose)
    assert not path.exists() or path.read_bytes() != bytes(range(1, 256)) * 100


def test_logs_without_pythons_messages_pass(tmp_path: Path):
    (tmp_path / "0.log").write_text("hvp: SIGTERM: stopped after step 3 of 10\n")
    check_said(tmp_path / "0.log")
