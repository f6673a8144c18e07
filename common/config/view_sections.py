"""Configuration sections of views: multi-crop (DINO, iBOT, DINOv2), and two views of one distribution (SimSiam,
SimCLR).

A method with other defaults redeclares those fields.
"""

from abc import ABC
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from hvp.common.config.resolving import CropSize, Fraction, Scale, Section
from hvp.common.config.sections import RunConfig, SelectionConfig
from hvp.common.hardviews import Slots
from hvp.common.views import ViewSlot, ViewTransform


class ColorConfig(Section):
    """Colour augmentation of every view."""

    jitter: Fraction = 0.8
    """Probability of colour jitter."""

    brightness: Fraction = 0.4
    """Strength of the brightness jitter: the factor is drawn from 1 +- this."""

    contrast: Fraction = 0.4
    """Strength of the contrast jitter: the factor is drawn from 1 +- this."""

    saturation: Fraction = 0.2
    """Strength of the saturation jitter: the factor is drawn from 1 +- this."""

    hue: float = Field(0.1, ge=0, le=0.5)
    """Strength of the hue jitter: the shift is drawn from +- this, as a fraction of the colour circle."""

    grayscale: Fraction = 0.2
    """Probability of conversion to greyscale."""

    def transform(
        self, size: int, scale: Scale, blur: float, interpolation: Literal["bicubic", "bilinear"]
    ) -> ViewTransform:
        """Return the distribution of a view with this colour augmentation."""
        return ViewTransform(
            size=size,
            scale=scale,
            interpolation=interpolation,
            jitter=self.jitter,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            grayscale=self.grayscale,
            blur=blur,
        )


class MultiCropViews(ColorConfig):
    """Distribution of the views: two global transforms and a local one."""

    global_crops_size: CropSize = 224
    """Height and width of a global crop, pixels."""

    local_crops_size: CropSize = 96
    """Height and width of a local crop, pixels."""

    local_crops_number: int = Field(8, ge=0, le=256)
    """Local crops per image to train on."""

    global_crops_scale: Scale = (0.4, 1.0)
    """Area of a global crop as a fraction of the image's area, (min, max)."""

    local_crops_scale: Scale = (0.05, 0.4)
    """Area of a local crop as a fraction of the image's area, (min, max)."""

    blur_global1: Fraction = 1.0
    """Probability of blur (sigma 0.1 to 2 pixels) in the first global transform."""

    blur_global2: Fraction = 0.1
    """Probability of blur in the second global transform."""

    blur_local: Fraction = 0.5
    """Probability of blur in local crops."""

    solarize: Fraction = 0.2
    """Probability of solarisation (threshold 128) in the second global transform."""


class MultiCropSelection(SelectionConfig):
    """Selection of the crops to train on (HVP)."""

    global_candidates: int = Field(2, ge=1, le=32)
    """Crops sampled for each of the two global transforms. HVP: 2."""

    local_candidates: int = Field(16, ge=0, le=256)
    """Local crops sampled. HVP: 2 for each one kept."""

    global_pairs: Literal["by_transform", "any"] = "by_transform"
    """Pairs of global crops to compare: one of each transform (`by_transform`, HVP's released code) or any two (`any`,
    the paper's count of combinations)."""


MAX_PATCHES = 256**2
"""Largest number of patches of a view: 4096 pixels a side, in patches of 16."""


