"""Batch file for Slurm."""

import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from hvp.common.errors import UserError
from hvp.common.training.signals import EXIT_CODES

SIGNAL_SECONDS = 120
"""Seconds from SIGUSR1 to the time limit, in which to finish the step and write a checkpoint."""

SAVED_ON_USR1, SAVED_ON_TERM = EXIT_CODES[signal.SIGUSR1], EXIT_CODES[signal.SIGTERM]
"""Exit codes of hvp after SIGUSR1 and after SIGTERM, with a checkpoint saved."""

OWN_OPTIONS = {
    **{name: f"; use hvp's own --{name}" for name in ("job-name", "nodes", "gpus-per-node", "cpus-per-task", "time")},
    **{name: f"; use hvp's own --{name}" for name in ("partition", "account", "qos", "mem", "constraint")},
    **dict.fromkeys(("ntasks-per-node", "requeue", "output", "open-mode", "signal", "ntasks"), ", and relies on it"),
}
"""Options that the batch file sets itself, with the end of the message that refuses each."""


@dataclass(frozen=True)
class SlurmJob:
    """Resources and options of a job."""

    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    """Cores per process; there is one process per GPU."""

    time: str
    """Time limit in sbatch's format."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    """Memory per node in sbatch's format."""

    constraint: str | None = None
    """Required node features."""

    sbatch: Sequence[str] = ()
    """Other options of sbatch, such as `--exclusive`."""

    setup: Sequence[str] = ()
    """Shell lines to run before the command."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d?){0,2}", self.time):
            raise UserError(f"--time {self.time}: must read HH:MM:SS or D-HH:MM:SS, for example 1-12:00:00")
        words = {"job-name": self.name, "partition": self.partition, "account": self.account, "qos": self.qos}
        for option, value in words.items():
            if value is not None and not re.fullmatch(r"[\w.,:@+=%/-]+", value):
                raise UserError(f"--{option} {value!r}: must be one word of letters, digits and . , : @ + = % / _ -")
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            raise UserError(f"--mem {self.mem!r}: must be a number with K, M, G or T, for example 120G, or 0 for all")
        if self.constraint is not None and not re.fullmatch(r"[\w.,:@+=%/&|*()\[\]-]+", self.constraint):
            raise UserError(f"--constraint {self.constraint!r}: must be node features, such as a100|h100")
        for line in self.sbatch:
            if not re.fullmatch(r"--[a-z][a-z0-9-]*([= ][^\x00-\x1f\x7f]+)?", line):
                raise UserError(f"--sbatch {line!r}: must be one option of sbatch, for example --sbatch=--exclusive")
            if (option := re.split("[= ]", line)[0].removeprefix("--")) in OWN_OPTIONS:
                raise UserError(f"--sbatch {line!r}: hvp writes --{option} itself{OWN_OPTIONS[option]}")
        for line in self.setup:
            if not line.strip() or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line):
                raise UserError(f"--setup {line!r}: must be one line of shell. Give --setup once for each line")


RESOURCES = """\
#!/bin/bash
# Made by: hvp {made_by}
# Submit it with `sbatch FILE`, from the folder and the environment (conda, venv) in which hvp should run.
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
# One process per GPU; hvp reads its rank from the environment that srun sets.
#SBATCH --ntasks-per-node={job.gpus_per_node}
#SBATCH --gpus-per-node={job.gpus_per_node}
# Cores for a process and its loader workers.
#SBATCH --cpus-per-task={job.cpus_per_task}
#SBATCH --time={job.time}
{queue}\
# After a preemption or a node failure, Slurm requeues the job; it then appends to its log.
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
"""

EARLY_SIGNAL = f"""\
# {SIGNAL_SECONDS} s before the time limit, the processes that srun started receive SIGUSR1; hvp then saves and stops.
# (`B:USR1` would reach this script only.)
#SBATCH --signal=USR1@{SIGNAL_SECONDS}
"""

MEETING = """
# Rendezvous of the processes: the first node, at a port that two jobs on it are unlikely to share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

"""

RESUMING = """\
# --resume: a requeued job resumes from its last checkpoint. The first time there is none, so training starts from the
#   beginning.
"""

STEP = """\
# --cpus-per-task: srun does not inherit it from the job.
# --wait: seconds until srun kills the remaining processes after the first one has ended.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 \\
    {command}
status=$?

"""

REQUEUE = f"""\
# {SAVED_ON_USR1}: hvp saved before the time limit and has work left.
# {SAVED_ON_TERM}: hvp was terminated. Requeue the job only if that was a preemption.
if [ "$status" -eq {SAVED_ON_USR1} ] ||
   {{ [ "$status" -eq {SAVED_ON_TERM} ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


def sbatch_script(job: SlurmJob, command: Sequence[str], *, made_by: Sequence[str], resumes: bool) -> str:
    """Return a file for `sbatch` that runs an hvp command.

    Args:
        job: the resources.
        command: arguments of `hvp`.
        made_by: arguments of `hvp` that created this file, for its first lines.
        resumes: whether the command saves when stopped by a signal, and resumes when it runs again.
    """
    queue = "".join(
        f"#SBATCH --{option}={value}\n"
        for option in ("partition", "account", "qos", "mem", "constraint")
        if (value := getattr(job, option)) is not None
    )
    queue += "".join(f"#SBATCH {line}\n" for line in job.sbatch)
    parts = [
        RESOURCES.format(job=job, queue=queue, made_by=_one_line(made_by)),
        EARLY_SIGNAL if resumes else "",
        "".join(["\n# From --setup:\n", *(f"{line}\n" for line in job.setup)]) if job.setup else "",
        MEETING,
        RESUMING if resumes else "",
        STEP.format(command=_continued(command)),
        REQUEUE if resumes else "",
        'exit "$status"\n',
    ]
    return "".join(parts)


def _continued(command: Sequence[str]) -> str:
    """Return the command quoted for the shell, with one line per option."""
    lines = ["hvp"]
    for argument in command:
        if argument.startswith("--"):
            lines.append(f"        {shlex.quote(argument)}")
        else:
            lines[-1] += f" {shlex.quote(argument)}"
    return " \\\n".join(lines)


def _one_line(arguments: Sequence[str]) -> str:
    """Return the arguments on one line, as a line break would end the comment they go into."""
    return shlex.join(arguments).replace("\n", " ").replace("\r", " ")
