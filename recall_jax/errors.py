"""The exceptions that mean: not the program but its input or the machine is at fault."""


class InputError(ValueError):
    """A fault of the user's: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class StorageError(InputError):
    """A disk that is full or cannot be read: nothing is wrong with the input as far as it went.

    Work that was finished before is worth keeping.
    """
