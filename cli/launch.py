"""hvp launch"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hvp.common.errors import UserError

app = typer.Typer(help="Write what starts a command somewhere else.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


# What follows the first word belongs to the command, with `--` before it or without.
@app.command(context_settings={"allow_interspersed_args": False})
def slurm(
    command: Annotated[
        list[str],
        typer.Argument(help="An hvp command after `--`: `-- pretrain dino --preset ...`", show_default=False),
    ],
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each, and processes.", min=1)] = 1,
    cpus_per_task: Annotated[int, typer.Option(help="Cores for each process and its loader.", min=1)] = 8,
    time: Annotated[str, typer.Option(help="Limit after which a run is queued again.", metavar="D-HH:MM:SS")] = (
        "24:00:00"
    ),
    partition: Annotated[str | None, typer.Option(help="Where to queue.", show_default="the cluster's own")] = None,
    account: Annotated[str | None, typer.Option(help="Whom to charge.", show_default="your own")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.", show_default="the cluster's own")] = None,
    mem: Annotated[
        str | None,
        typer.Option(help="Memory of a node, such as 120G.", metavar="SIZE", show_default="the cluster's own"),
    ] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Features that a node must have, such as `a100|h100`.", show_default="none")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="A further option of sbatch, as `--sbatch=--exclusive`; repeatable.", metavar="OPTION"),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="A line of shell before it, as `--setup 'module load cuda'`; repeatable.", metavar="LINE"),
    ] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job.", show_default="METHOD-PRESET")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", metavar="FILE", show_default="to the screen")
    ] = None,
) -> None:
    """Write a batch file that runs a command under Slurm, is queued again when preempted, and resumes.

    `hvp launch slurm --nodes 2 --gpus-per-node 8 --out job.sh -- pretrain dino --preset vitb16-400ep --data DIR`, then
    `sbatch job.sh`.
    """
    from hvp.cli.slurm import SlurmJob, sbatch_script

    name, given = parse(command)
    is_run = name in ("pretrain", "resume")
    if given.get("devices"):
        raise UserError("leave out --devices: Slurm starts the processes, as --nodes and --gpus-per-node say")
    if name == "pretrain":
        command = _for_the_queue(command, given, nodes * gpus_per_node)
    elif not is_run and nodes * gpus_per_node > 1:
        raise UserError(f"hvp {name} is one process: leave out --nodes and --gpus-per-node")
    usual = "hvp-" + name.replace(" ", "-")
    if name == "pretrain":
        usual = f"{given['method']}-{given['preset'] or 'custom'}"
    job = SlurmJob(
        job_name or usual,
        nodes,
        gpus_per_node,
        cpus_per_task,
        time,
        partition,
        account,
        qos,
        mem,
        constraint,
        tuple(sbatch or ()),
        tuple(setup or ()),
    )
    script = sbatch_script(job, command, made_by=sys.argv[1:], resumes=is_run)
    if out is None:
        print(script, end="")
        return
    from hvp.common.training.checkpoint import write_atomically

    if out.exists():
        raise UserError(f"{out}: exists. Remove it, or name another file with --out")
    write_atomically(out, lambda file: file.write(script.encode()))
    print(f"wrote {out}; queue it with: sbatch {shlex.quote(str(out))}")


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command that arguments of `hvp` name, and its parameters, by the command line's own parser.

    Raises:
        UserError: the arguments ask for a help text or the like, and run nothing.
        click.ClickException: what the command itself would say to them.
    """
    from hvp.cli.app import app as hvp

    root = typer.main.get_command(hvp)
    _answer_with_parameters(root, "")
    answer = root.main(list(arguments), prog_name="hvp", standalone_mode=False)
    if not isinstance(answer, tuple):
        raise UserError("the command after `--` runs nothing")
    return answer


def _answer_with_parameters(command: Any, name: str) -> None:
    """Makes every command return its name and its parameters instead of running."""
    if hasattr(command, "commands"):
        for part, inner in command.commands.items():
            _answer_with_parameters(inner, f"{name} {part}".strip())
    else:
        command.callback = lambda **parameters: (name, parameters)


def _for_the_queue(command: list[str], given: dict[str, Any], processes: int) -> list[str]:
    """The arguments of a training run, checked, with its folder and with --resume."""
    from hvp.cli.pretrain import FLAGS, resolve_flags, run_folder

    flags = {key: given[name] for name, key in FLAGS.items()}
    file = None if given["config"] is None else Path(given["config"])
    train = resolve_flags(given["method"], given["preset"], file, flags, list(given["set_"] or [])).config.train
    if given["engine"] == "upstream":
        raise UserError("--engine upstream cannot be queued: the originals resume in ways of their own, or not at all")
    if given["dry_run"]:
        raise UserError("--dry-run trains nothing, so there is nothing to queue")
    if given["overwrite"]:
        raise UserError("--overwrite would delete the run whenever the job is queued again. Delete the folder yourself")
    if train.batch_size % (processes * train.accumulate):
        raise UserError(
            f"train.batch_size = {train.batch_size} does not divide among {processes} processes with train.accumulate "
            f"= {train.accumulate} parts each"
        )
    extra = []
    if given["out"] is None:
        extra += ["--out", str(run_folder(given["method"], given["preset"], train.seed))]
    if not given["resume"]:
        extra.append("--resume")
    return [*command, *extra]
