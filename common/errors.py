"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """What was wrong, where, and what to do.

    Raised for anything outside the program: arguments, configuration, files, data. The command line prints the
    message without a traceback and exits with code 2; library callers catch it like any other exception.
    """
