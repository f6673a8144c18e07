"""Entry point of the `hvp` command: handles Ctrl-C before the slow imports, then runs the command line in app.py."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hvp.common.errors import LostProcess, SharedError, Stopped, UserError
from hvp.common.training.signals import CommandInterrupts, say_interrupted


def main() -> None:
    """Run the command line.

    An error the user can fix is printed as one message, without a traceback, and exits with code 2; only one of several
    processes prints it. A run stopped by a signal exits with that signal's code.
    """
    with CommandInterrupts() as interrupts:
        try:
            from hvp.cli.app import command_line
            from hvp.cli.output import outlive_readers

            outlive_readers()
            with reported():
                command_line()()
        except BaseException:
            if not interrupts.raised:
                raise
            say_interrupted()  # another exception may have replaced the KeyboardInterrupt
            sys.exit(130)


@contextmanager
def reported() -> Iterator[None]:
    """Print an error that the user can fix as one message, and exit with its code."""
    try:
        yield
    except (SharedError, Stopped) as error:
        from hvp.common.training.distributed import leave_together

        if error.leader:
            print(f"hvp: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcess):
            os._exit(2)  # closing the connections would wait for processes that are gone
        leave_together()
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)
    except UserError as error:
        print(f"hvp: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        # A path that no command checked: too long, or in a folder that cannot be read.
        print(f"hvp: {_short(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _short(path: object) -> str:
    whole = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return whole if len(whole) <= 300 else f"{whole[:100]}... ({len(whole)} characters)"


if __name__ == "__main__":
    main()
