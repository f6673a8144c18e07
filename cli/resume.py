"""hvp resume"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hvp.cli.pretrain import Devices, said_once, train, with_absolute_data


def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="Where the run's images are now, if they have moved.", metavar="DIR")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes; the views do not depend on it.")] = None,
    devices: Devices = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although config.yaml is not what the checkpoint was made with.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint and with the configuration in its folder."""
    from hvp.common.config.resolving import read_yaml, resolve
    from hvp.common.errors import UserError
    from hvp.common.training.folder import read_run
    from hvp.methods import get_method

    with said_once():
        method, config = read_run(run)
        layers: list[tuple[str, Any]] = [(str(config), read_yaml(config))]
        if data is not None:
            layers.append(("--data", {"data.path": data}))
        if workers is not None:
            layers.append(("--workers", {"data.workers": workers}))
        resolved = with_absolute_data(resolve(get_method(method).config, layers))
        path = resolved.config.data.path
        if data is None and path not in (None, "", "shapes") and not os.path.isdir(path):
            raise UserError(f"{path}: the run's images are not there. If they have moved, give --data DIR")
    train(method, resolved.config, run, devices, resume=True, force=force, data_moved=data is not None)
