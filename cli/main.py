"""The `hvp` command. It handles Ctrl-C before anything that takes time is imported; the command line is in app.py."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hvp.common.errors import LostProcess, SharedError, Stopped, UserError
from hvp.common.training.signals import CommandInterrupts, say_interrupted


def main() -> None:
    """Runs the command line. A mistake the user can mend is one message and exit code 2, never a traceback; a run that
    a signal stopped has the signal's code. Of several processes one prints the message."""
    with CommandInterrupts() as interrupts:
        try:
            _run()
        except BaseException:
            if not interrupts.raised:
                raise
            say_interrupted()  # whatever became of the KeyboardInterrupt on its way
            sys.exit(130)


def _run() -> None:
    from hvp.cli.app import command_line
    from hvp.cli.output import outlive_readers

    outlive_readers()
    with reported():
        command_line()()


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
            os._exit(2)  # closing the connections would wait for those that are gone
        leave_together()
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)
    except UserError as error:
        print(f"hvp: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        # A path that no command asked about: one that is too long, or in a folder that may not be read.
        print(f"hvp: {_short(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _short(path: object) -> str:
    whole = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return whole if len(whole) <= 300 else f"{whole[:100]}... ({len(whole)} characters)"


if __name__ == "__main__":
    main()
