"""Patching of a small stand-in for a clone, and of real clones where HVP_UPSTREAMS is set."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvp.common.errors import UserError
from hvp.patches import patching
from hvp.patches.patching import (
    Change,
    Patch,
    apply_patch,
    diff_lines,
    is_patched_copy,
    load_patch,
    markdown_table,
    parse_patch,
    patch_clone,
    patched,
    patches,
)
from tests.upstreams import clone_of

ROOT = Path(__file__).parents[2]
TRAINER = "import tools\n\n\ndef train(steps):\n    for step in range(steps):\n        tools.train(step)\n"
EXPECTED = (
    "import tools\nimport extra\n\n\ndef train(steps):\n    for step in range(steps):\n        extra.train(step)\n"
)


def git(folder: Path, *arguments: object) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path) -> Path:
    """A stand-in for an upstream repository."""
    folder = tmp_path / "clone"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "train.py").write_text(TRAINER)
    (folder / "tools.py").write_text("def train(step): ...\n")
    (folder / "link.py").symlink_to("tools.py")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


@pytest.fixture
def patch(clone) -> Patch:
    return patch_for(git(clone, "rev-parse", "HEAD"))


def patch_for(commit: str) -> Patch:
    text = f"""
        upstream = "https://github.com/owner/standin"
        commit = "{commit}"
        licence = "MIT"
        brings = ["HVP"]
        trainer = "src/train.py"
        [[files]]
        path = "src/train.py"
        sha256 = "{hashlib.sha256(TRAINER.encode()).hexdigest()}"
        [[files.changes]]
        what = "imports"
        after = 1
        lines = "import extra\\n"
        [[files.changes]]
        what = "the call"
        replaces = [6, 6]
        lines = "        extra.train(step)\\n"
    """
    return parse_patch("standin", text)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_patched_copy_is_the_clone_with_our_lines(clone, patch, tmp_path):
    before = content(clone)
    assert apply_patch(patch, clone, tmp_path / "out") == []
    written = content(tmp_path / "out")
    assert written.pop("src/train.py").decode() == EXPECTED
    untouched = {name for name in before if not name.startswith(".git/")} - {"src/train.py"}
    assert written == {name: before[name] for name in untouched}
    assert (tmp_path / "out" / "link.py").is_symlink()
    assert content(clone) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "out"]


def test_git_makes_the_same_of_the_diff(clone, patch, tmp_path):
    apply_patch(patch, clone, tmp_path / "out")
    (file,), _ = patch_clone(patch, clone)
    (tmp_path / "ours.diff").write_text("".join(diff_lines(file)))
    git(clone, "apply", tmp_path / "ours.diff")
    assert (clone / "src" / "train.py").read_bytes() == (tmp_path / "out" / "src" / "train.py").read_bytes()


def test_an_empty_folder_may_be_filled_and_a_full_one_not(clone, patch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    apply_patch(patch, clone, out)
    before = content(out)
    with pytest.raises(UserError, match="exists already, and is not overwritten"):
        apply_patch(patch, clone, out)
    assert content(out) == before


@pytest.mark.parametrize("out", [".", "src/new", "new"])
def test_nothing_is_written_into_the_clone(clone, patch, out):
    before = content(clone)
    with pytest.raises(UserError, match="is inside the clone"):
        apply_patch(patch, clone, clone / out)
    assert content(clone) == before


def test_a_local_change_is_named(clone, patch, tmp_path):
    (clone / "src" / "train.py").write_text(TRAINER + "# mine\n")
    with pytest.raises(UserError) as caught:
        apply_patch(patch, clone, tmp_path / "out")
    message = str(caught.value)
    assert "src/train.py differs" in message
    assert f"git -C {clone} stash" in message
    assert f"worktree add OTHER {patch.commit}" in message
    assert not (tmp_path / "out").exists()


def test_another_commit_is_named_with_the_way_back(clone, patch):
    (clone / "src" / "train.py").write_text("# rewritten\n")
    git(clone, "commit", "--quiet", "-a", "-m", "second")
    with pytest.raises(UserError) as caught:
        patch_clone(patch, clone)
    assert f"It is at {git(clone, 'rev-parse', 'HEAD')[:12]}" in str(caught.value)
    way_back = str(caught.value).partition("pinned commit: git ")[2].split()
    git(clone, *way_back[2:])
    assert patch_clone(patch, clone)[1] == []


def test_another_commit_with_the_same_files_is_a_remark(clone, patch):
    (clone / "README").write_text("new")
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "-m", "second")
    (remark,) = patch_clone(patch, clone)[1]
    assert f"not at {patch.commit[:12]}" in remark


def test_a_moved_file_is_found(clone, patch):
    git(clone, "mv", "src/train.py", "train.py")
    with pytest.raises(UserError, match=r"src/train\.py is not there \(but train\.py is"):
        patch_clone(patch, clone)


def test_the_wrong_top_folder_is_noticed(clone, patch):
    with pytest.raises(UserError, match=r"but clone/src/train\.py is: moved, or is --upstream not the top folder"):
        patch_clone(patch, clone.parent)


def test_no_clone_at_all(patch, tmp_path):
    with pytest.raises(UserError, match=r"not a folder\. Get a clone: git clone https://github.com/owner/standin"):
        patch_clone(patch, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"train\.py is not there\. Get a clone"):
        patch_clone(patch, tmp_path / "empty")


def test_an_unpacked_archive_is_as_good_as_a_clone(clone, patch, tmp_path):
    """Even inside another repository, whose commit does not matter."""
    git(tmp_path, "init", "--quiet")
    archive = tmp_path / "archive"
    (archive / "src").mkdir(parents=True)
    (archive / "src" / "train.py").write_text(TRAINER)
    assert patch_clone(patch, archive)[1] == []


def test_crlf_line_ends_are_kept(clone, patch, tmp_path):
    (clone / "src" / "train.py").write_bytes(TRAINER.replace("\n", "\r\n").encode())
    (remark,) = apply_patch(patch, clone, tmp_path / "out")
    assert "src/train.py has CRLF line ends" in remark
    assert (tmp_path / "out" / "src" / "train.py").read_bytes() == EXPECTED.replace("\n", "\r\n").encode()


def test_a_read_only_clone_makes_a_writable_copy(clone, patch, tmp_path):
    (clone / "src" / "train.py").chmod(0o555)
    (clone / "src").chmod(0o555)
    try:
        apply_patch(patch, clone, tmp_path / "out")
    finally:
        (clone / "src").chmod(0o755)
    assert (tmp_path / "out" / "src").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "src" / "train.py").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_written_is_one_message(clone, patch, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(patching.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=rf"cannot write {re.escape(str(tmp_path / 'out'))}: Permission denied"):
        apply_patch(patch, clone, tmp_path / "out")


def test_a_copy_that_fails_leaves_nothing(clone, patch, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patching.shutil, "copy2", fail)
    with pytest.raises(UserError, match="No space left on device"):
        apply_patch(patch, clone, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


class Ended(BaseException):
    """Stands for the end of the process."""


def end(*_: object) -> None:
    raise Ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_copy_leaves_nothing(clone, patch, tmp_path, monkeypatch, number):
    """A signal arrives while a file is copied, and again while the unfinished copy is deleted."""

    def interrupted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            signal.raise_signal(number)
            return function(*arguments, **options)

        return call

    (clone / "src").chmod(0o555)
    for name in ("copy2", "rmtree"):
        monkeypatch.setattr(patching.shutil, name, interrupted(getattr(patching.shutil, name)))
    before = signal.signal(number, end)
    try:
        with pytest.raises(Ended):
            apply_patch(patch, clone, tmp_path / "out")
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
        (clone / "src").chmod(0o755)
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_a_hangup_that_nohup_ignores_does_not_stop_the_copy(clone, patch, tmp_path, monkeypatch):
    copy2 = patching.shutil.copy2

    def hang_up_and_copy(*files: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return copy2(*files)

    monkeypatch.setattr(patching.shutil, "copy2", hang_up_and_copy)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        apply_patch(patch, clone, tmp_path / "out")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "src" / "train.py").read_text() == EXPECTED


@pytest.mark.parametrize("name", ["src/train.py", "tools.py"])
def test_a_pipe_in_a_clone_is_refused_by_name(clone, patch, tmp_path, name):
    (clone / name).unlink()
    os.mkfifo(clone / name)
    with pytest.raises(UserError, match=rf"cannot (read|copy) {clone}/{name}.*: not a regular file"):
        apply_patch(patch, clone, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_a_pipe_in_a_clone_whose_copy_is_compared(clone, patch, tmp_path):
    apply_patch(patch, clone, tmp_path / "out")
    assert is_patched_copy(patch, clone, tmp_path / "out")
    os.mkfifo(clone / "pipe")
    with pytest.raises(UserError, match=rf"cannot read {clone}/pipe: not a regular file"):
        is_patched_copy(patch, clone, tmp_path / "out")


def test_the_diff_marks_a_missing_last_line_end(tmp_path):
    before = b"a\nb"
    file = patching.PatchedFile("f", before, patched(before, [change(0, 0, "ours\n")]))
    git(tmp_path, "init", "--quiet")
    (tmp_path / "f").write_bytes(before)
    (tmp_path / "ours.diff").write_text("".join(diff_lines(file)))
    git(tmp_path, "apply", "ours.diff")
    assert (tmp_path / "f").read_bytes() == b"ours\na\nb"


def change(start: int, stop: int, lines: str) -> Change:
    place = {"after": start} if start == stop else {"replaces": (start + 1, stop)}
    return Change(what="a change", lines=lines, **place)


@given(st.data())
def test_a_patched_file_is_its_parts_in_order(data):
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    lines = [f"line {i}{end}" for i in range(data.draw(st.integers(1, 12)))]
    bounds = sorted(data.draw(st.sets(st.integers(0, len(lines)), max_size=6)))
    spans = [bounds[i : i + 2] for i in range(0, len(bounds) - 1, 2)]
    changes, expected, done = [], [], 0
    for number, (start, stop) in enumerate(spans):
        ours = [f"ours {number}.{i}" for i in range(data.draw(st.integers(1, 3)))]
        changes.append(change(start, stop, "".join(f"{line}\n" for line in ours)))
        expected += [*lines[done:start], *(f"{line}{end}" for line in ours)]
        done = stop
    expected += lines[done:]
    assert patched("".join(lines).encode(), changes) == "".join(expected).encode()


def test_a_change_below_the_last_line_is_refused():
    with pytest.raises(ValueError, match="after line 3 of a file of 2 lines"):
        patched(b"a\nb\n", [change(3, 3, "ours\n")])


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("after = 1\n", "", "either `after` or `replaces`"),
        ("after = 1\n", "after = 1\nreplaces = [1, 1]\n", "either `after` or `replaces`"),
        ("[6, 6]", "[6, 5]", "not a range of lines"),
        ("after = 1\n", "after = 6\n", "does not come below"),
        ("import extra\\n", "import extra", "the last line has no line end"),
        ('what = "imports"', 'whta = "imports"', "whta"),
        ('commit = "', 'commit = "x', "commit"),
    ],
)
def test_a_malformed_patch_is_refused(replaced, by, message, monkeypatch):
    parse = parse_patch
    monkeypatch.setattr(
        sys.modules[__name__], "parse_patch", lambda method, text: parse(method, text.replace(replaced, by))
    )
    with pytest.raises(ValueError, match=message):
        patch_for("0" * 40)


@pytest.mark.parametrize("method", patches())
def test_shipped_patches_are_well_formed(method):
    patch = load_patch(method)
    assert patch.method == method
    assert patch.trainer in {file.path for file in patch.files}
    for file in patch.files:
        for change in file.changes:
            for line in change.lines.splitlines():
                assert line == line.rstrip()
                assert len(line) <= 120
                assert "\t" not in line


@pytest.mark.parametrize("method", patches())
def test_the_names_that_a_patch_imports_exist(method):
    lines = "".join(change.lines for file in load_patch(method).files for change in file.changes)
    imports = re.findall(r"(?m)^from hvp.*$", lines)
    assert imports
    for line in imports:
        exec(line, {})


def test_the_table_in_the_readme_is_the_generated_one():
    """Regenerate it with `hvp patch list --markdown`."""
    assert (ROOT / "patches" / "README.md").read_text(encoding="utf-8").endswith(f"\n\n{markdown_table()}")


# On real clones.


@pytest.mark.parametrize("method", patches())
def test_a_real_clone_is_patched_compiles_and_shows_the_flags(method, tmp_path):
    patch = load_patch(method)
    clone, out = clone_of(patch), tmp_path / "out"
    assert apply_patch(patch, clone, out) == []
    for file in patch.files:
        compile((out / file.path).read_bytes(), file.path, "exec")
    untouched, ours = (trainer_help(folder, patch.trainer) for folder in (clone, out))
    flags = set(re.findall(r"--[\w-]+", ours)) - set(re.findall(r"--[\w-]+", untouched))
    spelled = {"HVP": {"--use_hvp", "--use-hvp"}, "Rescue": {"--rescue_k", "--rescue-k"}}
    for part in patch.brings:
        assert flags & spelled[part], part


@pytest.mark.parametrize("method", patches())
def test_no_line_of_a_real_clone_stands_in_its_patch(method):
    patch = load_patch(method)
    clone = clone_of(patch)

    def own_lines(text: str) -> set[str]:
        """Return the lines of a text, stripped, except for those that any Python file may have."""
        lines = {line.strip() for line in text.splitlines()}
        return {line for line in lines if re.search(r"\w", line) and line not in {"@torch.no_grad()", ")"}}

    theirs = set().union(*(own_lines(path.read_text(errors="replace")) for path in clone.rglob("*.py")))
    ours = set().union(*(own_lines(change.lines) for file in patch.files for change in file.changes))
    assert ours.isdisjoint(theirs), ours & theirs


def trainer_help(folder: Path, trainer: str) -> str:
    """Return the output of `trainer --help`. Missing packages of the original get stand-ins."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "hvp.benchmarks.originals.on_cpu", trainer, "--help"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
