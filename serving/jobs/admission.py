"""From what a client sends to a job that may run: a typed spec, without a path of the client's making.

Concept: a client names inputs as `file:ID` (its own uploads), or as paths and URLs below the operator's roots
(--root); models by registry names; and nothing that says where the server writes or what it runs. What is
admitted is kept with those references. `materialise` puts the paths in when an attempt starts.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from bioseq.bundles.manifest import check_name
from bioseq.campaigns.campaign import Campaign
from bioseq.errors import BundleError, NotFoundError, SpecError
from bioseq.specs.base import Spec
from bioseq.specs.finetune import FinetuneSpec
from bioseq.specs.pretrain import PretrainSpec
from bioseq.specs.propose import ProposeSpec
from bioseq.specs.screen import ScreenSpec
from serving.jobs.campaigns import folder_of
from serving.jobs.folder import JobFolder
from serving.jobs.store import Admitted

KINDS: dict[str, type[Spec]] = {
    "pretrain": PretrainSpec, "finetune": FinetuneSpec, "screen": ScreenSpec, "propose": ProposeSpec,
}  # fmt: skip
SERVERS = (
    "output",
    "address",
    "storage",
    "resume",
    "force",
    "cache",
    "quiet",
    "after",
    "vectors",
)  # fields the server decides
_FILE = re.compile(r"file:([0-9a-f]{24})")
_WILD_TYPE = re.compile(r"[A-Za-z]+\*?")
_RECIPE = re.compile(r"[a-z0-9_]{1,40}")
_SET = re.compile(r"[A-Za-z0-9_]{1,40}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(Spec):
    """How an uploaded corpus is prepared for pretraining: see `bioseq pretrain prepare`."""

    clusters: str | None = None
    valid: dict[str, str] = dataclasses.field(default_factory=dict)
    held_out: float = 0.0
    min_length: int = 1
    max_length: int = 0
    on_error: str = "error"

    def validate(self) -> None:
        if not 0 <= self.held_out < 1:
            raise SpecError(f"{self.held_out} is not in [0, 1).", field="prepare.held_out")
        if self.min_length < 1 or self.max_length < 0:
            raise SpecError("lengths are above 0.", field="prepare.min_length")
        if self.on_error not in ("error", "skip"):
            raise SpecError("error or skip is needed.", field="prepare.on_error")
        for name in self.valid:
            if not _SET.fullmatch(name) or name == "held_out":
                raise SpecError("a set's name is letters, digits and _.", field="prepare.valid")


@dataclasses.dataclass(frozen=True)
class Context:
    """What admission asks: `file` and `campaign` give an id if the caller owns it; `backbone` and `head` give exact
    names (`NAME@V`). The functions raise `Problem` and `NotFoundError`."""

    file: Callable[[str], str]
    backbone: Callable[[str], str]
    head: Callable[[str, str], str]
    campaign: Callable[[str], str]
    roots: tuple[str, ...] = ()
    max_workers: int = 64


@lru_cache(maxsize=32)
def recipe(name: str) -> str:
    """A pretraining recipe as TOML, asked of the command line: `serving` does not import `training`."""
    if not _RECIPE.fullmatch(name):
        raise SpecError("recipe names use lower-case letters, digits and _.", field="recipe")
    done = subprocess.run(
        [sys.executable, "-m", "bioseq", "pretrain", "recipes", name],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise SpecError(f"there is no recipe {name!r}.", field="recipe", hint="See bioseq pretrain recipes.")
    return done.stdout


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def admit(
    kind: str,
    given: dict[str, Any],
    context: Context,
    *,
    name: str | None = None,
    recipe_name: str | None = None,
    prepare: dict[str, Any] | None = None,
) -> Admitted:
    """Raises `SpecError` with the field, `NotFoundError`, `Problem` 404. No message repeats what was sent: it may be
    a sequence."""
    try:
        return _admit(kind, given, context, name, recipe_name, prepare)
    except SpecError as error:
        raise _without_values(error, [given, prepare, recipe_name]) from None


def _without_values(error: SpecError, given: Any) -> SpecError:
    """The error with every text that the client sent taken out of it."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for k, v in value.items():
                yield k
                yield from texts(v)
        elif isinstance(value, list | tuple):
            for v in value:
                yield from texts(v)

    field = error.field or ""
    message = error.message.removeprefix(f"{field}: ")
    for text in sorted(set(texts(given)), key=len, reverse=True):
        message = message.replace(repr(text), "a text")
        if text and message.startswith("unknown key") and field.endswith(text):
            field = field.removesuffix(text) + "(unknown)"
            break
    return SpecError(message, field=field or None, hint=error.hint)


