"""Image folders: the files found, their order, decoding, and the messages for errors."""

import contextlib
import errno
import io
import logging
import os
import pickle
import re
import socket
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from hvp.common.data import BadImage, ImageSource, open_dataset
from hvp.common.data.folder import EXTENSIONS, ImageFolder
from hvp.common.errors import UserError

RED = (200, 30, 40)


def encoded(file_format: str = "PNG", mode: str = "RGB", colour: Any = RED, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, file_format)
    return buffer.getvalue()


PNG = encoded()


def put(root: Path, *names: str, content: bytes = PNG) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def labels(source: ImageSource) -> list[int]:
    numbers = source.labels()
    assert numbers is not None
    return numbers.tolist()


def paths(source: ImageSource) -> list[str]:
    assert isinstance(source, ImageFolder)
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


# Layouts


def test_splits_with_classes(tmp_path):
    put(tmp_path, "train/dog/1.png", "train/cat/2.png", "train/cat/1.png", "val/dog/9.png", "val/emu/8.png")
    train, val = (open_dataset(str(tmp_path), split, labels=True) for split in ("train", "val"))
    assert paths(train) == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert train.classes == ("cat", "dog")
    assert labels(train) == [0, 0, 1]
    assert np.asarray(train.labels()).dtype == np.int64
    assert train.name == f"{tmp_path}/train (3 images, 2 classes)"
    assert val.classes == ("dog", "emu")
    assert val.describe(0) == f"{tmp_path}/val/dog/9.png"


def test_classes_without_splits_are_for_training(tmp_path):
    put(tmp_path, "b/1.png", "a/deeper/1.png")
    source = open_dataset(str(tmp_path), "train", labels=True)
    assert paths(source) == ["a/deeper/1.png", "b/1.png"]
    assert labels(source) == [0, 1]
    with pytest.raises(UserError, match=r"no folder val/ in it\.\n.*ROOT/train/CLASS/\*\.jpg and ROOT/val/CLASS"):
        open_dataset(str(tmp_path), "val")


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_images_without_classes(tmp_path, prefix):
    put(tmp_path, prefix + "z.png", prefix + "a/deep/er/1.png", prefix + "a.png")
    source = open_dataset(str(tmp_path), "train")
    assert paths(source) == ["a.png", "z.png", "a/deep/er/1.png"]
    assert source.classes is None
    assert source.labels() is None
    assert source.read(2).shape == (6, 8, 3)
    with pytest.raises(UserError, match=r"2 images found outside any class folder, such as a\.png"):
        open_dataset(str(tmp_path), "train", labels=True)


def test_the_train_folder_itself(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/2.png")
    assert len(open_dataset(str(tmp_path / "train"), "train", labels=True)) == 2
    with pytest.raises(UserError, match=f"Did you mean {tmp_path}, which holds val/"):
        open_dataset(str(tmp_path / "train"), "val")


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    put(tmp_path, "data/a.png")
    monkeypatch.chdir(tmp_path)
    source = open_dataset("data", "train")
    monkeypatch.chdir("/")
    assert source.read(0).shape == (6, 8, 3)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(put(tmp_path, "data/a.png")))
    assert len(open_dataset("~/data", "train")) == 1


def test_unused_folders_beside_train_are_reported(tmp_path, caplog):
    put(tmp_path, "bus/1.png", "car/1.png", "train/1.png")  # a class that happens to be called train
    open_dataset(str(tmp_path), "train")
    assert "only train is used; also there: bus, car" in caplog.text


# Files found, and their order

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6
)


