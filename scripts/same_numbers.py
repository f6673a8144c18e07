"""Record the numbers of short training runs, and compare two recordings bit for bit.

    python scripts/same_numbers.py record before.json         # on the commit before a change
    python scripts/same_numbers.py record after.json          # on the commit after it
    python scripts/same_numbers.py compare before.json after.json

Every method trains twelve steps of its `tiny` preset in seven variants: vanilla, hard views, Rescue, both, both with
gradient accumulation, both in bfloat16, and both in two processes. A recording holds the SHA-256 of every tensor of the
last checkpoint and every logged number that is not a measurement of time or memory. It takes about five minutes on two
cores. Recordings of different machines or PyTorch versions differ by rounding and cannot be compared.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

METHODS = ("dino", "ibot", "simsiam", "simclr", "mocov3", "dinov2")
NO_WARMUP_KEY = ("simsiam",)
"""Methods whose learning rate has no warm-up to switch off."""

HARD, RESCUE = ("--hard-views", "hvp"), ("--rescue", "--set", "rescue.k=4")
VARIANTS = {
    "vanilla": ("--hard-views", "none", "--no-rescue"),
    "hard-views": (*HARD, "--no-rescue"),
    "rescue": ("--hard-views", "none", *RESCUE),
    "both": (*HARD, *RESCUE),
    "accumulate": (*HARD, *RESCUE, "--set", "train.accumulate=2"),
    "bf16": (*HARD, *RESCUE, "--precision", "bf16"),
    "two-processes": (*HARD, *RESCUE, "--devices", "2"),
}
COMMON = (
    *("--preset", "tiny", "--epochs", "1", "--batch-size", "32", "--seed", "0", "--device", "cpu"),
    *("--set", "data.shapes.train=384", "--set", "selection.start=0", "--set", "train.log_every=1"),
)
MEASURED = {"seconds", "images_per_s", "wait_share", "select_share", "peak_memory"}
"""Columns of the log that differ between two runs of the same code."""


def record(path: Path, methods: tuple[str, ...], jobs: int) -> None:
    """Run every method in every variant, `jobs` at a time, and write the recording to `path`.

    Raises:
        SystemExit: a run failed; its output is printed.
    """
    cases = [(method, variant) for variant in VARIANTS for method in methods]
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(map(":".join, cases), pool.map(lambda case: _numbers(*case), cases), strict=True))
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def _numbers(method: str, variant: str) -> dict[str, Any]:
    warmup = () if method in NO_WARMUP_KEY else ("--set", "optim.warmup_epochs=0")
    with tempfile.TemporaryDirectory(prefix="hvp-numbers-") as folder:
        out = Path(folder) / "run"
        command = ["pretrain", method, *COMMON, *warmup, *VARIANTS[variant], "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "hvp.cli.main", *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            sys.exit(f"hvp {' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        content = torch.load(out / "last.pt", weights_only=True)
        content.pop("config")  # a renamed key moves no number
        content.pop("versions")
    print(f"{method} {variant}: loss {rows[-1]['loss']:.6f}", flush=True)
    return {
        "log": [{name: value for name, value in row.items() if name not in MEASURED} for row in rows],
        "checkpoint": dict(_digests(content)),
    }


def _digests(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Name and digest of everything in a checkpoint: SHA-256 of a tensor's bytes, text of anything else."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield where, f"{value.dtype} {list(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _digests(part, f"{where}/{name}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _digests(part, f"{where}/{number}")
    else:
        yield where, repr(value)


def compare(before: Path, after: Path) -> int:
    """Print the first differences of every run, and return the number of runs that differ or are missing."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    bad = 0
    for case in sorted(old.keys() | new.keys()):
        if case not in old or case not in new:
            print(f"{case}: only in {before if case in old else after}")
            bad += 1
            continue
        differences = [
            f"step {a['step']}, {name}: {a.get(name)} -> {b.get(name)}"
            for a, b in zip(old[case]["log"], new[case]["log"], strict=True)
            for name in sorted(a.keys() | b.keys())
            if a.get(name) != b.get(name)
        ]
        one, two = old[case]["checkpoint"], new[case]["checkpoint"]
        differences += [
            f"checkpoint {name}" for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)
        ]
        print(f"{case}: {'identical' if not differences else f'{len(differences)} differences'}")
        for line in differences[:5]:
            print(f"    {line}")
        bad += bool(differences)
    print(f"{len(old.keys() | new.keys()) - bad} identical, {bad} not")
    return bad


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every method in every variant")
    recording.add_argument("file", type=Path)
    recording.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    recording.add_argument("--jobs", type=int, default=2, help="runs at a time")
    comparing = commands.add_parser("compare", help="compare two recordings; exit code 1 if any number differs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.file, tuple(args.methods), args.jobs)
    else:
        sys.exit(bool(compare(args.before, args.after)))


if __name__ == "__main__":
    main()
