"""The progress line: its width, how often it is printed, and the time left."""

import io
import re

import pytest
from rich.console import Console

from hvp.common.training import progress
from hvp.common.training.progress import RECENT_STEPS, Progress, TimeLeft

ROW = {
    "step": 1204,
    "epoch": 9,
    "loss": 4.28312,
    "images_per_s": 1234.5,
    "wait_share": 0.031,
    "select_share": 0.414,
    "skipped_steps": 3.0,
}
FIELDS = [
    "step 1204/125100",
    "left 6 d 10:52:12",
    "loss 4.2831",
    "epoch 9/100",
    "1234 images/s",
    "overflows 3",
    "waiting 3%",
    "selecting 41%",
]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def started(console: Console, total: int = 125_100) -> Progress:
    return Progress(console, total_steps=total, epochs=100, first_step=0, selecting_steps=lambda step: 0)


@pytest.mark.parametrize(
    ("width", "fits"), [(140, 8), (120, 8), (116, 8), (115, 7), (80, 5), (60, 3), (40, 2), (16, 1)]
)
def test_a_terminal_shows_the_most_important_fields_that_fit(clock, width, fits):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")
    shown = started(console)
    for step in (1203, 1204):
        shown.advance(step, 9)
        clock[0] += 4.5
    shown.advance(1204, 9)
    shown._row = ROW
    with console.capture() as drawn:
        console.print(shown)
    (line,) = re.sub(r"\x1b\[[\d;]*m", "", drawn.get()).splitlines()
    assert len(line) <= width
    assert line.rstrip("━╸╺ ") == "  ".join(FIELDS[:fits])
    # a bar if there is room for a useful one
    assert ("━" in line) == (width - len("  ".join(FIELDS[:fits])) >= 10)


def test_a_terminal_too_narrow_for_anything_is_no_error():
    console = Console(file=io.StringIO(), force_terminal=True, width=9, color_system=None)
    with console.capture() as drawn:
        console.print(started(console))
    assert drawn.get() == "step 0/12\n"


def test_the_line_is_redrawn_below_notes(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with started(Console(file=out, force_terminal=True, width=80)) as shown:
        shown.show(ROW)
        shown.advance(1204, 9)
        shown.note("epoch 8/100: loss 4.5")
    drawn = out.getvalue()
    assert drawn.index("epoch 8/100: loss 4.5\n") < drawn.rindex("step 1204/125100")
    assert drawn.count("step 1204/125100\n") + drawn.count("images/s\n") == 1  # the last one stays


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(clock, monkeypatch, terminal):
    """The same holds for a terminal that cannot redraw a line."""
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with started(Console(file=out, force_terminal=terminal, width=20), total=40) as shown:
        for step in range(1, 41):
            shown.show({**ROW, "step": step, "epoch": 1 + step // 21, "skipped_steps": 0.0})
            shown.advance(step, 1 + step // 21)
            clock[0] += 1
    lines = out.getvalue().splitlines()
    # in full, whatever the width
    assert lines[1] == "step 11/40  left 0:00:29  loss 4.2831  epoch 1/100  1234 images/s  waiting 3%  selecting 41%"
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/40" for step in (1, 11, 21, 31, 40)]
    assert [line.split("  ")[1] for line in lines] == [f"left {left}" for left in ("-:--:--", *after(29, 19, 9, 0))]
    assert "epoch 2/100" in lines[2]


def after(*seconds: int) -> list[str]:
    return [f"0:00:{second:02}" for second in seconds]


def test_the_first_step_does_not_count_towards_the_time_left(clock):
    shown = started(Console(file=io.StringIO()), total=12)
    for step, now in enumerate((60, 62, 64), start=1):
        clock[0] = now
        shown.advance(step, 1)
    assert shown._left == "0:00:18"


def selecting(step: int) -> int:
    """Return the number of selecting steps left, if every second one of 1000 selects from 500 on."""
    return (500 - max(0, step - 500)) // 2


def test_the_time_left_accounts_for_selecting_steps():
    left = TimeLeft(1000, selecting)
    assert (left.after(0), left.after(1000)) == ("-:--:--", "0:00:00")
    for step in range(10):
        left.add(step, 1.0)
    # 250 of the 990 will select, and their cost is not known yet
    assert left.after(10) == ">0:16:30"
    left.add(500, 3.0)
    assert left.after(501) == "0:16:37"  # 249 that select, 250 that do not
    assert left.after(1000) == "0:00:00"
    alone = TimeLeft(1000, selecting)
    alone.add(500, 3.0)
    assert alone.after(501) == "<0:24:57"
    assert alone.after(999) == "<0:00:03"


def test_the_time_left_forgets_old_steps():
    left = TimeLeft(10_000, lambda step: 0)
    left.add(0, 1000.0)
    for step in range(1, RECENT_STEPS + 1):
        left.add(step, 2.0)
    assert left.after(9_990) == "0:00:20"
