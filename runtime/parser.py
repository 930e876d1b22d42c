"""argparse parsers made from configs (runtime/config.py). A user's mistake is printed as one line, with exit status 2."""

import argparse
import contextlib
import dataclasses
import gc
import os
import sys

from runtime.config import Config, check_value, field_types, flag
from runtime.errors import RunError, UserError


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help, unless there is none or the help tells it in words."""

    def _get_help_string(self, action):  # the method that the base class itself overrides
        told = action.default is None or action.required or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of a command whose options are the fields of `config_class`; a nested config is a group of options.

    description: the command's docstring. defaults: {field name: default} where a command's differs from the config's.
    presets: {field name: {value of that field: other defaults}}, for options that stand for several."""

    def __init__(self, config_class, description, defaults=None, presets=None):
        # abbreviations would change their meaning with every new option
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)
        self.config_class, self.defaults = config_class, {**config_class.defaults(), **(defaults or {})}
        self.presets = presets or {}
        self._add_options(config_class, self)

    def _add_options(self, config_class, group):
        for field in dataclasses.fields(config_class):
            kind, count, _ = field_types(config_class)[field.name]
            if issubclass(kind, Config):
                title = (kind.__doc__ or kind.__name__).split("\n")[0].rstrip(".")
                self._add_options(kind, self.add_argument_group(title))
                continue
            default = self.defaults.get(field.name, field.default)
            required = default is dataclasses.MISSING
            text = field.metadata["help"].replace("%", "%%")
            if field.metadata["positional"]:
                words = {"nargs": count} if required else {"nargs": "?", "default": default}
                group.add_argument(field.name, metavar=field.metadata["metavar"], help=text, **words)
                continue
            words = {"help": text, "required": required, "default": None if required else default}
            if kind is bool:
                words["action"] = argparse.BooleanOptionalAction
            else:
                words |= {"type": self._converter(kind, field.metadata), "metavar": field.metadata["metavar"]}
                if field.metadata["choices"] and not words["metavar"]:
                    words["metavar"] = "{" + ",".join(map(str, field.metadata["choices"])) + "}"
                if count is not None:
                    words["nargs"] = count
                if field.metadata["repeatable"]:
                    words["action"] = "extend"
                if field.metadata["const"] is not None:
                    words |= {"nargs": "?", "const": field.metadata["const"]}
            group.add_argument(flag(field.name), **words)

    @staticmethod
    def _converter(kind, metadata):
        def convert(text):
            try:
                value = kind(text)
            except ValueError:
                value = text
            try:
                return check_value(value, kind, metadata)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return convert

    def parse(self, argv=None):
        """The config of a command line. Mistakes end the process with one line and exit status 2."""
        values = vars(self.parse_args(argv))
        for name, choices in self.presets.items():
            self.set_defaults(**choices[values[name]])  # what the command line gives wins over them
            values = vars(self.parse_args(argv))
        # what is imported next makes 600,000 objects; looking through them again and again takes an eighth of a start
        gc.set_threshold(50_000)
        with self.report_errors():
            return self.config_class.from_flat(values)

    def error(self, message, status=UserError.status, every_rank=False):
        if every_rank or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # the line appears once
            if "tqdm" in sys.modules:
                _end_progress_bars()
            message = str(message).replace("\n", "\\n")  # a file's name may hold line breaks
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(status)

    @contextlib.contextmanager
    def report_errors(self):
        """Print a UserError that is raised inside as one line and exit with its status; Ctrl-C exits with 130.
        Errors of the system that no function foresees become one line too."""
        with contextlib.suppress(AttributeError, ValueError):  # stdout may be closed, or another object
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
        try:
            yield
            sys.stdout.flush()
        except UserError as error:
            self.error(error, error.status, every_rank=error.of_one_rank)
        except MemoryError:
            self.error("out of memory", RunError.status, every_rank=True)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else "input or output failed: "
            self.error(f"{what}{error.strerror or error}", RunError.status, every_rank=True)
        except KeyboardInterrupt:
            self.error("interrupted", 130)


def _end_progress_bars():
    """Otherwise the line of an error would stand behind a bar that is still open."""
    from tqdm import tqdm

    for bar in [*tqdm._instances]:
        bar.close()
