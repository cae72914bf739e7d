"""What becomes of a finished run: its bundle goes to the registry, if the job asked for a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bioseq.bundles.registry import Registry
from bioseq.errors import BundleError, RegistryError
from serving.jobs.folder import JobFolder
from serving.jobs.store import Started
from serving.settings import Settings


@dataclass(frozen=True)
class Finished:
    """`registered` is NAME@V; `note` says what a user should know of a job that succeeded."""

    registered: str | None = None
    note: str | None = None


def bundle_of(kind: str, folder: JobFolder) -> Path | None:
    """The bundle that a run made: a head, or of a pretraining run the best checkpoint, else the last."""
    places = {"finetune": [folder.output], "pretrain": [folder.output / "best", folder.output / "last"]}
    return next((p for p in places.get(kind, []) if (p / "manifest.json").is_file()), None)


def tokens_of(kind: str, folder: JobFolder) -> int:
    """What a run computed, for the usage of its key, as far as it says so."""
    if kind != "screen":
        return 0
    try:
        return int(json.loads((folder.output / "summary.json").read_text("utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def finish(settings: Settings, job: Started, folder: JobFolder) -> Finished:
    """Doing it twice changes nothing: the registry knows content that a name already has. Raises `BundleError`
    if the run left no bundle, `RegistryError` if the registry refuses it."""
    bundle = bundle_of(job.kind, folder)
    if job.kind in ("pretrain", "finetune") and bundle is None:
        raise BundleError("the run left no bundle.", hint="See the log.")
    if job.register is None or bundle is None:
        return Finished()
    try:
        entry = Registry(settings.registry).register(bundle, job.register, job.accept_weak)
    except RegistryError as error:
        if error.code == "head.weak":  # the head is there to download and look at
            return Finished(
                note=f"not registered: {error.message} Submit with accept_weak = true to have it."
            )
        raise
    return Finished(registered=entry.ref)
