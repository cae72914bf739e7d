"""What all specs share: reading from JSON and TOML, writing to them, and dotted overrides."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Self

from bioseq.errors import SpecError
from bioseq.specs.reading import build, plain, read_file


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
        return build(cls, data)

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

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
        return cls.from_dict(read_file(path))


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
