"""Folders of images, with class folders or without.

Layouts, for a folder ROOT:

- `ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`, as ImageNet;
- `ROOT/CLASS/*.jpg`, which is a training split alone; so is a ROOT that is itself a `train` folder;
- images anywhere in ROOT or ROOT/train, at any depth, without labels, which pretraining does not need.

The extension decides whether a file is an image. A file with other content is reported when it is read. Files with any
other extension, including .gif, are counted and reported when the folder is opened. Names that start with a dot are
ignored; links are followed.
"""

import difflib
import errno
import logging
import os
import resource
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hvp.common.data.source import BadImage
from hvp.common.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of image files, in lower case; compared case-insensitively. Source: torchvision.datasets.folder."""

# The content need not match the extension: ImageNet holds a PNG called .JPEG, and the web holds GIFs called .jpg.
# Not all of Pillow's formats, because it hands an EPS to an external program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

LAYOUT = "Expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; pretraining needs neither classes nor val."

OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "test")}
"""Common names of a split elsewhere; suggested to the user, never opened as the split."""


class ImageFolder:
    """The images below one folder, an `ImageSource`.

    Images are sorted and classes numbered as in torchvision's `ImageFolder`: classes by name; within a class by folder,
    then by file name. There are labels if no image lies directly in the folder; then every folder in it is a class,
    with images at any depth.

    Paths are kept in one buffer. A million Python strings would be slow to pickle, and every forked worker would copy
    them, page by page, as it counts references to them.

    Args:
        root: an existing folder.

    Raises:
        UserError: the folder, or one below it, cannot be read; or there is no image.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)  # workers may run elsewhere
        top, *below = listings = _walk(self.root)
        counts = [len(listing.lengths) for listing in listings]
        if sum(counts) == 0:
            raise UserError(_no_images(self.root, listings))

        if others := _others(listings):
            logger.warning(
                "%s: left out %s, as only %s are read: %s",
                _shown(self.root),
                _count(others.total(), "file"),
                " ".join(EXTENSIONS),
                _kinds(others),
            )

        self._paths = np.frombuffer(b"".join(listing.paths for listing in listings), dtype=np.uint8)
        self._offsets = np.cumsum([0, *(n for listing in listings for n in listing.lengths)], dtype=np.int64)  # [N + 1]
        self.num_loose = counts[0]
        """Number of images directly in the folder, which have no class."""
        self.classes: tuple[str, ...] | None = None
        self._labels: NDArray[np.int64] | None = None
        name = f"{_shown(self.root)} ({len(self)} images"
        if self.num_loose == 0:
            self.classes = tuple(sorted(top.folders))
            number = {class_name: label for label, class_name in enumerate(self.classes)}
            self._labels = np.repeat([number[listing.class_name] for listing in below], counts[1:]).astype(np.int64)
            name += f", {len(self.classes)} class{'es' if len(self.classes) > 1 else ''}"
            empty = np.flatnonzero(np.bincount(self._labels, minlength=len(number)) == 0)
            if len(empty):
                names = (_shown(self.classes[label]) for label in empty)
                logger.warning("%s: class folders without images: %s", _shown(self.root), _some(names))
        self.name = name + ")"

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no image {index}")
        start, stop = self._offsets[index : index + 2]
        return os.path.join(self.root, os.fsdecode(self._paths[start:stop].tobytes()))

    def read(self, index: int) -> NDArray[np.uint8]:
        """Decode image `index` as the upstreams do, with Pillow and without EXIF rotation; uint8 [H, W, 3], RGB.

        Raises:
            BadImage: the file cannot be opened or decoded, is not a regular file, or is so large that Pillow suspects
                a decompression bomb.
            UserError: this process may not open any more files.
        """
        path = self.path(index)
        try:
            with _QUIET, open(path, "rb", opener=_open_regular) as file, Image.open(file, formats=FORMATS) as image:
                return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on a damaged file
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                raise UserError(
                    f"{_shown(path)}: cannot be opened: this process has too many open files.\n"
                    f"    Allow more (`ulimit -n`, now {limit}), or use fewer workers (--workers)."
                ) from error
            raise BadImage(_shown(path), _reason(error, path)) from error

    def labels(self) -> NDArray[np.int64] | None:
        """Return the class of every image, int64 [N]; None if images lie directly in the folder."""
        return self._labels

    def describe(self, index: int) -> str:
        """Return the file's path; quoted and escaped if it has characters that do not print."""
        return _shown(self.path(index))


