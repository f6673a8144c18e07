"""hvp config"""

import json
import textwrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hvp.cli.options import MethodArgument


def config(
    method: MethodArgument,
    key: Annotated[
        str | None,
        typer.Argument(help="Only this key, such as `optim.base_lr`, or section, such as `optim`.", show_default=False),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Show this preset's values, too.")] = None,
) -> None:
    """Explain a method's configuration: every key, its meaning, the values it takes and its default.

    `--set KEY=VALUE`, `--config FILE` and the presets all take these keys.
    """
    from hvp.common.config.allowed import allowed_values
    from hvp.common.config.resolving import chosen_keys, leaf_keys, read_yaml, resolve
    from hvp.methods import get_method, get_preset

    config_class = get_method(method).config
    known = leaf_keys(config_class)
    chosen = chosen_keys(key, known)
    defaults = dict(_values(resolve(config_class, [])))
    layers: list[tuple[str, Any]] = [(f"preset {preset}", read_yaml(get_preset(method, preset)))] if preset else []
    resolved = resolve(config_class, layers)
    values = dict(_values(resolved))

    console = Console(highlight=False)
    width = min(console.width, 100)
    if key is None:
        console.print(f"Keys of hvp pretrain {method}, for --set KEY=VALUE and --config FILE:\n", markup=False)
    for name in chosen:
        facts = f"{allowed_values(known[name])}; default {defaults[name]}"
        if name in resolved.sources:
            facts += f"; {resolved.sources[name]}: {values[name]}"
        console.print(Text(name, style="bold"))
        for paragraph in (facts, " ".join((known[name].description or "").split())):
            for line in textwrap.wrap(paragraph, width - 4, break_long_words=False, break_on_hyphens=False):
                console.print(Text(f"    {line}"), soft_wrap=True)


def _values(resolved: Any) -> list[tuple[str, str]]:
    """Return each key with its value as written in YAML."""
    return [(key, json.dumps(value).strip('"')) for key, value, _ in resolved.values()]
