"""hvp pretrain"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hvp.cli import options


def pretrain(
    method: options.MethodArgument,
    preset: options.Preset = None,
    data: options.Data = None,
    out: options.RunFolder = None,
    hard_views: Annotated[
        Literal["none", "hvp"] | None, typer.Option(help="Train on hard views, or on random ones as upstream does.")
    ] = None,
    rescue: Annotated[
        bool | None,
        typer.Option(
            "--rescue/--no-rescue", help="Add a strong view of each batch's easiest images.", show_default=False
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    precision: Annotated[options.Precision | None, typer.Option(help="Autocast precision.")] = None,
    device: Annotated[options.Device | None, typer.Option(help="Device to train on.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    workers: options.LoaderWorkers = None,
    loader: Annotated[
        Literal["fast", "pil"] | None, typer.Option(help="Make views fast, or with Pillow as upstream does.")
    ] = None,
    on_bad_image: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="Stop at a file that does not decode, or use another image instead."),
    ] = None,
    config: options.ConfigFile = None,
    set_: options.Assignments = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0 saves once per epoch.", metavar="STEPS")
    ] = None,
    devices: options.Devices = None,
    engine: Annotated[
        Literal["hvp", "upstream"], typer.Option(help="Our trainer, or the original one with our patch.")
    ] = "hvp",
    upstream: Annotated[
        Path | None, typer.Option(help="With --engine upstream: your clone of the original.", metavar="DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the folder first.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume even if the configuration differs.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print every value and its origin, the steps and the memory; do not train."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="With --dry-run: time a few real steps, with and without hard views."),
    ] = False,
) -> None:
    """Pretrain an encoder.

    Values come from the defaults, then the preset, then --config, then the other options; later ones win.
    `hvp config dino` explains every key that --set accepts; `--dry-run` shows the values of this run.

    SIGINT, SIGTERM and SIGUSR1 stop the run after the current step, with a checkpoint; the exit codes are 130, 143 and
    75 (requeue). `hvp resume` continues it. An error that you can fix exits with code 2.
    """
    given = locals()
    from hvp.cli.start import reported_once, train, train_original
    from hvp.common.errors import UserError

    with reported_once():
        ours = [name for name in ("resume", "overwrite", "force", "measure") if given[name]]
        if engine == "upstream" and ours:
            raise UserError(f"--{ours[0]} works with our own engine only. Leave out --{ours[0]} or --engine upstream")
        if (engine == "upstream") != (upstream is not None):
            raise UserError("--engine upstream and --upstream DIR, your clone of the original, go together")
        resolved = options.resolve_parameters(given)
    usual = options.run_folder(method, preset, resolved.config.train.seed)
    if upstream is not None:
        out = out or usual.with_name(f"{usual.name}-upstream")  # beside a run of our own trainer
        train_original(method, resolved, upstream, out, devices, dry_run=dry_run)
        return
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if measure and not dry_run:
        raise typer.BadParameter("--measure needs --dry-run: it times a few steps and leaves nothing behind")
    if dry_run:
        from hvp.cli.dry_run import show, show_costs

        show(method, resolved)
        if measure:
            show_costs(method, resolved.config)
        return
    train(method, resolved.config, out or usual, devices, resume=resume, overwrite=overwrite, force=force)