def open_folder(spec: str, split: Literal["train", "val"], *, labels: bool = False) -> ImageFolder:
    """Open a split of a folder in one of the layouts above.

    Args:
        spec: the folder, as the user wrote it.
        split: `train` is ROOT/train, or ROOT itself if there are no splits; `val` is ROOT/val.
        labels: whether class folders are required.

    Raises:
        UserError: the folder is missing, is empty, cannot be read, or lacks the split or the labels asked for.
    """
    root = os.path.abspath(os.path.expanduser(spec))
    if not spec or not os.path.isdir(root):
        raise UserError(_no_folder(spec, root))
    has = {name: os.path.isdir(os.path.join(root, name)) for name in ("train", "val")}
    if has[split]:
        folder = os.path.join(root, split)
    elif split == "val" or has["val"]:
        raise UserError(_no_split(root, split))
    else:
        folder = root

    source = ImageFolder(folder)
    if folder != root and not has["val"]:
        others = sorted(name for name in _list(root, "").folders if name not in ("train", *OTHER_NAMES["val"]))
        if others:  # perhaps class folders, one of which happens to be called train
            logger.warning("%s: only train is used; also there: %s", _shown(root), _some(map(_shown, others)))
    if labels:
        _check_labels(source, split)
    return source


class _Quiet:
    """Warning filters while any thread decodes: ignore Pillow's warnings, but raise a suspected decompression bomb.

    A user can do nothing about corrupt EXIF data, or about transparency that is dropped anyway. Filters belong to the
    process, so threads that each set and restored them would restore each other's.
    """

    def __init__(self) -> None:
        self._lock, self._threads = threading.Lock(), 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._threads += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._before.__exit__(None, None, None)


_QUIET = _Quiet()


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert to RGB as Pillow does, but scale 16-bit grey to 8 bits, where Pillow makes all above 255 white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 in its byte orders; and I, in which Pillow opens some 16-bit files
        grey = np.clip(np.array(image), 0, 65535) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))  # a copy: the image's own memory is read-only


KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file; refuse anything else without waiting for it, as it may never begin or end."""
    try:
        file = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        mode = os.stat(path).st_mode  # a socket, or a device that is not there
    else:
        mode = os.fstat(file).st_mode
        if stat.S_ISREG(mode):
            return file
        os.close(file)
    raise ValueError(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")


def _reason(error: Exception, path: str) -> str:
    """Explain why a file did not decode, as part of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return "the file is empty"
        return f"not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


@dataclass(frozen=True)
class _Listing:
    """The direct content of one folder."""

    relative: str
    """The folder, relative to the root of the walk; empty for the root."""

    folders: list[str]
    """Names of the folders in it."""

    paths: bytes
    """Paths of its images relative to the root, sorted, concatenated without a separator."""

    lengths: list[int]
    """Lengths of these paths, bytes."""

    others: Counter[str]
    """Number of other files by extension."""

    identity: tuple[int, int]
    """Device and inode, which identify links to this folder."""

    @property
    def class_name(self) -> str:
        return self.relative.split(os.sep, 1)[0]


def _list(root: str, relative: str) -> _Listing:
    folders, images = [], []
    others: Counter[str] = Counter()
    folder = os.path.join(root, relative)
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                # By name first, so that a million images, or links to them, need no system call each.
                if name.lower().endswith(EXTENSIONS):
                    images.append(name)
                elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    folders.append(name)
                else:
                    others[os.path.splitext(name)[1].lower()] += 1
    except OSError as error:
        raise UserError(f"{_shown(folder)}: cannot read the folder: {error.strerror}.") from error
    prefix = os.path.join(relative, "")
    paths = [os.fsencode(prefix + name) for name in sorted(images)]
    identity = (status.st_dev, status.st_ino)
    return _Listing(relative, folders, b"".join(paths), [len(path) for path in paths], others, identity)


