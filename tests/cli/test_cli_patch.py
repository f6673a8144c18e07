"""`hvp patch`: its output, the copies that it writes, and its error messages."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from hvp.patches import patching

TRAINER = "first\nsecond\n"


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A stand-in for an upstream repository, with a patch in place of the shipped ones."""
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
        ("standin", "nowhere", "nowhere is not a folder. Get a clone: git clone https://github.com/owner/standin DIR"),
        ("standin", "standin/.git", "train.py is not there. Get a clone"),
    ],
)
def test_an_error_is_one_message(hvp, clone, command, method, upstream, message):
    out = ["--out", "out"] if command == "apply" else []
    ran = hvp("patch", command, method, "--upstream", upstream, *out)
    assert ran.code == 2
    assert ran.err.startswith("hvp: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
