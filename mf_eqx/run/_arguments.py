"""Parsing of command-line arguments into a configuration, by tyro, with one exception for every refusal."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from .._optional import optional
from ._settings import check_numbers

_Config = TypeVar("_Config")


class BadArguments(ValueError):
    """Command-line arguments from which no configuration can be made."""


def parse(choices: Mapping[str, tuple[str, _Config]], program: str, description: str, argv: list[str]) -> _Config:
    """The configuration that the arguments describe. Bad arguments raise `BadArguments`. The flag `--preset` exists if
    there are two choices or more."""
    with optional("tyro"):
        import tyro
    name = _preset_name(choices, argv)
    if {"-h", "--help"} & {*argv}:
        _join_lines_of_help(type(choices[name][1]))
    arguments = _arguments(choices, name)
    try:
        with _errors_as_exceptions():
            parsed, unknown = tyro.cli(
                arguments,
                prog=program,
                description=_describe(choices, description),
                args=argv,
                return_unknown_args=True,
            )
        check_numbers(parsed.config)
    except ValueError as error:
        raise BadArguments(name_flag(str(error), choices[name][1])) from error
    if unknown:
        raise BadArguments(_unknown_argument(unknown[0].partition("=")[0], choices, choices[name][1]))
    return parsed.config


def _preset_name(choices: Mapping[str, Any], argv: list[str]) -> str:
    """The name of the requested preset. It is needed before everything else is parsed: a preset holds the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    name = parser.parse_known_args(argv)[0].preset
    if name is None or len(choices) == 1:  # also if the flag is misused, which tyro reports later
        return next(iter(choices))
    if name not in choices:
        raise BadArguments(f"--preset must be one of {', '.join(choices)}; got {name!r}")
    return name


def _arguments(choices: Mapping[str, tuple[str, Any]], name: str) -> type[Any]:
    """The class that tyro parses: a preset's name and its configuration, whose flags have no prefix."""
    import tyro

    config = choices[name][1]
    preset = tyro.conf.arg(metavar="NAME", help="Preset to start from, listed above; other flags override its values.")
    fields: list[tuple[str, Any, Any]] = [("config", Annotated[type(config), tyro.conf.arg(name="")], config)]
    if len(choices) > 1:
        fields.insert(0, ("preset", Annotated[str, preset], name))
    return dataclasses.make_dataclass("Arguments", fields)


def _join_lines_of_help(kind: type[Any]) -> None:
    """Gives tyro the docstring of each field in one line: it would keep the line breaks of the source."""
    try:
        import docstring_parser  # by which tyro finds docstrings
    except ModuleNotFoundError:
        return
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    texts = {doc.arg_name: doc.description for base in bases for doc in docstring_parser.parse_from_object(base).params}
    for field in dataclasses.fields(kind):
        if text := texts.get(field.name):
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(text.split())})
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            _join_lines_of_help(field.type)


def _describe(choices: Mapping[str, tuple[str, Any]], description: str) -> str:
    if len(choices) == 1:
        return description
    width = max(map(len, choices))
    lines = [f"  {name:<{width}}  {about}" for name, (about, _) in choices.items()]
    return "\n".join([description, "", "presets:", *lines])


@contextlib.contextmanager
def _errors_as_exceptions() -> Iterator[None]:
    """A context in which tyro, instead of drawing a box on stderr and exiting, raises `ValueError` with the first
    paragraph of the box."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        raise ValueError(_first_paragraph(stderr.getvalue())) from None
    else:
        sys.stderr.write(stderr.getvalue())


def _first_paragraph(box: str) -> str:
    """The text `--steps: invalid ...` in a box, which is drawn with lines or, if these cannot be encoded, hyphens."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines()[1:]  # the first is the title
    texts = [line.strip("│ ") for line in lines]
    blocks = [
        list(block) for is_text, block in itertools.groupby(texts, lambda t: bool(re.search(r"\w", t))) if is_text
    ]
    return re.sub(r"^Error parsing (config\.)?", "", " ".join(blocks[0])) if blocks else box


def name_flag(message: str, config: Any) -> str:
    """The message; if it starts with the name of a field, that name is written as the flag."""
    first, space, rest = message.partition(" ")
    subject = first.strip("`'")
    if subject in (field.name for field in dataclasses.fields(config)):
        return "--" + subject.replace("_", "-") + space + rest
    return message


def flag_of_path(path: Any, config: Any, arguments: Sequence[str]) -> str | None:
    """The flag that gives a path, or a folder that contains it; None if none does. The arguments are looked at, too,
    since a configuration that could not be built has none of their values."""
    places = (Path(str(path)), *Path(str(path)).parents[:-1])  # without "." or "/"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for given in value if isinstance(value, tuple) else (value,):
            if isinstance(given, str) and given and Path(given) in places:
                return "--" + field.name.replace("_", "-")
    flag = None
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, argument = argument.partition("=")
        if argument and Path(argument) in places:
            return flag
    return None


def _unknown_argument(token: str, choices: Mapping[str, Any], config: Any) -> str:
    known = {flag: flag for flag in _flags(config)}
    if len(choices) > 1:
        known |= {"--preset": "--preset"} | {name: f"--preset {name}" for name in choices}
    near = difflib.get_close_matches(token, known, n=1)
    return f"unknown argument {token}" + (f", did you mean {known[near[0]]}?" if near else "; --help lists all")


def _flags(config: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        flag, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, flag + ".")
        else:
            yield flag
