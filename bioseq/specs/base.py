"""What all specs share: construction from plain data with every key and type checked, and the way back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Self

from bioseq.errors import SpecError


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _read(kind: Any, value: Any, field: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in (o for o in options if o is not type(None)):
            try:
                return _read(option, value, field)
            except SpecError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        # Type and value: True is no 1.
        if not any(value == option and type(value) is type(option) for option in typing.get_args(kind)):
            allowed = ", ".join(map(str, typing.get_args(kind)))
            raise SpecError(f"{value!r} is not one of {allowed}.", field=field)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SpecError(f"a list is needed, not {value!r}.", field=field)
        items = typing.get_args(kind)
        if len(items) == 2 and items[1] is ...:
            return tuple(_read(items[0], v, f"{field}[{i}]") for i, v in enumerate(value))
        if len(items) != len(value):
            raise SpecError(f"{len(items)} values are needed, {len(value)} were given.", field=field)
        return tuple(_read(k, v, f"{field}[{i}]") for i, (k, v) in enumerate(zip(items, value)))
    if origin is dict:
        if not isinstance(value, dict):
            raise SpecError(f"a table is needed, not {value!r}.", field=field)
        _, kind_of_values = typing.get_args(kind)
        return {str(k): _read(kind_of_values, v, f"{field}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return _build(kind, value, field)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise SpecError(f"{_named(kind)} is needed, not {value!r}.", field=field)
    if kind is float and not math.isfinite(value):
        raise SpecError(f"a finite number is needed, not {value!r}.", field=field)
    return value


def _build(kind: Any, data: Any, prefix: str = "") -> Any:
    if not isinstance(data, dict):
        raise SpecError(f"a table is needed, not {data!r}.", field=prefix or kind.__name__)
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    dotted = (prefix + ".") if prefix else ""
    for key in data:
        if key not in known:
            raise SpecError("unknown key.", field=dotted + str(key), hint=f"Known: {', '.join(known)}.")
    for name, f in known.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SpecError("missing.", field=dotted + name)
    return kind(**{key: _read(hints[key], value, dotted + key) for key, value in data.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of all job specs. Subclasses are frozen, keyword-only dataclasses of int, float, str, bool, None,
    Literal, tuples, dicts and nested dataclasses; a subclass checks values in `validate`, raising `SpecError`
    with the dotted field."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `SpecError` on impossible values."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return _build(cls, data)

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_toml(self) -> str:
        """TOML has no null: fields that are None are left out, which reads back as their None default."""
        return "".join(_toml(self.to_dict()))

    def override(self, settings: dict[str, Any]) -> Self:
        """A copy with dotted keys set (`optimiser.lr`); string values are read as TOML, else kept as text."""
        data = self.to_dict()
        for key, value in settings.items():
            at: Any = data
            *parents, last = key.split(".")
            for parent in parents:
                if not isinstance(at, dict) or parent not in at:
                    raise SpecError("unknown key.", field=key)
                at = at[parent]
            if not isinstance(at, dict) or last not in at:
                known = ", ".join(at) if isinstance(at, dict) else "none"
                raise SpecError("unknown key.", field=key, hint=f"Known: {known}.")
            at[last] = _literal(value, _kind_at(type(self), key)) if isinstance(value, str) else value
        return type(self).from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .json or .toml file."""
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise SpecError(f"cannot read {path}: {error.strerror}.") from error
        try:
            text = raw.decode("utf-8")
            if path.suffix == ".json":
                data = json.loads(text, object_pairs_hook=_each_key_once)
            else:
                data = tomllib.loads(text)
        except ValueError as error:
            raise SpecError(
                f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}."
            ) from error
        return cls.from_dict(data)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is given twice")
    return data


def _kind_at(kind: Any, key: str) -> Any:
    """The declared type of a dotted key; Any inside dicts."""
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return Any
        kind = typing.get_type_hints(kind)[name]
    return kind


def _literal(text: str, kind: Any) -> Any:
    if kind is str:  # a name such as 17 or none is text
        return text
    if text.lower() in ("none", "null"):
        return None
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and str in typing.get_args(kind):
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(data: dict[str, Any], prefix: str = "") -> list[str]:
    lines, tables = [], []
    for key, value in data.items():
        if isinstance(value, dict):
            tables += [f"\n[{prefix}{_toml_key(key)}]\n", *_toml(value, f"{prefix}{_toml_key(key)}.")]
        elif value is not None:
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}\n")
    return lines + tables


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if any(c in repr(value) for c in ".en") else repr(value) + ".0"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        inner = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(inner) + "}"
    # TOML's escapes are JSON's, but TOML wants one for DEL too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
