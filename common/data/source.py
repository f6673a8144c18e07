"""What the rest of the package knows about a dataset: images by index, and perhaps labels."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hvp.common.errors import UserError


class ImageSource(Protocol):
    """Images by index. Sources pickle, so that loader workers can hold a copy, and keep no file open."""

    @property
    def name(self) -> str:
        """What messages call it, such as `shapes (train, 6000 images)`."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The name of every label, None where there are no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 [H, W, 3], RGB, C-contiguous and writable.

        Raises:
            BadImage: the image cannot be decoded.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """Class of every image, int64 [N], an index into `classes`; None where there are no labels."""

    def describe(self, index: int) -> str:
        """What messages call image `index`: a file's path, or `shapes train 17`."""


class BadImage(UserError):
    """One image that cannot be decoded.

    Args:
        where: the image as `ImageSource.describe` names it, normally a path.
        reason: why, as part of a sentence.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"{where}: {reason}.\n"
            "    Replace or remove the file, or pass --on-bad-image skip to leave out such files and list them."
        )
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        # Loader workers send it to the main process; the default would rebuild it from the message alone.
        return type(self), (self.where, self.reason)
