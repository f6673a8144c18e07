"""Every test here may run a command."""

from tests.commands import hvp  # noqa: F401