def _walk(root: str) -> list[_Listing]:
    """List the root and every folder below it, sorted by class and then by path."""
    listings = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        relative, above = pending.pop()
        listing = _list(root, relative)
        if listing.identity in above:
            logger.warning("%s: left out, as it is a link to a folder above it", _shown(os.path.join(root, relative)))
            continue
        listings.append(listing)
        pending += [(os.path.join(relative, name), above | {listing.identity}) for name in listing.folders]
    return sorted(listings, key=lambda listing: (listing.class_name, listing.relative))


def _check_labels(source: ImageFolder, split: str) -> None:
    root = _shown(source.root)
    if source.classes is None:
        raise UserError(
            f"{root}: labels are needed, but {_count(source.num_loose, 'image')} found outside any class folder, "
            f"such as {_shown(os.path.basename(source.path(0)))}.\n    {LAYOUT}"
        )
    if split == "train" and len(source.classes) == 1:
        only = os.path.join(source.root, source.classes[0])
        inside = _list(only, "").folders
        hint = f"\n    Did you mean {_shown(only)}, which holds {_count(len(inside), 'folder')}?" if inside else ""
        raise UserError(
            f"{root}: labels are needed, but there is one class folder only, {_shown(source.classes[0])}.{hint}"
            f"\n    {LAYOUT}"
        )


def _no_folder(spec: str, root: str) -> str:
    """Message for a missing folder: its nearest parent that exists, and a similar name there."""
    if not spec:
        return "The name of the dataset is empty. Give the path of a folder of images, or `shapes`."
    # The longest part of the path that exists.
    there, missing = root, ""
    while not os.path.exists(there) and there != os.path.dirname(there):
        there, missing = os.path.split(there)
    if not os.path.isdir(there):
        return f"{_shown(there)} is a file, but a folder of images is needed."
    message = f"{_shown(root)}: no such folder, and no dataset of that name. {_shown(there)} exists"
    try:
        folders = _list(there, "").folders
    except UserError:
        folders = []
    near = difflib.get_close_matches(missing, folders, n=1)
    message += f"; did you mean {_shown(os.path.join(there, near[0]))}?" if near else "."
    if difflib.get_close_matches(spec.lower(), ["shapes"]):
        message += " The embedded dataset is called `shapes`."
    return message


def _no_split(root: str, split: Literal["train", "val"]) -> str:
    message = f"{_shown(root)}: no folder {split}/ in it."
    parent = os.path.dirname(root)
    near = [name for name in OTHER_NAMES[split] if os.path.isdir(os.path.join(root, name))]
    if near:
        message += f" There is {near[0]}/; if you mean that folder, rename it to {split}/, or make a link of that name."
    elif os.path.basename(root) == "train" and os.path.isdir(os.path.join(parent, split)):
        message += f" Did you mean {_shown(parent)}, which holds {split}/?"
    return f"{message}\n    {LAYOUT}"


def _no_images(root: str, listings: list[_Listing]) -> str:
    others = _others(listings)
    num_folders = len(listings) - 1
    message = f"{_shown(root)}: no images in this folder"
    if num_folders:
        message += f" or in the {_count(num_folders, 'folder')} below it"
    if others:
        message += f"; {_count(others.total(), 'other file')} there: {_kinds(others)}"
    elif not num_folders:
        message += "; it is empty"
    return f"{message}.\n    Images are files that end in {' '.join(EXTENSIONS)}. {LAYOUT}"


def _others(listings: Iterable[_Listing]) -> Counter[str]:
    """Count the files that are not images, by extension."""
    return sum((listing.others for listing in listings), Counter[str]())


def _kinds(others: Counter[str]) -> str:
    """List the most common extensions with their counts."""
    kinds = ", ".join(f"{n} {_shown(extension) or 'without extension'}" for extension, n in others.most_common(3))
    return f"{kinds}{', ...' if len(others) > 3 else ''}"


def _shown(path: str) -> str:
    """Format a path for messages: names may hold line breaks, or bytes that are not text."""
    return path if path.isprintable() else ascii(path)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")
