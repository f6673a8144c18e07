"""The `hvp` command line, assembled from its commands."""

from typing import Annotated, Any

import typer

import hvp
from hvp.cli import analyze, config, convert, demo, doctor, evaluate, launch, patch, presets, pretrain, resume

app = typer.Typer(
    name="hvp",
    help="Self-supervised pretraining of image encoders on hard views.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
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
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(launch.app, name="launch")
app.add_typer(patch.app, name="patch")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"hvp {hvp.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def command_line() -> Any:
    """Return the root command. Called without arguments, it reads those of the process."""
    command = typer.main.get_command(app)
    _show_flags_without_type(command)
    return command


def _show_flags_without_type(command: Any) -> None:
    """Make the help of a command and its subcommands show `--resume` rather than `--resume <bool>`."""
    get_params = command.get_params

    def without_type(context: Any) -> list[Any]:
        parameters = get_params(context)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters

    command.get_params = without_type
    for part in getattr(command, "commands", {}).values():
        _show_flags_without_type(part)
