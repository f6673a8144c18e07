"""`hvp patch`: what it prints, writes, and says when something is wrong."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hvp.benchmarks.originals.__main__ import command_line as compared
from hvp.benchmarks.released import get_released
from hvp.benchmarks.released import selection as released
from hvp.patches import get_original, patching
from tests.released_standins import SIMSIAM, repository
from tests.upstreams import clone_at, clone_of

TRAINER = "first\nsecond\n"


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A stand-in for an upstream repository, and one for the shipped patches."""
    folder = tmp_path / "standin"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINER)
    git = ["git", "-C", folder, "-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    file = tmp_path / "patch.toml"
    file.write_text(
        f'upstream = "https://github.com/owner/standin"\ncommit = "{commit}"\nlicence = "MIT"\nbrings = ["HVP"]\n'
        f'trainer = "train.py"\n[[files]]\npath = "train.py"\n'
        f'sha256 = "{hashlib.sha256(TRAINER.encode()).hexdigest()}"\n'
        '[[files.changes]]\nwhat = "ours"\nafter = 1\nlines = "between\\n"\n'
    )
    monkeypatch.setattr(patching, "patches", lambda: {"standin": file})
    return folder


def test_patches_are_listed(hvp, clone):
    ran = hvp("patch", "list")
    assert ran.code == 0
    assert {"standin", "owner/standin", "MIT", "HVP", "+1", "-0"} <= set(ran.out.split())


def test_the_list_as_markdown_has_every_change(hvp, clone):
    assert "| train.py | after line 1 | ours | +1 |" in hvp("patch", "list", "--markdown").out


def test_a_clone_is_checked(hvp, clone):
    ran = hvp("patch", "check", "standin", "--upstream", clone)
    assert ran.code == 0
    assert ran.out == f"{clone} can be patched for standin: train.py, 1 lines\n"


def test_a_patched_copy_is_written(hvp, clone, tmp_path):
    assert hvp("patch", "apply", "standin", "--upstream", clone, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "train.py").read_text() == "first\nbetween\nsecond\n"
    assert (clone / "train.py").read_text() == TRAINER


def test_the_diff_is_printed_as_git_takes_it(hvp, clone):
    ran = hvp("patch", "diff", "standin", "--upstream", clone)
    assert ran.out == "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,3 @@\n first\n+between\n second\n"
    subprocess.run(["git", "apply", "--check"], input=ran.out, text=True, cwd=clone, check=True)


def test_a_terminal_gets_colours(hvp, clone, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out = hvp("patch", "diff", "standin", "--upstream", clone).out
    assert "\x1b[32m+between" in out
    assert "\n first\n" in out


def test_stat_counts_the_lines(hvp, clone):
    rows = [line.split() for line in hvp("patch", "diff", "standin", "--upstream", clone, "--stat").out.splitlines()]
    assert rows == [["file", "added", "removed"], ["train.py", "+1", "-0"], ["all", "+1", "-0"]]


def test_a_remark_does_not_disturb_the_diff(hvp, clone):
    (clone / "train.py").write_bytes(TRAINER.replace("\n", "\r\n").encode())
    ran = hvp("patch", "diff", "standin", "--upstream", clone)
    assert ran.code == 0
    assert ran.err.startswith("note: train.py has CRLF line ends")
    assert "+between" in ran.out


@pytest.mark.parametrize("command", ["check", "diff", "apply"])
@pytest.mark.parametrize(
    ("method", "upstream", "message"),
    [
        ("standing", "standin", "there is no patch for standing. Did you mean standin? Known: standin\n"),
        ("standin", "nowhere", "nowhere is no folder. Get a clone: git clone https://github.com/owner/standin DIR"),
        ("standin", "standin/.git", "train.py is not there. Get a clone"),
    ],
)
def test_mistakes_are_one_message(hvp, clone, command, method, upstream, message):
    out = ["--out", "out"] if command == "apply" else []
    ran = hvp("patch", command, method, "--upstream", upstream, *out)
    assert ran.code == 2
    assert ran.err.startswith("hvp: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_what_cannot_be_compared_is_one_message(hvp):
    ran = hvp("nosuch", "--upstream", "anywhere", main=compared)
    assert ran.code == 2
    assert ran.err.startswith(
        "hvp: nosuch is not compared with its original, nor started by --engine upstream. Those that are: dino, "
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dinov2", "ibot", "mocov3", "simclr", "simsiam"])
def test_the_patched_original_agrees_with_our_trainer(hvp, method):
    """On a real clone, where HVP_UPSTREAMS names one."""
    for package in get_original(method).needs:
        pytest.importorskip(package)
    ran = hvp(method, "--upstream", clone_of(patching.load_patch(method)), main=compared)
    assert ran.code == 0, ran.out + ran.err
    assert f"{method}: 20 steps of ours and of" in ran.out


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("simsiam", [], "nothing to compare with. Give --upstream DIR, --hvp-code DIR, or both\n"),
        (
            "mocov3",
            ["--hvp-code", "."],
            "HVP's authors released no code for mocov3. They did for dino, ibot, simsiam, sim",
        ),
        (
            "dinov2",
            ["--hvp-code", "."],
            "HVP's authors released no code for dinov2. They did for dino, ibot, simsiam, sim",
        ),
        (
            "simsiam",
            ["--hvp-code", "nowhere"],
            "nowhere is no folder. Get a clone: git clone https://github.com/automl/hvp",
        ),
    ],
)
def test_no_code_to_compare_with_is_one_message(hvp, method, options, message):
    ran = hvp(method, *options, main=compared)
    assert ran.code == 2
    assert ran.err.startswith(f"hvp: {message}")
    assert ran.err.count("\n") == 1
    assert ran.out == ""


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.001, 1)])
def test_a_selection_is_compared(hvp, monkeypatch, tmp_path, scale, code):
    commit, losses = repository(tmp_path / "clone", SIMSIAM), get_released("simsiam").pair_losses
    there = replace(get_released("simsiam"), commit=commit, pair_losses=lambda batch: scale * losses(batch))
    monkeypatch.setattr("hvp.benchmarks.released.simsiam.RELEASED", there)
    monkeypatch.setattr(released, "NUM_BATCHES", 1)
    ran = hvp("simsiam", "--hvp-code", tmp_path / "clone", main=compared)
    assert ran.code == code
    assert f"automl/hvp at {commit[:7]}, branch main: select_crops.select_crops_cross.\n" in ran.out
    assert [line.split()[:5] for line in ran.out.splitlines() if line.startswith(" random")] == [
        ["random", "outputs", "32", "32", "0"]
    ]