@settings(max_examples=40)
@given(files=st.sets(st.tuples(st.sampled_from(["b", "a", "a-b", "É", "a b"]), NAMES, st.booleans()), min_size=1))
def test_order_and_labels_equal_torchvisions(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for class_name, name, deep in files:
        folder = root / class_name / ("-" if deep else "")
        put(folder, "n" + name + ".png", "n/" + "m.jpg")  # "a/-/n" sorts between "a/-" and "a/n"
    ours, theirs = ImageFolder(str(root)), datasets.ImageFolder(str(root))
    assert [(ours.path(i), label) for i, label in enumerate(labels(ours))] == theirs.samples
    assert ours.classes == tuple(theirs.classes)


def test_extensions_equal_torchvisions(tmp_path):
    assert EXTENSIONS == datasets.folder.IMG_EXTENSIONS
    names = {f"x{e}" for e in EXTENSIONS} | {f"X{e.upper()}" for e in EXTENSIONS}
    put(tmp_path, *names, "notes.txt", "x.gif", "jpg", ".hidden.jpg", "._x.jpg", ".cache/x.jpg")
    assert set(paths(open_dataset(str(tmp_path), "train"))) == names


def test_files_with_other_extensions_are_reported_once(tmp_path, caplog):
    put(
        tmp_path,
        "train/a/1.png",
        "train/b/1.png",
        "train/a/2.gif",
        "train/b/deep/3.GIF",
        "train/notes.txt",
        "labels.csv",
    )
    assert len(open_dataset(str(tmp_path), "train")) == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}/train: left out 3 files, as only {' '.join(EXTENSIONS)} are read: 2 .gif, 1 .txt"
    )
    caplog.clear()
    (tmp_path / "train/b/deep/3.GIF").unlink()
    (tmp_path / "train/notes.txt").unlink()
    open_dataset(str(tmp_path), "train")
    assert ": left out 1 file, as only " in caplog.text
    caplog.clear()
    (tmp_path / "train/a/2.gif").unlink()
    open_dataset(str(tmp_path), "train")
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["Größe 猫.png", "two words.png", "two\nlines.png", "tab\tand 'quote'.png"])
def test_names_of_any_kind(tmp_path, name):
    source = open_dataset(str(put(tmp_path, f"clässe 1/{name}", "b/1.png")), "train", labels=True)
    index = [os.path.basename(path) for path in paths(source)].index(name)
    assert source.read(index).shape == (6, 8, 3)
    assert source.describe(index).isprintable()


def test_names_that_are_not_text(tmp_path):
    folder = os.fsencode(tmp_path)
    try:
        with open(os.path.join(folder, b"caf\xe9.jpg"), "wb") as file:
            file.write(b"no image")
    except OSError:
        pytest.skip("this file system only allows UTF-8 names")
    source = pickle.loads(pickle.dumps(open_dataset(str(tmp_path), "train")))
    assert source.describe(0).endswith(r"caf\udce9.jpg'")
    with pytest.raises(BadImage) as caught:
        source.read(0)
    str(caught.value).encode()  # prints


def test_links_are_followed_but_not_in_cycles(tmp_path, caplog):
    put(tmp_path, "store/1.png", "data/a/1.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "store")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/2.png").symlink_to(tmp_path / "store/1.png")
    (tmp_path / "data/a/self").symlink_to(tmp_path / "data/a/self")
    source = open_dataset(str(tmp_path / "data"), "train", labels=True)
    assert paths(source) == ["a/1.png", "a/2.png", "b/1.png"]
    assert source.read(2).shape == (6, 8, 3)
    assert "a/up: left out" in caplog.text


def test_an_empty_class_keeps_its_number_and_is_reported(tmp_path, caplog):
    put(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "b").mkdir()
    source = open_dataset(str(tmp_path), "train", labels=True)
    assert labels(source) == [0, 2]
    assert "class folders without images: b" in caplog.text


