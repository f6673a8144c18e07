"""Result files of `hvp eval` and `hvp analyze`: their names, and what describes the checkpoint in them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvp.cli.output import result_console, say

if TYPE_CHECKING:
    from hvp.common.evaluation.backbones import BackboneMeta
    from hvp.common.networks import Encoder

NAME_LENGTH = 120


class Place(NamedTuple):
    """Path of a result."""

    path: Path
    asked: bool
    """Given by --out. Otherwise the result must not replace that of another evaluation."""


def result_place(out: Path | None, meta: "BackboneMeta", evaluation: str, given: Mapping[str, Any]) -> Place:
    """Return the path for a result: `out`, or one beside the checkpoint, named after the options.

    Args:
        out: the user's choice. If it cannot be written, that is an error now, before the evaluation.
        meta: the checkpoint. If its folder cannot be written, that is only reported.
        evaluation: name of the evaluation.
        given: options that differ from their defaults; those that are None are left out of the name.

    Raises:
        UserError: `out` cannot be written, or holds something other than a result.
    """
    from hvp.common.errors import UserError
    from hvp.common.evaluation.results import claim_folder, claim_result

    if out is not None:
        claim_result(out)
        return Place(out, asked=True)
    options = "".join(f"-{name}={_short(value)}" for name, value in given.items() if value is not None)
    name = f"{meta.path.stem}-{evaluation}-{meta.which}{options}"
    path = meta.path.with_name(f"{name[:NAME_LENGTH]}.json")
    try:
        claim_folder(path)
    except UserError as error:
        say(f"note: {error}. The result will only be printed; --out FILE saves it")
    return Place(path, asked=False)


def _short(value: Any) -> str:
    """Return an option's value for a file name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(_short, value))
    return re.sub(r"[^\w.,=+-]+", "_", f"{value:g}" if isinstance(value, float) else str(value))


def keep(result: Mapping[str, Any], place: Place) -> None:
    """Write a result that has been printed.

    Raises:
        UserError: it cannot be written.
    """
    from hvp.common.errors import UserError
    from hvp.common.evaluation.results import free_path, write_result

    path, differs = (place.path, []) if place.asked else free_path(place.path, result)
    try:
        write_result(result, path)
    except UserError as error:
        raise UserError(
            f"{error}.\n"
            "    The result is printed above but not saved. To save it, evaluate again with --out FILE in a writable "
            "folder."
        ) from error
    if differs:
        say(f"note: {place.path} holds another evaluation and is kept; it differs in {', '.join(differs)}")
    result_console().print(f"wrote {path}", soft_wrap=True)


def say_origin(encoder: "Encoder", meta: "BackboneMeta") -> None:
    """Print the file and network that the weights come from."""
    from hvp.common.networks import describe_encoder

    say(f"weights: {meta.origin}")
    if meta.note:
        say(f"note: {meta.note}")
    say(f"network: {describe_encoder(encoder)}")


def summary(encoder: "Encoder", meta: "BackboneMeta") -> dict[str, Any]:
    """Return a result's description of the checkpoint."""
    from hvp.common.evaluation.features import weights_digest

    return {**meta.summary(), "weights": weights_digest(encoder)}


def trained_on(meta: "BackboneMeta") -> Mapping[str, Any]:
    """Return the `data` section of the configuration that trained the network; empty if the checkpoint has none."""
    data = (meta.config or {}).get("data")
    return data if isinstance(data, Mapping) else {}


def other_data(meta: "BackboneMeta", data: str) -> str | None:
    """Return the short name of a dataset, or None if the network was trained on it."""
    from hvp.common.data import same_dataset

    if same_dataset(trained_on(meta).get("path"), data):
        return None
    return data if data == "shapes" else Path(data).expanduser().resolve().name
