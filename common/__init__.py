"""What every method shares."""

from hvp.common.hardviews import Selection, Slots, select
from hvp.common.rescue import Rescued, rescue

__all__ = ["Rescued", "Selection", "Slots", "rescue", "select"]
