"""What a constructor may be told: its annotated keywords, as keys of a file and as `--options` of a command.

A signature becomes a pydantic model; values are checked against it; what pydantic finds becomes one line for each key,
in the words of whoever wrote the file. A file's values have types of their own and must fit exactly; what comes from a
command line is text and is converted.

Paths are relative to a directory (that of the file, or the current one): the values of keywords annotated with
`pathlib.Path`, and any text that begins with `unix:`, `file:` or `process:`.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import json
import operator
import os
import re
import types
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pydantic

from vbus.errors import UsageError
from vbus.hints import did_you_mean

LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
PATH_IN_TEXT = re.compile(r"(unix|file|process):(?!/)(.+)")
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    bytes: "a text",
    Path: "a path",
    uuid.UUID: "a UUID",
}
METAVARS = {int: "INTEGER", float: "NUMBER", bool: "BOOL", str: "TEXT", bytes: "TEXT", Path: "PATH", uuid.UUID: "UUID"}


@dataclass(frozen=True)
class Option:
    """One keyword of a constructor."""

    name: str
    annotation: Any
    required: bool
    default: Any

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return any(_origin(kind) in LISTS for kind in _members(self.annotation))

    @property
    def is_path(self) -> bool:
        """Whether it takes a path, or several."""
        return any(
            kind is Path or any(inner is Path for argument in typing.get_args(kind) for inner in _members(argument))
            for kind in _members(self.annotation)
        )

    @property
    def expected(self) -> str:
        """What to write, in words."""
        return _describe(self.annotation)

    @property
    def metavar(self) -> str:
        """What to write, in a line of help."""
        return _metavar(self.annotation)


class OptionErrors(UsageError):
    """What is wrong with the values: (key, what is wrong and what to do), one for each key."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"{key}: {text}" for key, text in problems))
        self.problems = problems


