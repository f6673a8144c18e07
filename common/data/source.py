"""The protocol of a dataset: images by index, and perhaps labels."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hvp.common.errors import UserError


class ImageSource(Protocol):
    """Images by index. Sources can be pickled, so that loader workers hold a copy, and keep no file open."""

    @property
    def name(self) -> str:
        """Name for messages, such as `shapes (train, 6000 images)`."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of every label; None without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Read image `index`: uint8 [H, W, 3], RGB, C-contiguous and writable.

        Raises:
            BadImage: the image cannot be decoded.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """Return the class of every image, int64 [N], an index into `classes`; None without labels."""

    def describe(self, index: int) -> str:
        """Name image `index` for messages: a file's path, or `shapes train 17`."""


class BadImage(UserError):
    """An image that cannot be decoded.

    Args:
        where: the image as `ImageSource.describe` names it, normally a path.
        reason: the cause, as part of a sentence.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"{where}: {reason}.\n"
            "    Replace or remove the file, or pass --on-bad-image skip to leave out such files and list them."
        )
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        # Loader workers send it to the main process. By default it would be rebuilt from the message alone.
        return type(self), (self.where, self.reason)
