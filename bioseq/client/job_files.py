"""Job files (a spec with its `kind`), and which fields of a job name files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bioseq.errors import SpecError
from bioseq.specs.reading import read_file

KINDS = {
    "pretrain": ("corpus",),
    "finetune": ("labels", "residue_labels", "residue_mask", "wild_type"),
    "screen": ("inputs",),
    "propose": (),
}


def places_of_files(job: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where the arguments of `submit` may name a file: a dict or list, and the key or index of a text in it."""
    spec, prepare = job["spec"], job.get("prepare")
    holders = [(spec, field) for field in KINDS.get(job["kind"], ())]
    if isinstance(prepare, dict):
        holders += [(prepare, "clusters"), (prepare, "valid")]
    for holder, key in holders:
        value = holder.get(key)
        if isinstance(value, tuple):
            value = holder[key] = list(value)
        if isinstance(value, str):
            yield holder, key
        elif isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            yield from [(value, k) for k, v in inner if isinstance(v, str)]


def read_job(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """A job file: a spec (TOML or JSON) with `kind`, and for pretrain `recipe` and a table `prepare`, beside its
    fields. Returns the arguments of `submit`. Paths in it are relative to the file. Raises `SpecError`."""
    path = Path(path)
    data = read_file(path)
    if not isinstance(data, dict):
        raise SpecError(f"{path} is not a table.")
    named = data.pop("kind", None)
    if kind is not None and named is not None and kind != named:
        raise SpecError(f"{path} is a {named} job, not {kind}.", field="kind")
    kind = kind or named
    if kind not in KINDS:
        raise SpecError(
            f"{', '.join(KINDS)} is needed.", field="kind", hint='Write kind = "finetune" into the file.'
        )
    apart = ("recipe", "prepare") if kind == "pretrain" else ()
    job = {"kind": kind, **{field: data.pop(field) for field in apart if field in data}, "spec": data}
    for holder, key in places_of_files(job):
        beside = str(path.parent / holder[key])
        if os.path.isfile(beside):
            holder[key] = beside
    return job