def test_pickling_is_compact_and_complete(tmp_path):
    put(tmp_path, *(f"class{i % 3}/image {i}.png" for i in range(300)))
    source = open_dataset(str(tmp_path), "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 300 * 40 + 2000  # a path of 21 bytes, its offset and its label
    copy = pickle.loads(pickled)
    assert paths(copy) == paths(source)
    assert (copy.name, copy.classes, labels(copy)) == (source.name, source.classes, labels(source))
    assert np.array_equal(copy.read(299), source.read(299))


def test_indices_out_of_range_are_errors(tmp_path):
    source = open_dataset(str(put(tmp_path, "a.png")), "train")
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


# Messages for errors


def message(spec: object, split: Literal["train", "val"] = "train", *, labels: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(str(spec), split, labels=labels)
    assert not isinstance(caught.value, BadImage)
    return str(caught.value)


def test_a_missing_folder_names_its_neighbour(tmp_path):
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    assert f"{tmp_path} exists; did you mean {tmp_path}/imagenet?" in message(tmp_path / "imagnet" / "train")
    text = message(tmp_path / "imagenet" / "nothing" / "like" / "it")
    assert "no such folder" in text
    assert f"{tmp_path}/imagenet exists." in text
    assert "did you mean" not in text


def test_a_misspelt_embedded_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "embedded dataset is called `shapes`" in message("Shape")
    assert "is empty" in message("")


def test_a_file_instead_of_a_folder(tmp_path):
    put(tmp_path, "images.zip")
    assert message(tmp_path / "images.zip").startswith(f"{tmp_path}/images.zip is a file")
    assert message(tmp_path / "images.zip" / "train").startswith(f"{tmp_path}/images.zip is a file")


def test_an_empty_folder(tmp_path):
    assert f"{tmp_path}: no images in this folder; it is empty." in message(tmp_path)
    (tmp_path / "train").mkdir()
    assert f"{tmp_path}/train: no images in this folder; it is empty." in message(tmp_path)


def test_class_folders_without_images(tmp_path):
    for name in "abc":
        (tmp_path / "train" / name).mkdir(parents=True)
    assert "no images in this folder or in the 3 folders below it.\n" in message(tmp_path)


def test_a_folder_without_images_lists_its_other_files(tmp_path):
    put(tmp_path, "a.txt", "sub/b.TXT", "c.json", "README")
    text = message(tmp_path)
    assert "no images in this folder or in the 1 folder below it; 4 other files there: 2 .txt" in text
    assert "1 without extension" in text
    assert ".jpg .jpeg .png" in text


def test_val_without_train(tmp_path):
    put(tmp_path, "val/a/1.png", "training/a/1.png")
    text = message(tmp_path)
    assert "no folder train/ in it. There is training/" in text


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_val_by_another_name(tmp_path, name):
    put(tmp_path, "train/a/1.png", f"{name}/a/1.png")
    assert f"no folder val/ in it. There is {name}/" in message(tmp_path, "val")


def test_one_class_only_points_to_the_folder_below(tmp_path):
    put(tmp_path, "images/cat/1.png", "images/dog/1.png")
    text = message(tmp_path, labels=True)
    assert "one class folder only, images." in text
    assert f"Did you mean {tmp_path}/images, which holds 2 folders?" in text
    assert len(open_dataset(str(tmp_path), "train")) == 2


def test_one_class_is_enough_to_validate(tmp_path):
    put(tmp_path, "val/cat/1.png")
    assert open_dataset(str(tmp_path), "val", labels=True).classes == ("cat",)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # a mode of 000 does not stop root, and CI may run as root
    assert message(tmp_path) == f"{tmp_path}/b: cannot read the folder: Permission denied."


# Decoding


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", RED, RED),
        ("RGBA", (*RED, 0), RED),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 10), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 77 * 256 + 5, (77, 77, 77)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, colour, expected):
    image = open_dataset(str(put(tmp_path, "a.png", content=encoded("PNG", mode, colour))), "train").read(0)
    assert image.shape == (6, 8, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert (image == expected).all()


def test_a_palette_with_transparency_causes_no_warning(tmp_path):
    picture = Image.new("P", (8, 6), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    source = open_dataset(str(tmp_path), "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (source.read(0) == RED).all()


def test_cmyk_jpeg(tmp_path):
    put(tmp_path, "a.jpg", content=encoded("JPEG", "CMYK", (0, 255, 255, 0)))
    image = open_dataset(str(tmp_path), "train").read(0)
    assert np.abs(image.astype(int) - (255, 0, 0)).max() < 8


def test_sixteen_bit_pgm_keeps_its_grey_levels(tmp_path):
    put(tmp_path, "a.pgm", content=b"P5 2 1 65535\n" + bytes([0x80, 0x00, 0x40, 0x00]))
    assert open_dataset(str(tmp_path), "train").read(0)[0, :, 0].tolist() == [0x80, 0x40]


def test_jpegs_are_not_rotated_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 6), RED).save(tmp_path / "a.jpg", exif=exif)
    assert open_dataset(str(tmp_path), "train").read(0).shape == (6, 8, 3)


def test_content_takes_precedence_over_the_extension(tmp_path):
    put(tmp_path, "a.JPEG", content=PNG)
    put(tmp_path, "b.jpg", content=encoded("GIF", "L", 50))
    source = open_dataset(str(tmp_path), "train")
    assert (source.read(0) == RED).all()
    assert (source.read(1) == 50).all()


def bad(tmp_path: Path, content: bytes, name: str = "a.jpg") -> BadImage:
    source = open_dataset(str(put(tmp_path, name, content=content)), "train")
    with pytest.raises(BadImage) as caught:
        source.read(0)
    assert caught.value.where == source.describe(0) == str(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {caught.value.reason}.\n")
    assert "--on-bad-image skip" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", r"not an image in a known format \(JPEG, PNG"),
        (encoded("JPEG", size=(64, 64))[:-50], "truncated"),
        (encoded("PNG", size=(64, 64))[:60], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "not an image in a known format"),
        (encoded("TIFF", "F", 0.5), "floating-point"),
    ],
    ids=["empty", "html", "truncated-jpeg", "truncated-png", "eps", "float"],
)
def test_files_that_do_not_decode(tmp_path, content, reason):
    assert re.search(reason, bad(tmp_path, content).reason)


def test_a_file_that_is_gone(tmp_path):
    source = open_dataset(str(put(tmp_path, "a/1.png", "b/1.png")), "train")
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)