def _name(value: str | None, field: str) -> str | None:
    """A name that becomes part of a path or of a cluster resource. Raises `SpecError`."""
    if value is None:
        return None
    try:
        return check_name(value)
    except BundleError as error:
        raise SpecError("the name is not allowed.", field=field, hint=error.hint) from None


def _admit(
    kind: str,
    given: dict[str, Any],
    context: Context,
    name: str | None,
    recipe_name: str | None,
    prepare: dict[str, Any] | None,
) -> Admitted:
    if recipe_name is not None:
        if kind != "pretrain":
            raise SpecError("only pretrain jobs have recipes.", field="recipe")
        given = _merge(tomllib.loads(recipe(recipe_name)), given)
    if prepare is not None and kind != "pretrain":
        raise SpecError("only pretrain jobs prepare a corpus.", field="prepare")
    for field in SERVERS:
        if given.get(field) not in (None, False):
            raise SpecError("the server decides this. Leave it out.", field=field)
    data = {k: v for k, v in given.items() if k not in SERVERS}
    if "output" in {f.name for f in dataclasses.fields(KINDS[kind])}:
        data["output"] = "output"
    spec = KINDS[kind].from_dict(data)
    files: list[str] = []

    def take(value: str, field: str) -> str:
        return _input(value, field, context, files)

    admitted = _KINDS[kind](spec, context, take)
    register, accept_weak = admitted.pop("register", None), bool(admitted.pop("accept_weak", False))
    register = _name(register, "register")
    if kind == "finetune":
        admitted["name"] = admitted["name"] or register or "head"
    if kind == "pretrain":
        admitted["prepare"] = _prepare(prepare, take)
    elif "threads" in admitted:
        _bounded(admitted["threads"], context.max_workers, "threads")
    for field in SERVERS:
        admitted.pop(field, None)
    return Admitted(
        kind=kind,
        spec=admitted,
        files=tuple(dict.fromkeys(files)),
        name=name or (spec.name if isinstance(spec, PretrainSpec) else None) or register or kind,
        register=register,
        accept_weak=accept_weak,
    )


def _bounded(value: int | None, limit: int, field: str) -> None:
    if value is not None and value > limit:
        raise SpecError(f"{value} is over this server's limit of {limit}.", field=field)


def _input(value: str, field: str, context: Context, files: list[str]) -> str:
    """`file:ID` of the caller's, or a path or URL below a root. Raises `SpecError`, `Problem` 404."""
    found = _FILE.fullmatch(value)
    if found:
        files.append(context.file(found[1]))
        return value
    if value.startswith("file:"):
        raise SpecError(
            "the file id is not valid.", field=field, hint="Upload with POST /v1/files, then file:ID."
        )
    if "://" in value:
        below = any("://" in root and value.startswith(root.rstrip("/") + "/") for root in context.roots)
        if below and ".." not in value and "?" not in value and "%" not in value:
            return value
    elif value.startswith("/"):
        resolved = Path(value).resolve()
        if any(resolved.is_relative_to(Path(r).resolve()) for r in context.roots if "://" not in r):
            return str(resolved)
    raise SpecError(
        "inputs are uploaded files (file:ID), or paths below the server's roots.",
        field=field,
        hint="Upload with POST /v1/files.",
    )


def _backbone(name: str, field: str, context: Context) -> str:
    try:
        return context.backbone(name)
    except NotFoundError as error:
        raise SpecError(error.message, field=field, hint=error.hint) from error


Take = Callable[[str, str], str]


def _pretrain(spec: Any, context: Context, take: Take) -> dict[str, Any]:
    assert isinstance(spec, PretrainSpec)
    data = spec.to_dict()
    _name(spec.name, "name")
    if not spec.corpus:
        raise SpecError("missing.", field="corpus", hint="Upload sequences, then corpus = 'file:ID'.")
    data["corpus"] = take(spec.corpus, "corpus")
    if spec.init is not None:
        data["init"] = _backbone(spec.init, "init", context)
    if set(spec.trackers) - {"tensorboard"}:
        raise SpecError("jobs report to tensorboard only.", field="trackers")
    for field in ("count", "cpus", "threads"):
        _bounded(getattr(spec.workers, field), context.max_workers, f"workers.{field}")
    return data


def _prepare(given: dict[str, Any] | None, take: Take) -> dict[str, Any]:
    prepare = Prepare.from_dict(given or {})
    data = prepare.to_dict()
    if prepare.clusters is not None:
        data["clusters"] = take(prepare.clusters, "prepare.clusters")
    data["valid"] = {k: take(v, f"prepare.valid.{k}") for k, v in prepare.valid.items()}
    return data


