"""Checkpoint files with damaged bytes or unusable content."""

import io
import os
import random
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.errors import UserError
from hvp.common.training.archive import DamagedCheckpoint, read_archive, save_sealed

CONTENT = {
    "step": 3,
    "student": {"weight": torch.arange(600.0), "bias": torch.linspace(-1, 1, 7), "count": torch.tensor(5)},
    "optimizer": {"lr": 0.1, "name": "adamw"},
}


def sealed(content: Any = CONTENT) -> bytes:
    file = io.BytesIO()
    save_sealed(content, file)
    return file.getvalue()


def plain(content: Any = CONTENT, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def refused(path: Path, data: bytes) -> bool:
    """Return whether a file is refused; if it is read, check that its content is intact."""
    path.write_bytes(data)
    try:
        content = read_archive(path)
    except DamagedCheckpoint:
        return True
    assert equal(content, CONTENT)
    return False


def damages(data: bytes, end: int, choose: random.Random) -> list[bytes]:
    """Return 200 copies with one bit flipped, and 100 with up to 512 bytes zeroed, somewhere before `end`."""
    copies = [bytearray(data) for _ in range(300)]
    for number, copy in enumerate(copies):
        start = choose.randrange(end)
        if number < 200:
            copy[start] ^= 1 << choose.randrange(8)
        else:
            stop = min(end, start + choose.randrange(1, 513))
            copy[start:stop] = bytes(stop - start)
    return [bytes(copy) for copy in copies if copy != data]


def test_flipped_bits_and_zeroed_blocks_are_refused(tmp_path: Path) -> None:
    data = sealed()
    found = [refused(tmp_path / "x.pt", copy) for copy in damages(data, len(data), random.Random(0))]
    assert len(found) > 250
    assert sum(found) >= len(found) - 2  # damage to the seal's own name leaves a file without a seal


def test_damage_at_the_end_never_reaches_the_content(tmp_path: Path) -> None:
    """Damage to the archive's directory, its end and the seal, where parsers differ in what they overlook."""
    data = sealed()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
    for position in range(start, len(data), 5):
        copy = bytearray(data)
        copy[position] ^= 1 << position % 8
        refused(tmp_path / "x.pt", bytes(copy))


def test_files_without_a_seal_are_checked_against_their_own_checksums(tmp_path: Path) -> None:
    data = plain()
    assert not refused(tmp_path / "x.pt", data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        end = archive.start_dir
    found = [refused(tmp_path / "x.pt", copy) for copy in damages(data, end, random.Random(0))[::3]]
    assert sum(found) > 50  # the rest fills gaps between records


def test_a_sealed_file_is_readable_by_pytorch_and_any_zip_program(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(sealed())
    for mmap in (False, True):
        assert equal(torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap), CONTENT)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"hvp-crc32:")


def test_files_without_any_checksum_are_read(tmp_path: Path) -> None:
    assert not refused(tmp_path / "x.pt", plain(_use_new_zipfile_serialization=False))
    torch.serialization.set_crc32_options(False)
    try:
        data = plain()
    finally:
        torch.serialization.set_crc32_options(True)
    assert not refused(tmp_path / "x.pt", data)


@pytest.mark.parametrize("length", [1, 8, 20, 100, 2000])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    assert refused(tmp_path / "x.pt", sealed()[:length])
    assert refused(tmp_path / "x.pt", sealed()[:-length])


def in_itself() -> dict[str, Any]:
    config: dict[str, Any] = {"model": {}}
    config["model"]["again"] = config
    return config


def many_times_over() -> dict[str, Any]:
    """Return 2 ** 30 entries in 30 small dicts."""
    inner: dict[str, Any] = {}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    return inner


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"config": in_itself()}, "contains itself"),
        ({"args": Namespace(config=in_itself())}, "contains itself"),
        ({"config": many_times_over()}, "has too many entries"),
        ({"w": torch.eye(3).to_sparse()}, "w is a tensor that is sparse"),
        ({"student": {"w": torch.eye(3, device="meta")}}, "student.w is a tensor without values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_content_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "x.pt").write_bytes(sealed(content))
    with torch.serialization.safe_globals([Namespace]), pytest.raises(DamagedCheckpoint, match=f"is damaged: .*{said}"):
        read_archive(tmp_path / "x.pt")


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    for name, said in (("pipe", "is a named pipe"), ("folder", "is a folder"), ("empty", "is empty")):
        with pytest.raises(DamagedCheckpoint, match=f"{name}: {said}, not a checkpoint"):
            read_archive(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match="is a device"):
        read_archive(Path("/dev/zero"))


def test_running_out_of_memory_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    (tmp_path / "x.pt").write_bytes(sealed())
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="not enough memory") as caught:
        read_archive(tmp_path / "x.pt")
    assert not isinstance(caught.value, DamagedCheckpoint)
