"""The strict reader: JSON and TOML files into dataclasses, with every key and every type checked.

Specs, a bundle's manifest, a model's architecture and an imported checkpoint's layout are read by it. Types are
int, float, str, bool, None, Any, Literal, unions, tuples, lists, dicts, TypedDicts and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from bioseq.errors import BioseqError, SpecError

T = TypeVar("T")


def build(kind: type[T], data: Any, *, error: type[BioseqError] = SpecError, where: str = "") -> T:
    """A dataclass from plain data. Raises `error` with the dotted name of an unknown or missing key, or of a
    value of the wrong type; `where` says what is read, for errors other than `SpecError`."""
    try:
        return _build(kind, data, "")
    except SpecError as fault:
        if error is SpecError:
            raise
        raise error(f"{where}: {fault.message}", hint=fault.hint) from None


def read_file(path: str | Path, *, error: type[BioseqError] = SpecError) -> Any:
    """The content of a .json file, or of a TOML file of any other name; no key may be given twice."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror}.") from fault
    return parse(raw, str(path), toml=path.suffix != ".json", error=error)


def parse(raw: bytes | str, name: str, *, toml: bool = False, error: type[BioseqError] = SpecError) -> Any:
    """The content of a JSON (or TOML) text, called `name` in errors."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        return tomllib.loads(text) if toml else json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as fault:
        raise error(f"{name} is not valid {'TOML' if toml else 'JSON'}: {fault}.") from fault


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is given twice")
    return data


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _read(kind: Any, value: Any, field: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
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
        # By type and value, since True == 1.
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
    if origin is list:
        if not isinstance(value, list):
            raise SpecError(f"a list is needed, not {value!r}.", field=field)
        (item,) = typing.get_args(kind)
        return [_read(item, v, f"{field}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise SpecError(f"a table is needed, not {value!r}.", field=field)
        _, kind_of_values = typing.get_args(kind)
        return {str(k): _read(kind_of_values, v, f"{field}.{k}") for k, v in value.items()}
    if typing.is_typeddict(kind):
        return _build(kind, value, field)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _build(kind, value, field)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise SpecError(f"{_named(kind)} is needed, not {value!r}.", field=field)
    if kind is float and not math.isfinite(value):
        raise SpecError(f"a finite number is needed, not {value!r}.", field=field)
    return value


def _build(kind: Any, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise SpecError(f"a table is needed, not {data!r}.", field=prefix or None)
    hints = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        known, required = list(hints), kind.__required_keys__
    else:
        fields = [f for f in dataclasses.fields(kind) if f.init]
        known = [f.name for f in fields]
        given = dataclasses.MISSING
        required = {f.name for f in fields if f.default is given and f.default_factory is given}
    dotted = f"{prefix}." if prefix else ""
    for key in data:
        if key not in known:
            raise SpecError("unknown key.", field=f"{dotted}{key}", hint=f"Known: {', '.join(known)}.")
    for name in known:
        if name in required and name not in data:
            raise SpecError("missing.", field=dotted + name)
    return kind(**{key: _read(hints[key], value, dotted + key) for key, value in data.items()})


def plain(value: Any) -> Any:
    """The way back: nested dicts and lists of a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
