"""hvp resume"""

from pathlib import Path
from typing import Annotated, Any

import typer

from hvp.cli.pretrain import Devices, said_once, train


def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    workers: Annotated[int | None, typer.Option(help="Loader processes; the views do not depend on it.")] = None,
    devices: Devices = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although config.yaml is not what the checkpoint was made with.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint and with the configuration in its folder."""
    from hvp.common.config import read_yaml, resolve
    from hvp.common.engine.run import read_run
    from hvp.methods import get_method

    with said_once():
        method, config = read_run(run)
        layers: list[tuple[str, Any]] = [(str(config), read_yaml(config))]
        if workers is not None:
            layers.append(("--workers", {"data.workers": workers}))
        resolved = resolve(get_method(method).config, layers)
    train(method, resolved.config, run, devices, resume=True, force=force)
