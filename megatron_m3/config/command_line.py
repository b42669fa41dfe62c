"""From dataclasses to a command line: options, types, choices and help texts all come from the fields."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

from megatron_m3.errors import ConfigError, UnsupportedError

UNSET = object()

UNSUPPORTED = {"moe|experts?|num[-_]experts": "mixture of experts is not supported; every MLP is dense"}
"""Settings that are refused by name: a pattern of an option's last words, and the answer."""


def _refuse_unsupported(name: str) -> None:
    for words, answer in UNSUPPORTED.items():
        if re.fullmatch(rf"(.*\.)?({words})([-_.].*)?", name):
            raise UnsupportedError(f"{name}: {answer}")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, for files and manifests."""
    return dataclasses.asdict(config)


def from_dict[T](cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """A config from plain dictionaries. Missing keys keep their defaults.

    Raises:
        ConfigError: an unknown key, or a value that is not of its field's type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.') or cls.__name__}: must be an object with named fields")
    hints = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            _refuse_unsupported(where + name)
            raise ConfigError(f"{where}{name}: unknown field; known are {', '.join(hints)}")
        kind = hints[name]
        path = where + name
        known[name] = from_dict(kind, value, f"{path}.") if _is_section(kind) else _check(kind, value, path)
    return cls(**known)


def _check(kind: Any, value: Any, name: str) -> Any:
    """A value read from a file, if it is of the field's type; a whole number is a float too, a list is a tuple."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _check(inner[0], value, name)
    if origin is typing.Literal:
        if value not in inner:
            raise ConfigError(f"{name}={value}: choose from {', '.join(inner)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_check(inner[0], part, name) for part in value)
    if kind is float and type(value) is int:
        return value
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a list")
        raise ConfigError(f"{name}={json.dumps(value)}: must be {wanted}")
    return value


def _convert(kind: Any, text: str, name: str) -> Any:
    """One option's text as the field's type."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return None if text == "none" else _convert(typing.get_args(kind)[0], text, name)
    if origin is typing.Literal:
        if text not in typing.get_args(kind):
            raise ConfigError(f"{name}={text}: choose from {', '.join(typing.get_args(kind))}")
        return text
    if origin is tuple:
        return tuple(_convert(typing.get_args(kind)[0], part, name) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}={text}: give true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: not a valid {kind.__name__}") from None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _show(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    if typing.get_origin(kind) is tuple:
        return "A,B,..."
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _show(typing.get_args(kind)[0])
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(kind, "TEXT")


def _add_options(parser: Any, cls: type, prefix: str, defaults: Any) -> None:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for entry in dataclasses.fields(cls):
        kind, name = hints[entry.name], prefix + entry.name
        if _is_section(kind):
            group = parser.add_argument_group(name, (inspect.getdoc(kind) or "").split("\n")[0])
            _add_options(group, kind, name + ".", getattr(defaults, entry.name, None))
            continue
        default = getattr(defaults, entry.name, entry.default)
        required = default is dataclasses.MISSING
        doc = docs.get(entry.name, "").replace("%", "%%")
        shown = "" if required or default in ("", None, ()) else f" (default: {_text(default)})"
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(option, dest=name, nargs="?", const="true", default=UNSET,
                                metavar="true|false", help=doc + shown)
        else:
            parser.add_argument(option, dest=name, default=UNSET, required=required,
                                metavar=_show(kind), help=doc + shown)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def replace_fields[T](config: T, overrides: dict[str, str], where: str = "") -> T:
    """``config`` with single fields replaced, each named by its dotted path and given as text.

    Raises:
        ConfigError: an unknown field, or a text that its type refuses.
    """
    hints = typing.get_type_hints(type(config))
    changed: dict[str, Any] = {}
    sections: dict[str, dict[str, str]] = {}
    for path, text in overrides.items():
        name, _, rest = path.partition(".")
        if name not in hints or bool(rest) != _is_section(hints[name]):
            raise ConfigError(f"{where}{path}: unknown field of {type(config).__name__}")
        if rest:
            sections.setdefault(name, {})[rest] = text
        else:
            changed[name] = _convert(hints[name], text, where + path)
    for name, inner in sections.items():
        changed[name] = replace_fields(getattr(config, name), inner, f"{where}{name}.")
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours: one line, exit status 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Accept underscores for dashes in option names."""
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                words[index] = name.replace("_", "-") + equals + value
        parsed, unknown = super().parse_known_args(words, namespace)
        for word in unknown:
            if word.startswith("--"):
                _refuse_unsupported(word[2:].partition("=")[0])
        return parsed, unknown

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the options")


def make_parser(cls: type, prog: str, description: str, defaults: Any = None) -> argparse.ArgumentParser:
    """A parser with one option for each field of ``cls``: ``--field`` or ``--section.field``."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(parser, cls, "", defaults)
    needed = [f"{action.option_strings[0]} {action.metavar}" for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *needed, "[options]"])
    return parser


def given_options(namespace: argparse.Namespace) -> dict[str, str]:
    """The options that were on the command line, by dotted field name."""
    return {name: value for name, value in vars(namespace).items() if value is not UNSET}


def peek_option(argv: Sequence[str] | None, option: str, default: str) -> str:
    """The value of one option before the command line is parsed, for choosing the other options' defaults by it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value", nargs="?", default=default, const=default)
    return str(parser.parse_known_args(argv)[0].value)


def parse[T](cls: type[T], argv: Sequence[str] | None, prog: str, description: str, defaults: T | None = None) -> T:
    """Parse ``argv`` into an instance of the dataclass ``cls``.

    Options that are not given keep the values of ``defaults``; without it, the fields' own defaults, and fields that
    have none are required.
    """
    given = given_options(make_parser(cls, prog, description, defaults).parse_args(argv))
    if defaults is not None:
        return replace_fields(defaults, given)
    hints = typing.get_type_hints(cls)
    top = {
        name: _convert(hints[name], text, f"--{name.replace('_', '-')}")
        for name, text in given.items() if "." not in name
    }
    return replace_fields(cls(**top), {name: text for name, text in given.items() if "." in name})


def dump_json(config: Any) -> str:
    """A config as indented JSON text, keys in the order of the fields."""
    return json.dumps(to_dict(config), indent=2) + "\n"
