"""Errors that the user can correct."""

import contextlib
import re


class UserError(ValueError):
    """Bad input, printed as one line, "{where}: {problem}; {way_out}", without a traceback; commands exit with `status`.

    where: the option, "--lr" or "--lr 7", or the file. problem: what is wrong. way_out: what to do, which works when it is
    followed. UserError(text) takes the whole line; its where is what stands before the first colon."""

    status = 2
    of_one_rank = False  # whether the other ranks do not know of it, so that this one has to print it
    shared = False  # whether all ranks raise it, see Context.together

    def __init__(self, where, problem=None, way_out=None):
        super().__init__(*(part for part in (where, problem, way_out) if part is not None))  # what it is pickled by
        if problem is None:
            where, colon, problem = str(where).partition(": ")
            where, problem = (where, problem) if colon else (None, where)
        self.where, self.problem, self.way_out = where, problem, way_out

    def __str__(self):
        text = f"{self.problem}; {self.way_out}" if self.way_out else f"{self.problem}"
        text = f"{self.where}: {text}" if self.where else text
        return text.replace("\n", "\\n")  # a file's name or a recorded value may hold line breaks


@contextlib.contextmanager
def about(where, option=None):
    """Let a UserError of the block name `where`, the option that the user has given or a file, in place of the option that
    it names. option: rename this one alone, wherever the error names it. Errors about files stay as they are."""
    try:
        yield
    except UserError as error:
        if option is not None:
            name = re.compile(rf"(?<![\w-]){re.escape(option)}(?![\w-])")
            parts = (part and name.sub(lambda _: where, str(part)) for part in (error.where, error.problem, error.way_out))
            error.where, error.problem, error.way_out = parts
        elif str(error.where).startswith("--"):
            value = str(error.where).partition(" ")[1:] if where.startswith("--") and " " not in where else ()
            error.where = where + "".join(value)
        raise


class RunError(UserError):
    """A run that had to stop although its command was right, such as one whose loss is not finite."""

    status = 1


class OutOfMemoryError(RunError):
    """The device or the host ran out of memory."""

    of_one_rank = True
