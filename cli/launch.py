"""hvp launch"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hvp.cli.options import resolve_parameters, run_folder
from hvp.common.errors import UserError

app = typer.Typer(help="Prepare a command for a batch system.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


# Everything after the first word belongs to the command, with or without `--` before it.
@app.command(context_settings={"allow_interspersed_args": False})
def slurm(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(help="hvp command after `--`, such as `-- pretrain dino --preset ...`", show_default=False),
    ],
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node, with one process each.", min=1)] = 1,
    cpus_per_task: Annotated[int, typer.Option(help="Cores per process, shared with its loader workers.", min=1)] = 8,
    time: Annotated[
        str, typer.Option(help="Time limit of a job; a run that reaches it is requeued.", metavar="D-HH:MM:SS")
    ] = ("24:00:00"),
    partition: Annotated[str | None, typer.Option(help="Partition to queue in.", show_default="the cluster's")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.", show_default="your own")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.", show_default="the cluster's")] = None,
    mem: Annotated[
        str | None,
        typer.Option(help="Memory per node, such as 120G.", metavar="SIZE", show_default="the cluster's"),
    ] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Required node features, such as `a100|h100`.", show_default="none")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Another sbatch option, such as `--sbatch=--exclusive`; repeatable.", metavar="OPTION"),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="Shell line to run first, such as `--setup 'module load cuda'`; repeatable.", metavar="LINE"),
    ] = None,
    job_name: Annotated[str | None, typer.Option(help="Job name.", show_default="METHOD-PRESET")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", metavar="FILE", show_default="standard output")
    ] = None,
) -> None:
    """Write a batch file for Slurm that runs a command, and requeues and resumes an interrupted training run.

    Example: `hvp launch slurm --nodes 2 --gpus-per-node 8 --out job.sh -- pretrain dino --preset vitb16-400ep --data
    DIR`, then `sbatch job.sh`.
    """
    from hvp.cli.slurm import SlurmJob, sbatch_script

    name, given = parse(context.find_root(), command)
    is_run = name in ("pretrain", "resume")
    if given.get("devices"):
        raise UserError("leave out --devices: Slurm starts the processes that --nodes and --gpus-per-node ask for")
    if name == "pretrain":
        command = _for_the_queue(command, given, nodes * gpus_per_node)
    elif not is_run and nodes * gpus_per_node > 1:
        raise UserError(f"hvp {name} is a single process: leave out --nodes and --gpus-per-node")
    if job_name is None:
        job_name = "hvp-" + name.replace(" ", "-")
        if name == "pretrain":
            job_name = f"{given['method']}-{given['preset'] or 'custom'}"
    more = sbatch or (), setup or ()
    job = SlurmJob(job_name, nodes, gpus_per_node, cpus_per_task, time, partition, account, qos, mem, constraint, *more)
    script = sbatch_script(job, command, made_by=sys.argv[1:], resumes=is_run)
    if out is None:
        print(script, end="")
        return
    from hvp.common.training.checkpoint import write_atomically

    if out.exists():
        raise UserError(f"{out}: already exists. Remove it, or give another file with --out")
    write_atomically(out, lambda file: file.write(script.encode()))
    print(f"wrote {out}; queue it with: sbatch {shlex.quote(str(out))}")


def parse(root: Any, arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Parse the arguments of `hvp` without running anything.

    Args:
        root: the root command's context.
        arguments: the arguments that follow `hvp`.

    Returns:
        Name of the command, such as `eval knn`, and its parameters.

    Raises:
        UserError: the arguments ask for a help text or the like, and run nothing.
        typer.BadParameter: the command itself would refuse the arguments (or another of Click's usage errors).
    """
    context, words, names = root, list(arguments), []
    try:
        while isinstance(group := context.command, TyperGroup):
            name, command, words = group.resolve_command(context, words)
            assert command is not None  # an unknown command has raised a usage error
            context = command.make_context(name, list(words), parent=context)
            names.append(command.name or "")
    except typer.Exit as error:
        raise UserError("the command after `--` runs nothing") from error
    return " ".join(names), context.params


def _for_the_queue(command: list[str], given: dict[str, Any], processes: int) -> list[str]:
    """Return the arguments of a training run, checked, with its folder and --resume."""
    train = resolve_parameters(given).config.train
    if given["engine"] == "upstream":
        raise UserError("--engine upstream cannot be queued: the originals resume in their own ways, or not at all")
    if given["dry_run"]:
        raise UserError("--dry-run does not train, so there is nothing to queue")
    if given["overwrite"]:
        raise UserError("--overwrite would delete the run whenever the job is requeued. Delete the folder yourself")
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
