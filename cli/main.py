"""The `hvp` command."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from hvp.cli import analyze, bench, config, convert, demo, doctor, evaluate, launch, patch, presets, pretrain, resume
from hvp.common.errors import LostProcess, SharedError, Stopped, UserError

# PyTorch's threads wait for each other by spinning, which stalls a step tenfold as soon as anything else wants the
# cores, be it only the loader's workers. Read when PyTorch is imported, which the commands do when they run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    name="hvp",
    help="Self-supervised pretraining of image encoders on hard views.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("pretrain")(pretrain.pretrain)
app.command("resume")(resume.resume)
app.add_typer(evaluate.app, name="eval")
app.command("convert")(convert.convert)
app.add_typer(analyze.app, name="analyze")
app.command("config")(config.config)
app.command("presets")(presets.presets)
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(launch.app, name="launch")
app.add_typer(patch.app, name="patch")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"hvp {version('hvp')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


def main() -> None:
    """Runs the command line. A mistake the user can mend is one message and exit code 2, never a traceback; a run that
    a signal stopped has the signal's code. Of several processes one prints the message."""
    try:
        app()
    except (SharedError, Stopped) as error:
        from hvp.common.engine.distributed import leave_together

        if error.leader:
            print(f"hvp: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcess):
            os._exit(2)  # closing the connections would wait for those that are gone
        leave_together()
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)
    except UserError as error:
        print(f"hvp: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("hvp: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
