"""Exceptions for everything that is not a bug in the program."""


class UserError(Exception):
    """An error the user can fix, in arguments, configuration, files or data.

    The message says what was wrong, where, and what to do. The command line prints it without a traceback and exits
    with code 2; library callers catch it like any other exception.
    """


class SharedError(UserError):
    """An error in one process or in all of them, raised in every process of a run.

    Args:
        message: what was wrong; it names the rank where only some processes failed.
        leader: whether this process prints the message.
    """

    def __init__(self, message: str, leader: bool):
        super().__init__(message)
        self.leader = leader


class LostProcess(SharedError):
    """This process has lost the others: one of them died, or this one failed and could not tell them."""


class Stopped(Exception):
    """A signal stopped the run, after a complete step and with a checkpoint.

    Args:
        message: what was saved, and where.
        exit_code: exit code of the command line for that signal: see `hvp.common.training.signals`.
        leader: whether this process prints the message.
    """

    def __init__(self, message: str, exit_code: int, leader: bool):
        super().__init__(message)
        self.exit_code = exit_code
        self.leader = leader
