"""Typed configs. A config is a small frozen dataclass beside the code that it configures:

    @dataclass(frozen=True)
    class OptimizerConfig(Config):
        lr: float = option(1e-4, "learning rate", above=0)
        clip_grad_norm: float | None = option(None, "scale gradients down to this norm (default: off)", above=0)

A field's type, bounds and choices are checked whenever a config is made: from the command line (cli/ builds the parsers
from the fields), from a file, or in code. Field names are the flags' names, with _ for -. Configs may be nested.
"""

import dataclasses
import functools
import math
import os
import types
import typing

from runtime.errors import UserError

MAX_INT = 2**63 - 1  # of every whole number without a bound of its own: arrays and random generators take no larger ones


def option(default=dataclasses.MISSING, help="", *, low=None, high=None, above=None, choices=None, changeable=False,
           metavar=None, const=None, positional=False, repeatable=False):  # fmt: skip
    """A field of a Config.

    help: a sentence that stands alone; the default is added to it unless it says "(default". low, high: inclusive bounds
    of a number; above: an exclusive one. choices: the allowed values. changeable: whether a resumed run may change the
    value (options that change the result may not). const: the value of the flag when it is given without one.
    positional: an argument without a flag. repeatable: of a tuple, that the flag may be given several times, for more
    values."""
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "changeable": changeable}
    metadata |= {"metavar": metavar, "const": const, "positional": positional, "repeatable": repeatable}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def field_types(config_class):
    """{field name: (kind, number of values, optional)}: kind is int, float, str, bool or a config class; the number of
    values is None for one value, an int for a tuple of that many, or "+" for a tuple of one or more."""
    found = {}
    for name, hint in typing.get_type_hints(config_class).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        optional = types.NoneType in members
        (hint,) = (member for member in members if member is not types.NoneType)
        count = None
        if typing.get_origin(hint) is tuple:
            kinds = typing.get_args(hint)
            hint, count = kinds[0], "+" if kinds[-1] is Ellipsis else len(kinds)
        found[name] = hint, count, optional
    return found


def flag(name):
    return f"--{name.replace('_', '-')}"


def check_value(value, kind, metadata):
    """The value, converted to `kind` (a list or an int where a float is wanted are fine). Raises ValueError, whose text
    continues a sentence that names the option: "-1 is not a number, more than 0"."""
    low, high, above, choices = (metadata.get(key) for key in ("low", "high", "above", "choices"))
    if kind is int and high is None and isinstance(value, int) and abs(value) > MAX_INT:
        high = MAX_INT
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fits = fits and (kind is not float or math.isfinite(value)) and (low is None or value >= low)
    fits = fits and (high is None or value <= high) and (above is None or value > above)
    if not fits:
        wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, kind.__name__)
        bounds = (("{} or more", low), ("{} or less", high), ("more than {}", above))
        bounds = " and ".join(words.format(bound) for words, bound in bounds if bound is not None)
        raise ValueError(f"{value!r:.80} is not {wanted}{', ' if bounds else ''}{bounds}")
    if value == "":  # such as that of a shell variable that is not set
        raise ValueError("is empty; give a value")
    if kind is str and not _is_encodable(value):
        raise ValueError(f"{value!r:.80} has characters that no file name can have")
    if choices and value not in choices:
        raise ValueError(f"{value!r:.80} is not one of {', '.join(map(str, choices))}")
    return value


def _is_encodable(text):
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configs. Making one raises UserError, naming the flag, where a value is not what its field allows."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind, count, optional = field_types(type(self))[field.name]
            value = getattr(self, field.name)
            if value is None and optional:
                continue
            name = field.metadata.get("metavar") if field.metadata.get("positional") else flag(field.name)
            try:
                if count is None:
                    value = check_value(value, kind, field.metadata)
                elif not isinstance(value, list | tuple) or len(value) != (len(value) or 1 if count == "+" else count):
                    raise ValueError(f"{value!r} is not {'a list' if count == '+' else f'{count} values'}")
                else:
                    value = tuple(check_value(entry, kind, field.metadata) for entry in value)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self):
        """For subclasses: refuse combinations of values. Raises UserError that names the options."""

    def flat(self):
        """{field name: value} of this config and the configs nested in it, as plain JSON values, None included."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Config):
                values |= value.flat()
            else:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_flat(cls, values):
        """The config of flat values, such as those of a file. Missing ones take their defaults, unknown ones are ignored.
        A nested config that is a field's default gives its own values as the defaults. Raises UserError."""
        own = {}
        for field in dataclasses.fields(cls):
            kind = field_types(cls)[field.name][0]
            if issubclass(kind, Config):
                defaults = {} if field.default is dataclasses.MISSING else field.default.flat()
                own[field.name] = kind.from_flat({**defaults, **values})
            elif field.name in values:
                own[field.name] = values[field.name]
            elif field.default is dataclasses.MISSING:
                raise UserError(f"{flag(field.name)}: is missing; it has no default")
        return cls(**own)

    @classmethod
    def all_fields(cls):
        """Every field of this config and of the configs nested in it."""
        for field in dataclasses.fields(cls):
            kind = field_types(cls)[field.name][0]
            if issubclass(kind, Config):
                yield from kind.all_fields()
            else:
                yield field

    @classmethod
    def defaults(cls):
        """{name: default} of all fields that have one."""
        values = {}
        for field in dataclasses.fields(cls):
            kind = field_types(cls)[field.name][0]
            if issubclass(kind, Config):
                values |= kind.defaults() if field.default is dataclasses.MISSING else field.default.flat()
            elif field.default is not dataclasses.MISSING:
                values[field.name] = field.default
        return values

    @classmethod
    def changeable(cls):
        """Names of the options that a resumed run may change."""
        return {field.name for field in cls.all_fields() if field.metadata.get("changeable")}


def differences(recorded, now, ignore=()):
    """What differs between recorded settings and the present ones, as phrases that name the flag: ["--lr 0.1, now 0.2"].

    recorded, now: {name: value}. Only what both know is compared, and `ignore` is not."""
    names = [name for name in now if name in recorded and name not in ignore]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    return [f"{flag(name)} {recorded[name]}, now {plain[name]}" for name in names if recorded[name] != plain[name]]
