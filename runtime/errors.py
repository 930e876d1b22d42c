"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the option or file, what is wrong with it and the way out. Commands
    print it without a traceback and exit with `status`."""

    status = 2
    of_one_rank = False  # whether the other ranks do not know of it, so that this one has to print it

    def __str__(self):
        return super().__str__().replace("\n", "\\n")  # a file's name or a recorded value may hold line breaks


class RunError(UserError):
    """A run that had to stop although its command was right, such as one whose loss is not finite."""

    status = 1


class OutOfMemoryError(RunError):
    """The device or the host ran out of memory."""

    of_one_rank = True