class Options:
    """The options of one constructor, or of any function with annotated keywords."""

    def __init__(self, function: Callable[..., Any], owner: str) -> None:
        """UsageError when the annotations cannot be made sense of; `owner` is who to blame then."""
        self.owner = owner
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except Exception as error:
            raise UsageError(f"{owner}: an annotation of its options cannot be resolved: {error}") from error
        self.options: dict[str, Option] = {}
        for parameter in inspect.signature(function).parameters.values():
            option = self._option(parameter, hints)
            if option is not None:
                self.options[option.name] = option
        try:
            self._model = self._make_model()
        except Exception as error:
            raise UsageError(f"{owner}: an annotation of its options cannot be checked: {_one_line(error)}") from error

    @classmethod
    def of(cls, owner: type) -> Options:
        """The options of a class: the keywords of its `__init__`."""
        # Not inspect.signature(owner), which prefers a `__new__` that takes anything.
        function = owner.__init__  # type: ignore[misc]  # it is only looked at
        if function is object.__init__:
            return cls(lambda: None, owner.__name__)
        return cls(function, owner.__name__)

    def _option(self, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Option | None:
        name = parameter.name
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name == "self":
            return None
        if name not in hints or name.startswith("_") or parameter.kind is parameter.POSITIONAL_ONLY:
            if required:
                raise UsageError(f"{self.owner}: its parameter {name!r} must be a keyword with an annotation")
            return None
        return Option(name, hints[name], required, None if required else parameter.default)

    def _make_model(self) -> type[pydantic.BaseModel]:
        # By aliases, because a keyword may be called as a method of pydantic's models is.
        fields: dict[str, Any] = {
            f"option{index}": (
                _checkable(option.annotation),
                pydantic.Field(alias=option.name) if option.required else pydantic.Field(None, alias=option.name),
            )
            for index, option in enumerate(self.options.values())
        }
        config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        model: type[pydantic.BaseModel] = pydantic.create_model("Options", __config__=config, **fields)
        return model

    def check(
        self, values: Mapping[str, Any], directory: Path, *, strict: bool = True, also: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The keywords to call with: what was given, checked and converted; the rest keeps its defaults.

        Relative paths begin at `directory`. `strict` as for a file; else text is converted, as for a command line.
        `also` are other keys that could have been meant. OptionErrors.
        """
        prepared = {key: self._prepare(key, value, directory, strict) for key, value in values.items()}
        try:
            # As JSON, where "strict" means that a text is no number, but a list may still become a tuple.
            made = self._model.model_validate_json(json.dumps(prepared, default=str), strict=strict)
        except pydantic.ValidationError as error:
            raise OptionErrors(self._problems(error, values, also)) from None
        fields = list(self._model.model_fields)
        return {
            option.name: getattr(made, field)
            for field, option in zip(fields, self.options.values(), strict=True)
            if field in made.model_fields_set
        }

    def _prepare(self, key: str, value: Any, directory: Path, strict: bool) -> Any:
        option = self.options.get(key)
        if option is None:
            return value
        if not strict and option.is_list and isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            return [_resolve(item, directory, option.is_path) for item in value]
        return _resolve(value, directory, option.is_path)

    def _problems(
        self, error: pydantic.ValidationError, values: Mapping[str, Any], also: Iterable[str]
    ) -> list[tuple[str, str]]:
        """One line a key. Of a union, pydantic reports every member: they are put together."""
        found: dict[str, list[dict[str, Any]]] = {}
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0]) if detail["loc"] else ""
            found.setdefault(key, []).append(typing.cast(dict[str, Any], detail))
        return [(key, self._problem(key, details, values, also)) for key, details in found.items()]

    def _problem(self, key: str, details: list[dict[str, Any]], values: Mapping[str, Any], also: Iterable[str]) -> str:
        if details[0]["type"] == "extra_forbidden" and key not in self.options:
            return f"unknown key: {did_you_mean(key, [*also, *self.options])}"
        expected = self.options[key].expected
        if key not in values:
            return f"is missing: write {expected}"
        value = json.dumps(values[key], default=str, ensure_ascii=False)
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        for detail in details:
            if not _is_about_type(detail["type"]):
                return f"{shown}: {_one_line(detail['msg'])}"
        return f"{shown} does not fit: write {expected}"


def about(error: UsageError, given: Mapping[str, Any]) -> str:
    """Which of the options that were given an error of a constructor is about; "" when that cannot be told.

    A constructor says what is wrong in one line that quotes the value, or names the option.
    """
    text = str(error)
    quoted = [key for key, value in given.items() if isinstance(value, str | Path) and _is_quoted(str(value), text)]
    named = [key for key in given if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text)]
    return next(iter([*quoted, *named]), "")


def _is_quoted(value: str, text: str) -> bool:
    """Whether the text has the value, as it is or without the word before its colon."""
    parts = (value, value.partition(":")[2])
    return any(len(part) > 1 and re.search(rf"(?<!\w){re.escape(part)}", text) for part in parts)


def _is_about_type(kind: str) -> bool:
    return kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "enum", "none_required", "int_from_float")


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()).removeprefix("Value error, ")
    return text.replace("Input should", "should", 1)


def _resolve(value: Any, directory: Path, is_path: bool) -> Any:
    if not isinstance(value, str) or not value:
        return value
    if is_path:
        return os.fspath(directory / value)
    match = PATH_IN_TEXT.fullmatch(value)
    return f"{match[1]}:{directory / match[2]}" if match else value


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without `Annotated` around them; one for anything else."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in _members(argument)]
    return [annotation]


def _checkable(annotation: Any) -> Any:
    """The annotation with lists for iterables: pydantic would check those only when they are iterated."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation is collections.abc.Iterable:
        return list[Any]
    if origin is Annotated:
        return Annotated[(_checkable(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_checkable, arguments))
    if origin is collections.abc.Iterable:
        return list[arguments]  # type: ignore[valid-type]
    return annotation


def _describe(annotation: Any) -> str:
    words: list[str] = []
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    for kind in kinds:
        origin = _origin(kind)
        if kind is str and Path in kinds:
            continue
        if origin is Literal:
            word = " or ".join(json.dumps(value) for value in typing.get_args(kind))
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            word = " or ".join(json.dumps(member.value, default=str) for member in kind)
        elif origin in LISTS:
            inner = [argument for argument in typing.get_args(kind) if argument is not ...]
            word = f"a list, each item {_describe(inner[0])}" if inner else "a list"
        else:
            word = WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
        if word not in words:
            words.append(word)
    return " or ".join(words) or "nothing"


def _metavar(annotation: Any) -> str:
    words: list[str] = []
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    for kind in kinds:
        origin = _origin(kind)
        if kind is str and Path in kinds:
            continue
        if origin is Literal:
            word = "|".join(str(value) for value in typing.get_args(kind))
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            word = "|".join(str(member.value) for member in kind)
        elif origin in LISTS:
            inner = [argument for argument in typing.get_args(kind) if argument is not ...]
            word = f"{_metavar(inner[0]) if inner else 'TEXT'}..."
        else:
            word = METAVARS.get(kind, getattr(kind, "__name__", "VALUE").upper())
        if word not in words:
            words.append(word)
    return "|".join(words) or "VALUE"
