"""Patches of the original trainers, which hold our lines and none of the upstream's.

A patch is for one pinned commit of an upstream repository. It lists the files that change, by path and by the SHA-256
of the untouched file, and the line numbers at which our lines are inserted or which they replace. The rest comes from
the user's own clone. patches/README.md describes the format.
"""

import difflib
import errno
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from hvp.common.config.resolving import Section, nearest
from hvp.common.errors import UserError

_NOT_COPIED = (".git", "__pycache__")  # folders of a clone that its patched copy lacks

Span = Annotated[tuple[int, int], Field(strict=False)]  # TOML has arrays, no tuples


class Change(Section):
    """Our lines at one place of a file: an insertion or a replacement."""

    what: str
    """Purpose of the lines, for the table."""

    after: int | None = Field(None, ge=0)
    """Line of the untouched file after which our lines are inserted."""

    replaces: Span | None = None
    """Or first and last line of the untouched file that our lines replace."""

    lines: str
    """Our lines."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.after is None) == (self.replaces is None):
            raise ValueError(f"{self.what}: give either `after` or `replaces`")
        if self.replaces is not None and not 1 <= self.replaces[0] <= self.replaces[1]:
            raise ValueError(f"{self.what}: replaces = {list(self.replaces)} is not a range of lines")
        if not self.lines.endswith("\n"):
            raise ValueError(f"{self.what}: the last line has no line end")
        return self

    @property
    def span(self) -> slice:
        """The lines of the untouched file to remove, as a slice counted from 0; empty for an insertion."""
        if self.after is not None:
            return slice(self.after, self.after)
        assert self.replaces is not None
        return slice(self.replaces[0] - 1, self.replaces[1])

    @property
    def num_removed(self) -> int:
        return self.span.stop - self.span.start

    @property
    def num_added(self) -> int:
        return len(self.lines.splitlines())

    @property
    def place(self) -> str:
        """The place in words, for the table."""
        if self.replaces is None:
            return f"after line {self.after}"
        first, last = self.replaces
        return f"line {first}" if first == last else f"lines {first}-{last}"


class ChangedFile(Section):
    """A file of the upstream's, and our changes to it."""

    path: str
    """Path from the top of the clone, with slashes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the untouched file, with LF line ends."""

    changes: Annotated[tuple[Change, ...], Field(strict=False, min_length=1)]
    """Changes from top to bottom."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for before, after in zip(self.changes, self.changes[1:], strict=False):
            if before.span.stop > after.span.start or before.span == after.span:
                raise ValueError(f"{self.path}: {after.what!r} does not come below {before.what!r}")
        return self

    @property
    def num_added(self) -> int:
        return sum(change.num_added for change in self.changes)

    @property
    def num_removed(self) -> int:
        return sum(change.num_removed for change in self.changes)


class Patch(Section):
    """Our change to one upstream repository."""

    method: str
    """Name of our trainer."""

    upstream: str
    """URL of the repository, as `git clone` takes it."""

    commit: str = Field(pattern="^[0-9a-f]{40}$")
    """Commit for which the line numbers hold."""

    licence: str
    """Licence of the upstream."""

    brings: Annotated[tuple[Literal["HVP", "Rescue"], ...], Field(strict=False, min_length=1)]
    """Features that the patched trainer gains."""

    trainer: str
    """Path of the script that has the flags."""

    needs: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Packages that the trainer imports and hvp does not, by their names on PyPI."""

    files: Annotated[tuple[ChangedFile, ...], Field(strict=False, min_length=1)]

    @property
    def repository(self) -> str:
        """The repository's owner and name."""
        return self.upstream.removeprefix("https://github.com/")

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that our lines add to the trainer's."""
        lines = "".join(change.lines for file in self.files for change in file.changes)
        return tuple(re.findall(r"""add_argument\(\s*["'](--[\w-]+)""", lines))

    @property
    def num_added(self) -> int:
        return sum(file.num_added for file in self.files)

    @property
    def num_removed(self) -> int:
        return sum(file.num_removed for file in self.files)


@dataclass(frozen=True)
class PatchedFile:
    """Content of a file before and after our changes."""

    path: str
    before: bytes
    after: bytes


def patches() -> dict[str, Traversable]:
    """Return the files of the shipped patches, by method."""
    folders = sorted((entry for entry in files("hvp.patches").iterdir() if entry.is_dir()), key=lambda f: f.name)
    found = {folder.name: folder / "patch.toml" for folder in folders}
    return {name: file for name, file in found.items() if file.is_file()}


def find_patch(method: str) -> Traversable:
    """Return the file of a method's shipped patch.

    Raises:
        UserError: there is none.
    """
    known = patches()
    if method not in known:
        raise UserError(f"there is no patch for {method}.{nearest(method, list(known))} Known: {', '.join(known)}")
    return known[method]


