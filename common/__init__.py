"""What every method shares."""

from hvp.common.hardviews import Selection, Slots, select

__all__ = ["Selection", "Slots", "select"]
