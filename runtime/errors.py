"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the option or file, what is wrong with it and the way out. Commands print
    it without a traceback and exit with `status`."""

    status = 2


class RunError(UserError):
    """A run that had to stop although its command was right, such as one whose loss is not finite."""

    status = 1