def check_num_patches(key: str, size: int, patch_size: int) -> None:
    """Check that a view does not have too many patches for a ViT.

    Raises:
        ValueError: it has more than MAX_PATCHES.
    """
    if (patches := (size // patch_size) ** 2) > MAX_PATCHES:
        raise ValueError(
            f"{key} = {size} makes {patches} patches of {patch_size} pixels, but a ViT takes at most {MAX_PATCHES}. "
            "Make the views smaller, or the patches larger"
        )


class MultiCropConfig(RunConfig, ABC):
    """Configuration of a run on two global crops, which are also targets, and local crops."""

    views: MultiCropViews = MultiCropViews()
    selection: MultiCropSelection = MultiCropSelection()

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        views, selection = self.views, self.selection
        if selection.hard_views == "hvp" and selection.local_candidates < views.local_crops_number:
            raise ValueError(
                f"selection.local_candidates = {selection.local_candidates}, but views.local_crops_number = "
                f"{views.local_crops_number} of them are kept. Sample at least as many; HVP samples twice as many"
            )
        return self

    def check_patch_size(self, patch_size: int) -> None:
        """Check that crops consist of whole patches, and of no more than a ViT takes.

        Raises:
            ValueError: they do not.
        """
        for key in ("global_crops_size", "local_crops_size"):
            if getattr(self.views, key) % patch_size:
                raise ValueError(
                    f"views.{key} = {getattr(self.views, key)} is not a multiple of model.patch_size = {patch_size}"
                )
            check_num_patches(f"views.{key}", getattr(self.views, key), patch_size)

    def view_slots(self) -> tuple[ViewSlot, ...]:
        """Views that the loader samples for an image: both global transforms, then local crops."""
        views, selection = self.views, self.selection
        hard = selection.hard_views == "hvp"
        global1 = views.transform(views.global_crops_size, views.global_crops_scale, views.blur_global1, "bicubic")
        global2 = replace(global1, blur=views.blur_global2, solarize=views.solarize)
        num_global = selection.global_candidates if hard else 1
        slots = [
            ViewSlot("global1", global1, candidates=num_global, kept=1),
            ViewSlot("global2", global2, candidates=num_global, kept=1),
        ]
        if views.local_crops_number:
            local = views.transform(views.local_crops_size, views.local_crops_scale, views.blur_local, "bicubic")
            num_local = selection.local_candidates if hard else views.local_crops_number
            slots.append(ViewSlot("local", local, candidates=num_local, kept=views.local_crops_number))
        return tuple(slots)

    def combination_slots(self) -> Slots:
        """Combinations of those views that `select()` compares."""
        return self.slots_of_crops(diagonal=False)

    def logits_bytes(self, images: int, prototypes: int) -> int:
        """Return the size of the logits of all crops to train on, float32, in bytes."""
        return 4 * images * (2 + self.views.local_crops_number) * prototypes

    def slots_of_crops(self, *, diagonal: bool) -> Slots:
        """Return the combinations of two global crops (one of each transform, or any two) and local crops.

        Args:
            diagonal: whether a global crop also has a loss against itself, as in `Slots`.
        """
        candidates = [slot.candidates for slot in self.view_slots()]
        kept = [slot.kept for slot in self.view_slots()]
        if self.selection.global_pairs == "any":
            candidates[:2], kept[:2] = [candidates[0] + candidates[1]], [2]
        return Slots.from_counts(candidates, kept, diagonal=diagonal)


class TwoViews(ColorConfig):
    """Distribution of the views, the same for both."""

    crop_size: CropSize = 224
    """Height and width of a view, pixels."""

    crop_scale: Scale = (0.2, 1.0)
    """Area of a view's crop as a fraction of the image's area, (min, max)."""

    blur: Fraction = 0.5
    """Probability of blur (sigma 0.1 to 2 pixels)."""


class PairSelection(SelectionConfig):
    """Selection of the pair of views to train on (HVP)."""

    candidates: int = Field(4, ge=2, le=64)
    """Views sampled per image, of which one pair is kept. HVP: 4, so 6 pairs."""


class TwoViewConfig(RunConfig, ABC):
    """Configuration of a run on two views of one distribution."""

    views: TwoViews = TwoViews()
    selection: PairSelection = PairSelection()

    def view_slots(self) -> tuple[ViewSlot, ...]:
        """Views that the loader samples for an image: from one distribution, of which a pair is kept."""
        views = self.views
        transform = views.transform(views.crop_size, views.crop_scale, views.blur, "bilinear")
        num_views = self.selection.candidates if self.selection.hard_views == "hvp" else 2
        return (ViewSlot("view", transform, candidates=num_views, kept=2),)

    def combination_slots(self) -> Slots:
        """Combinations of those views that `select()` compares: all pairs."""
        (slot,) = self.view_slots()
        return Slots.from_counts((slot.candidates,), (slot.kept,))