def test_a_folder_with_the_name_of_an_image(tmp_path):
    put(tmp_path, "a/ok.png", "b/ok.png")
    (tmp_path / "a/x.jpg").mkdir()
    source = open_dataset(str(tmp_path), "train")
    with pytest.raises(BadImage, match=r"a/x\.jpg: a folder, not a regular file"):
        source.read(paths(source).index("a/x.jpg"))


@pytest.mark.parametrize("limit", [30, 20])  # 48 pixels: above the limit Pillow warns, above twice the limit it raises
def test_decompression_bombs(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "decompression bomb" in bad(tmp_path, PNG).reason


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    original=st.sampled_from(
        [encoded(f, size=(16, 12)) for f in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")] + [encoded("GIF", "P", 3)]
    ),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    keep=st.integers(0, 1000),
)
def test_damage_gives_an_image_or_a_bad_image(tmp_path, original, changes, keep):
    content = bytearray(original[:keep])
    for position, value in changes:
        if position < len(content):
            content[position] = value
    source = open_dataset(str(put(tmp_path, "a.png", content=bytes(content))), "train")
    with contextlib.suppress(BadImage):
        image = source.read(0)
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.dtype == np.uint8


def test_bad_images_pickle(tmp_path):
    error = bad(tmp_path, b"")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BadImage
    assert (copy.where, copy.reason, str(copy)) == (error.where, error.reason, str(error))


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_only_regular_files_are_read(tmp_path, kind):
    """Reading a pipe would wait for ever, and a device may have no end."""
    put(tmp_path, "a/ok.png")
    path = tmp_path / "a/x.jpg"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    source = open_dataset(str(tmp_path), "train")
    with pytest.raises(BadImage, match=rf"a/x\.jpg: {kind}, not a regular file\.\n"):
        source.read(1)


def test_too_many_open_files_are_not_blamed_on_the_image(tmp_path, monkeypatch):
    put(tmp_path, "a/ok.png")
    source = open_dataset(str(tmp_path), "train")
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(UserError, match=r"a/ok\.png: cannot be opened: .*\n.*ulimit -n") as caught:
        source.read(0)
    assert not isinstance(caught.value, BadImage)
