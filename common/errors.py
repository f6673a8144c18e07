"""The exceptions that stand for something other than a mistake in the program."""


class UserError(Exception):
    """What was wrong, where, and what to do.

    Raised for anything outside the program: arguments, configuration, files, data. The command line prints the
    message without a traceback and exits with code 2; library callers catch it like any other exception.
    """


class SharedError(UserError):
    """The mistake of one process or of all, raised in every process of a run.

    Args:
        message: what was wrong; it names the rank where only some processes met it.
        leader: whether this is the process that shows it.
    """

    def __init__(self, message: str, leader: bool):
        super().__init__(message)
        self.leader = leader


class LostProcess(SharedError):
    """This process has lost the others: one of them died, or this one failed where they could not be told."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did so after a step, with a checkpoint.

    Args:
        message: what was left where.
        exit_code: the command line's, by signal: see `hvp.common.training.signals`.
        leader: whether this is the process that shows it.
    """

    def __init__(self, message: str, exit_code: int, leader: bool):
        super().__init__(message)
        self.exit_code = exit_code
        self.leader = leader