@pytest.mark.parametrize("method", ["dino", "ibot", "simsiam", "simclr"])
def test_the_released_selection_agrees_with_ours(hvp, method):
    """On a real clone, where HVP_UPSTREAMS names one."""
    ran = hvp(method, "--hvp-code", clone_at(released.REPOSITORY, "hvpcode"), main=compared)
    assert ran.code == 0, ran.out + ran.err
    rows = {line.split("outputs")[0].strip(): line.split("outputs")[1].split() for line in ran.out.splitlines()[2:4]}
    assert rows.keys() == {"random", "network"}
    for name, images in (("random", 256), ("network", 64)):
        assert rows[name][0] == str(images)
        assert int(rows[name][1]) >= images - 1


@pytest.mark.parametrize(
    ("method", "name", "wrong"),
    [("simclr", "TEMPERATURE", 0.11), ("ibot", "WEIGHTS", {"lambda1": 1.0, "lambda2": 0.6}), ("dino", "EPOCH", 6)],
)
def test_a_loss_of_ours_with_another_value_is_seen(hvp, monkeypatch, method, name, wrong):
    """The same, with ours alone set wrongly: their side runs in a process of its own."""
    clone = clone_at(released.REPOSITORY, "hvpcode")
    monkeypatch.setattr(f"hvp.benchmarks.released.{method}.{name}", wrong)
    assert hvp(method, "--hvp-code", clone, main=compared).code == 1