def load_patch(method: str) -> Patch:
    """Return the shipped patch of a method. Raises UserError if there is none."""
    return parse_patch(method, find_patch(method).read_text(encoding="utf-8"))


def parse_patch(method: str, text: str) -> Patch:
    """Parse the text of a patch file. Raises ValueError if it is not a patch."""
    return Patch.model_validate({"method": method, **tomllib.loads(text)})


def patched(before: bytes, changes: Sequence[Change]) -> bytes:
    """Return a file's content with the changes. Our lines get the line end of its first line.

    Raises:
        ValueError: a change refers to a line beyond the end of the file.
    """
    lines = before.splitlines(keepends=True)
    end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
    for change in reversed(changes):
        if change.span.stop > len(lines):
            raise ValueError(f"{change.what}: {change.place} of a file of {len(lines)} lines")
        lines[change.span] = [line.encode() + end for line in change.lines.splitlines()]
    return b"".join(lines)


def patch_clone(patch: Patch, upstream: Path) -> tuple[list[PatchedFile], list[str]]:
    """Apply a patch to the files of a clone, in memory.

    Args:
        patch: our patch.
        upstream: the clone, or any other copy of the repository's files.

    Returns:
        The files that change, and remarks for the user.

    Raises:
        UserError: the clone's files are not those that the patch is for.
    """
    if not upstream.is_dir():
        raise UserError(f"{upstream} is not a folder. {_clone_command(patch)}")
    found, wrong, remarks = [], [], []
    for file in patch.files:
        try:
            before = _read(upstream / file.path)
        except FileNotFoundError:
            wrong.append(f"{file.path} is not there{_moved_hint(upstream, file.path)}")
            continue
        except OSError as error:
            raise UserError(f"cannot read {upstream / file.path}: {error.strerror}") from error
        if hashlib.sha256(_with_lf(before)).hexdigest() != file.sha256:
            wrong.append(f"{file.path} differs")
            continue
        found.append(PatchedFile(file.path, before, patched(before, file.changes)))
        if _with_lf(before) != before:
            remarks.append(f"{file.path} has CRLF line ends, and so will our lines; otherwise it is the pinned file")
    commit = _checked_out_commit(upstream)
    if wrong:
        raise UserError(_wrong_files_message(patch, upstream, wrong, commit))
    if commit not in (None, patch.commit):
        remarks.append(
            f"{upstream} is at commit {commit[:12]}, not at {patch.commit[:12]}. The patched files are the "
            "same in both; others may differ"
        )
    return found, remarks


def apply_patch(patch: Patch, upstream: Path, out: Path) -> list[str]:
    """Write a patched copy of a clone.

    A signal that would end the process does so after the unfinished copy is deleted.

    Args:
        patch: our patch.
        upstream: the clone, which stays as it is.
        out: a folder that is empty or does not exist yet. It receives the clone's files, without `.git`.

    Returns:
        Remarks for the user.

    Raises:
        UserError: the clone's files are not those that the patch is for, or `out` cannot be written.
    """
    found, remarks = patch_clone(patch, upstream)
    if out.resolve().is_relative_to(upstream.resolve()):
        raise UserError(f"--out {out} is inside the clone {upstream}, which must not change. Choose a folder outside")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already, and is not overwritten. Choose another --out, or delete it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with _signals_deferred() as check:
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            try:
                _copy_tree(upstream, partial, {upstream / file.path: file.after for file in found}, check)
                os.replace(partial, out)
            except BaseException:
                _make_writable(partial)
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except shutil.Error as error:
        source, target, reason = error.args[0][0]
        raise UserError(f"cannot copy {source} to {target}: {reason}") from error
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return remarks


def is_patched_copy(patch: Patch, upstream: Path, copy: Path) -> bool:
    """Return whether a folder holds the files that `apply_patch()` writes. It may hold others, too.

    Raises:
        UserError: the clone's files are not those that the patch is for, or something cannot be read.
    """
    contents = {file.path: file.after for file in patch_clone(patch, upstream)[0]}
    try:
        for folder, names, files_here in os.walk(upstream):
            names[:] = [name for name in names if name not in _NOT_COPIED]
            for name in files_here:
                if (Path(folder) / name).is_symlink():
                    continue
                path = (Path(folder) / name).relative_to(upstream)
                wanted = contents.get(path.as_posix())
                wanted = _read(upstream / path) if wanted is None else wanted
                if not (copy / path).is_file() or (copy / path).read_bytes() != wanted:
                    return False
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return True


