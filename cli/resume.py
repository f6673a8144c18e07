"""hvp resume"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hvp.cli.options import Devices, LoaderWorkers, resolve_layers


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="New location of the run's images, if they have moved.", metavar="DIR")
    ] = None,
    workers: LoaderWorkers = None,
    devices: Devices = None,
    force: Annotated[
        bool, typer.Option("--force", help="Resume even if config.yaml differs from the checkpoint's configuration.")
    ] = False,
) -> None:
    """Resume a stopped run from its last checkpoint, with the configuration in its folder."""
    from hvp.cli.start import reported_once, train
    from hvp.common.config.resolving import read_yaml
    from hvp.common.errors import UserError
    from hvp.common.training.folder import read_run

    with reported_once():
        method, file = read_run(run)
        layers: list[tuple[str, Any]] = [(str(file), read_yaml(file))]
        if data is not None:
            layers.append(("--data", {"data.path": data}))
        if workers is not None:
            layers.append(("--workers", {"data.workers": workers}))
        config = resolve_layers(method, layers).config
        path = config.data.path
        if data is None and path not in (None, "", "shapes") and not os.path.isdir(path):
            raise UserError(f"{path}: the run's images are not there. If they have moved, give --data DIR")
    train(method, config, run, devices, resume=True, force=force, data_moved=data is not None)