def _finetune(spec: Any, context: Context, take: Take) -> dict[str, Any]:
    assert isinstance(spec, FinetuneSpec)
    data = spec.to_dict()
    for field in ("labels", "residue_labels", "residue_mask"):
        if data[field] is not None:
            data[field] = take(data[field], field)
    # A name of a file would be read as one: only letters are a sequence, and only `file:ID` is a file.
    if spec.wild_type is not None and not _WILD_TYPE.fullmatch(spec.wild_type):
        data["wild_type"] = take(spec.wild_type, "wild_type")
    data["base"] = _backbone(spec.base, "base", context)
    _name(spec.name, "name")
    _bounded(spec.workers, context.max_workers, "workers")
    return data


def _screen(spec: Any, context: Context, take: Take) -> dict[str, Any]:
    assert isinstance(spec, ScreenSpec)
    data = spec.to_dict()
    data["inputs"] = [take(value, "inputs") for value in spec.inputs]
    data["model"] = _backbone(spec.model, "model", context)
    heads = []
    for head in spec.heads:
        try:
            heads.append(context.head(head, data["model"]))
        except NotFoundError as error:
            raise SpecError(error.message, field="heads", hint=error.hint) from error
    data["heads"] = heads
    if spec.homologs not in ("auto", "none", "default"):  # a name of a folder would be read as one
        raise SpecError(
            "a screen on a server takes auto, none or default.", field="homologs", hint="Leave it out."
        )
    _bounded(spec.workers, context.max_workers, "workers")
    return data


def _propose(spec: Any, context: Context, take: Take) -> dict[str, Any]:
    assert isinstance(spec, ProposeSpec)
    return spec.to_dict() | {"campaign": context.campaign(spec.campaign)}


_KINDS = {"pretrain": _pretrain, "finetune": _finetune, "screen": _screen, "propose": _propose}


# ------------------------------------------------------------------------------------------ when it starts


def can_resume(kind: str, spec: dict[str, Any]) -> bool:
    """Whether another attempt goes on where a lost one was: screens and pretraining do from what they
    committed, fine-tuning on frozen features from its stored embeddings. LoRA and full fine-tuning do not."""
    return kind != "finetune" or spec.get("method") in (None, "frozen")


def materialise(
    kind: str,
    admitted: dict[str, Any],
    folder: JobFolder,
    file_path: Callable[[str], Path],
    *,
    address: str | None,
) -> tuple[Spec, list[list[str]]]:
    """The spec of an attempt with real paths, and the commands before it (each a list of arguments).
    `address` is the Ray cluster to work on, if there is one."""
    data = dict(admitted)
    prepare = data.pop("prepare", None)
    before: list[list[str]] = []

    def real(value: str) -> str:
        found = _FILE.fullmatch(value)
        return str(file_path(found[1])) if found else value

    data["output"] = str(folder.output)
    if kind == "screen":
        data["inputs"] = [real(v) for v in data["inputs"]]
        data["address"] = address
    elif kind == "propose":
        campaign = folder_of(folder.path.parents[1], data["campaign"])
        data["campaign"] = str(campaign)
        begun = folder.read("after.json")
        data["after"] = Campaign(campaign).state().rounds if begun is None else begun
        if begun is None:
            folder.write("after.json", data["after"])
    elif kind == "finetune":
        for field in ("labels", "residue_labels", "residue_mask"):
            if data[field] is not None:
                data[field] = real(data[field])
        if data["wild_type"] is not None:
            data["wild_type"] = real(data["wild_type"])
        data["cache"] = str(folder.work / "embeddings")
        data["address"] = address
    else:
        source = real(data["corpus"])
        if not Path(source).is_dir():
            corpus = folder.work / "corpus"
            if not (corpus / "manifest.json").is_file():
                before.append(_prepare_command(source, str(corpus), data["alphabet"], prepare or {}, real))
            data["corpus"] = str(corpus)
        if data["engine"] != "local":
            data["engine"] = "ray" if address else "local"
            data["address"] = address
        data["resume"] = (folder.output / "spec.json").is_file()
    return KINDS[kind].from_dict(data), before


def _prepare_command(
    source: str, corpus: str, alphabet: str, prepare: dict[str, Any], real: Callable[[str], str]
) -> list[str]:
    command = ["pretrain", "prepare", source, "-o", corpus, "--alphabet", alphabet, "--engine", "local"]
    if prepare.get("clusters"):
        command += ["--clusters", real(prepare["clusters"])]
    for name, value in sorted(prepare.get("valid", {}).items()):
        command += ["--valid", f"{name}={real(value)}"]
    for field in ("held_out", "min_length", "max_length", "on_error"):
        if field in prepare:
            command += [f"--{field.replace('_', '-')}", str(prepare[field])]
    return command