def check_packages(repository: str, names: Iterable[str]) -> None:
    """Check that the packages that a repository's code imports are installed; their names are those on PyPI.

    Raises:
        UserError: a package is missing.
    """
    missing = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"{repository} needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def diff_lines(file: PatchedFile) -> list[str]:
    """Return the unified diff of a file, as `git apply` and `patch -p1` take it. Every line has its line end."""
    before, after = (part.decode("utf-8").splitlines(keepends=True) for part in (file.before, file.after))
    lines = difflib.unified_diff(before, after, f"a/{file.path}", f"b/{file.path}")
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def markdown_table() -> str:
    """Return the table of all our changes to the upstreams, as it stands in patches/README.md."""
    sections = []
    for method in patches():
        patch = load_patch(method)
        lines = [
            f"### {method}: [{patch.repository}]({patch.upstream}/tree/{patch.commit}), {patch.licence}",
            "",
            f"{' and '.join(patch.brings)}; {patch.num_added} lines added, {patch.num_removed} removed.",
            "",
            "| file | where | what | lines |",
            "|---|---|---|---|",
        ]
        for file in patch.files:
            for change in file.changes:
                removed = f" -{change.num_removed}" if change.num_removed else ""
                lines.append(f"| {file.path} | {change.place} | {change.what} | +{change.num_added}{removed} |")
        sections.append("".join(f"{line}\n" for line in lines))
    return "\n".join(sections)


def _with_lf(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")


def _moved_hint(upstream: Path, path: str) -> str:
    """Return a hint at a file of the same name elsewhere in the clone, if there is exactly one."""
    name = path.rpartition("/")[2]
    others = [found.relative_to(upstream).as_posix() for found in upstream.rglob(name)]
    return f" (but {others[0]} is: moved, or is --upstream not the top folder?)" if len(others) == 1 else ""


def _checked_out_commit(clone: Path) -> str | None:
    """Return the commit that is checked out; None where git does not know, as in an unpacked archive."""
    if not (clone / ".git").exists():  # git would answer for a repository around it
        return None
    try:
        done = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _wrong_files_message(patch: Patch, upstream: Path, wrong: list[str], commit: str | None) -> str:
    message = f"{upstream} is not {patch.repository} at commit {patch.commit[:12]}: {', '.join(wrong)}."
    if commit is None:
        return f"{message} {_clone_command(patch)}"
    if commit == patch.commit:
        return (
            f"{message} It has local changes. Stash them with `git -C {upstream} stash`, or keep them and add a "
            f"second tree: git -C {upstream} worktree add OTHER {patch.commit}"
        )
    return f"{message} It is at {commit[:12]}. Check out the pinned commit: git -C {upstream} checkout {patch.commit}"


def _clone_command(patch: Patch) -> str:
    return f"Get a clone: git clone {patch.upstream} DIR && git -C DIR checkout {patch.commit}"


class _Interrupted(BaseException):
    """Stops the copying of files after a signal."""


@contextmanager
def _signals_deferred() -> Iterator[Callable[[], None]]:
    """Defer signals that would end the process until the end of the block.

    Yields:
        A function to call wherever the block may stop; after a signal it leaves the block.
    """
    received: list[int] = []

    def check() -> None:
        if received:
            raise _Interrupted

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # other threads may not install handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, lambda number, _: received.append(number))
    interrupted = False
    try:
        yield check
    except _Interrupted:
        interrupted = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
    if interrupted:  # the handler before ours let the process live
        raise KeyboardInterrupt


def _read(path: Path) -> bytes:
    """Return the content of a regular file. Raises OSError for anything else, such as a named pipe."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def _copy_tree(source: Path, target: Path, contents: dict[Path, bytes], check: Callable[[], None]) -> None:
    """Copy a tree of files without `.git`, and make the copy writable.

    Args:
        source: folder to copy.
        target: folder that receives the files; it exists.
        contents: new contents of some files, by their path in `source`.
        check: called after each file.
    """

    def copy(file: str, to: str) -> None:
        if Path(file) in contents:
            Path(to).write_bytes(contents[Path(file)])
            shutil.copymode(file, to)
        elif not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError("not a regular file")
        else:
            shutil.copy2(file, to)
        check()

    ignored = shutil.ignore_patterns(*_NOT_COPIED)
    shutil.copytree(source, target, symlinks=True, ignore=ignored, copy_function=copy, dirs_exist_ok=True)
    _make_writable(target)


def _make_writable(folder: Path) -> None:
    """Give the owner write permission in a copy of a read-only clone. Folders first, or they could not be opened."""
    for inside, _, names in os.walk(folder):
        for path in (Path(inside), *(Path(inside) / name for name in names)):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o600 | (0o100 if path.is_dir() else 0))
