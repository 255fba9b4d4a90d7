"""The one exception that means: the input is wrong, and here is what to do about it."""


class InputError(ValueError):
    """A fault of the user's: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
