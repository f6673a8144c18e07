"""A campaign of hundreds of faults at random moments of tiny runs; each run must end as if nothing had happened.

    make test-faults SEED=17 COUNT=40

runs the cases of seeds 17 to 56. A seed determines method, fault and moment, so COUNT=1 repeats one case, as far as
timing can be repeated.
"""

import argparse
import re
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

import torch

from hvp.methods import METHODS
from tests.faults.cases import WHOLE, Case, arguments_of
from tests.faults.commands import Failure, Zygote, check_said
from tests.faults.faults import FAULTS, IN_TRAINING, Fault, knn_arguments

LEAKS = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")
"""Lines that triton prints at the end of a forked process about objects held by the zygote."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a case."""

    seed: int
    title: str
    seconds: float
    problem: str = ""
    """The failure, the steps that led to it, and the ends of the logs; empty if the case passed."""


def plan(seed: int) -> tuple[str, Fault]:
    """Return the method and the first fault of a case.

    Any run of as many successive seeds as there are faults has one of each, and the methods take turns.
    """
    turn, number = divmod(seed, len(FAULTS))
    return METHODS[(turn + number) % len(METHODS)], FAULTS[number]


def run_case(seed: int, folder: Path, zygote: Zygote) -> Verdict:
    """Run one case, and remove what it leaves unless something went wrong."""
    method, fault = plan(seed)
    start = time.monotonic()
    case = Case(seed, method, folder / f"seed{seed}", folder / "references" / method, zygote)
    problem = ""
    try:
        strike(case, fault)
    except Failure as failure:
        problem = report(case, str(failure))
    except Exception:  # an error of the campaign itself must not stop the other cases
        problem = report(case, traceback.format_exc())
    else:
        case.clear()
    return Verdict(seed, f"{fault.__name__} on {method}", time.monotonic() - start, problem)


def strike(case: Case, fault: Fault) -> None:
    """Strike with up to three faults, one after the other, then let the run finish.

    Raises:
        Failure: the run does not end as it should.
    """
    for _ in range(3):
        case.note(f"{fault.__name__} on {case.method}")
        fault(case)
        if fault not in IN_TRAINING:
            return
        if case.finished or case.choose.random() < 0.6:
            break
        fault = case.choose.choice(IN_TRAINING)
    case.finish()


def report(case: Case, problem: str) -> str:
    """Return the report of a failed case."""
    lines = [problem, *(f"  {line}" for line in case.notes)]
    for log in sorted(case.folder.glob("*.log")):
        said = [line for line in log.read_text(errors="replace").splitlines() if not LEAKS.match(line)]
        lines += [f"  {log}:", *(f"    {line}" for line in said[-25:])]
    return "\n".join(lines)


def make_reference(method: str, folder: Path, zygote: Zygote) -> Verdict:
    """Run the reference for a method's cases: an undisturbed training run and evaluation."""
    start = time.monotonic()
    out = folder / "references" / method
    log = folder / f"{method}.log"
    training = [*arguments_of(method), "--workers", "0", "--out", str(out)]
    for words in (training, knn_arguments(out, workers=1, result=out / "knn.json")):
        code = zygote.start(words, log).wait(WHOLE)
        check_said(log)
        if code != 0:
            raise Failure(f"hvp {' '.join(words)}: code {code}\n{log.read_text()}")
    return Verdict(-1, f"reference of {method}", time.monotonic() - start)


def main() -> int:
    """Run the campaign and return 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--count", type=int, default=51, help="number of cases, each with a seed of its own")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--only", choices=names, help="only the seeds whose first fault is this one")
    parser.add_argument("--keep", type=Path, help="folder for what failed cases leave; a temporary one if not given")
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="hvp-faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    suitable = (seed for seed in count(options.seed) if options.only in (None, plan(seed)[1].__name__))
    seeds = list(islice(suitable, options.count))
    found = 0
    start = time.monotonic()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork"), initializer=_prepare) as pool:
        methods = sorted({plan(seed)[0] for seed in seeds})
        list(pool.map(_make_reference, methods, [folder] * len(methods)))
        for done in as_completed([pool.submit(_run_case, seed, folder) for seed in seeds]):
            verdict = done.result()
            print(f"seed {verdict.seed:5}  {verdict.seconds:5.1f} s  {verdict.title}", flush=True)
            if verdict.problem:
                found += 1
                print(f"FAILED: {verdict.problem}\n  again: make test-faults SEED={verdict.seed} COUNT=1", flush=True)
    struck = Counter(plan(seed)[1].__name__ for seed in seeds)
    print(f"{len(seeds)} cases: {', '.join(f'{name} {times}' for name, times in sorted(struck.items()))}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{found} failed; {time.monotonic() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU")
    if found:
        print(f"what they left: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if found else 0


_zygotes: list[Zygote] = []
"""The zygote of this process of the pool."""


def _prepare() -> None:
    torch.set_num_threads(1)
    zygote = Zygote().__enter__()
    _zygotes.append(zygote)
    Finalize(None, zygote.__exit__, args=(None, None, None), exitpriority=1)


def _make_reference(method: str, folder: Path) -> Verdict:
    return make_reference(method, folder, _zygotes[0])


def _run_case(seed: int, folder: Path) -> Verdict:
    return run_case(seed, folder, _zygotes[0])
