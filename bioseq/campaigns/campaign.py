"""The campaign's folder: create, open, and what belongs to a round. Settings are frozen and hashed."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.campaigns.ledger import Event, Ledger
from bioseq.campaigns.space import Space, candidates, combinations
from bioseq.campaigns.state import State
from bioseq.errors import InputError, SpecError
from bioseq.homologs.database import LETTERS
from bioseq.output import atomic_file, atomic_folder
from bioseq.sequences.mutations import letters_of

PLATES = {96: (8, 12), 384: (16, 24)}
RESERVED = ("variant", "well", "status", "round", "kind", "reason", "event", "source")


@dataclass(frozen=True)
class Objective:
    """`column:max`, `column:min`, or a threshold `column:>=X` or `column:<=X`."""

    column: str
    goal: str = "max"
    threshold: float | None = None

    @classmethod
    def read(cls, text: str) -> Objective:
        column, _, goal = text.partition(":")
        match = re.fullmatch(r"(>=|<=)\s*([-+0-9.eE]+)", goal)
        if match:
            with contextlib.suppress(ValueError):
                return cls(column, match[1], float(match[2]))
        if not re.fullmatch(r"[A-Za-z]\w*", column) or goal not in ("", "max", "min"):
            raise SpecError(
                f"{text!r} is not an objective.",
                field="objective",
                hint="Write COLUMN, COLUMN:max, COLUMN:min, COLUMN:>=X or COLUMN:<=X; a column has letters, digits and _.",
            )
        return cls(column, goal or "max")

    def missed(self, value: float) -> bool:
        """Whether a value misses the threshold."""
        if self.threshold is None:
            return False
        return value < self.threshold if self.goal == ">=" else value > self.threshold

    def __str__(self) -> str:
        return f"{self.column}:{self.goal}{'' if self.threshold is None else self.threshold}"


@dataclass(frozen=True)
class Settings:
    wild_type: str
    objectives: tuple[str, ...]
    sites: tuple[int, ...] = ()
    mutations: int | None = None
    candidates: str = ""  # hash of candidates.csv
    allowed: dict[str, str] = field(default_factory=dict)
    forbidden: tuple[int, ...] = ()
    batch: int = 96
    plate: int = 96
    controls: int = 4
    budget: int = 0  # wells in all; 0 is no limit
    seed: int = 0
    prior: str = ""  # hash of prior.csv

    def text(self) -> str:
        lines = []
        for key, value in asdict(self).items():
            if value is None:
                continue
            shown = (
                "{" + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items()) + "}"
                if isinstance(value, dict)
                else json.dumps(value)
            )
            lines.append(f"{key} = {shown}")
        return "\n".join(lines) + "\n"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check(settings: Settings) -> None:
    columns = [Objective.read(o).column for o in settings.objectives]
    if not columns or len(set(columns)) < len(columns):
        raise SpecError("give one or more objectives, each column once.", field="objective")
    derived = {f"{c}_{what}" for c in columns for what in ("se", "predicted", "low", "high")}
    if taken := [c for c in columns if c.lower() in RESERVED or c in derived]:
        raise SpecError(
            f"{taken[0]!r} is a column that plates and ledgers have already.",
            field="objective",
            hint="Choose another name for the objective's column.",
        )
    if settings.budget < 0:
        raise SpecError(
            f"a budget of {settings.budget} wells; give 1 or more, or 0 for no limit.", field="budget"
        )
    if settings.plate not in PLATES:
        raise SpecError(f"{settings.plate} wells; plates have 96 or 384.", field="plate")
    if not 0 <= settings.controls < settings.batch:
        raise SpecError(
            f"{settings.controls} controls in a batch of {settings.batch}; give fewer controls.",
            field="controls",
        )
    if settings.batch > settings.plate:
        raise SpecError(f"a batch of {settings.batch} on a plate of {settings.plate} wells.", field="batch")


class Campaign:
    """An opened campaign. Raises `InputError` for a folder that was changed by hand."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "campaign.toml"
        if not path.is_file():
            raise InputError(
                f"{self.folder} is not a campaign.",
                code="campaign.not_found",
                hint="See: bioseq campaign create -h",
            )
        try:
            data = tomllib.loads(path.read_text("utf-8"))
            stated = data.pop("hash")
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            self.settings = Settings(**lists)
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise self._edited(path, str(error)) from None
        if _sha(self.settings.text().encode()) != stated:
            raise self._edited(path, "the hash differs")
        self.wild_type = self.settings.wild_type
        self.objectives = [Objective.read(o) for o in self.settings.objectives]
        self.ledger = Ledger(self.folder / "ledger.csv", [o.column for o in self.objectives])

    @staticmethod
    def _edited(path: Path, what: str) -> InputError:
        return InputError(
            f"{path}: changed by hand: {what}.",
            code="campaign.edited",
            hint="Restore the file; for other settings start a new campaign.",
        )

    @classmethod
    def create(
        cls,
        folder: str | Path,
        settings: Settings,
        *,
        prior: np.ndarray | None = None,
        file: Path | None = None,
    ) -> Campaign:
        """`prior` is float [L, 20], the zero-shot score of every substitution (wild type 0); zeros without one. All or
        nothing: the folder appears when it is complete."""
        folder = Path(folder)
        if folder.exists():
            raise InputError(
                f"{folder} exists already.", code="campaign.exists", hint="Choose another folder."
            )
        wild = letters_of(settings.wild_type)
        check(settings)
        table = np.zeros((len(wild), 20)) if prior is None else prior
        text = "position,wild_type," + ",".join(LETTERS) + "\n"
        for i, (letter, row) in enumerate(zip(wild, table, strict=True), 1):
            text += f"{i},{letter}," + ",".join(f"{v:.5g}" for v in row) + "\n"
        values = asdict(settings) | {"wild_type": wild, "prior": _sha(text.encode())}
        if file is not None:
            values["candidates"] = _sha(file.read_bytes())
            space = candidates(wild, file)
        else:
            space = _combined(Settings(**values))
        final = Settings(**values)
        stated = f'hash = "{_sha(final.text().encode())}"\n{final.text()}'
        with atomic_folder(folder) as new:
            if file is not None:
                shutil.copyfile(file, new / "candidates.csv")
            (new / "prior.csv").write_text(text)
            (new / "rounds").mkdir()
            (new / "campaign.toml").write_text(
                f"# Frozen: start a new campaign for other settings.\n{stated}"
            )
        campaign = cls(folder)
        campaign.space = space  # a file of a million candidates takes ten seconds to read
        return campaign

    @cached_property
    def space(self) -> Space:
        if not self.settings.candidates:
            return _combined(self.settings)
        path = self.folder / "candidates.csv"
        if _sha(path.read_bytes()) != self.settings.candidates:
            raise self._edited(path, "the hash differs")
        return candidates(self.wild_type, path)

    @cached_property
    def prior(self) -> np.ndarray:
        """float [L, 20]"""
        path = self.folder / "prior.csv"
        if _sha(path.read_bytes()) != self.settings.prior:
            raise self._edited(path, "the hash differs")
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(2, 22), ndmin=2)

    def state(self) -> State:
        return State.fold(self.ledger.read()[0])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; the lock goes with the process."""
        with open(self.folder / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self.folder}: another command is writing.",
                    code="campaign.busy",
                    hint="Wait for it to end.",
                ) from None
            yield

    def round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:02d}"

    def record(self, number: int, files: dict[str, str], events: Sequence[Event]) -> None:
        """A round's files, then its events. A kill between the two leaves files that the same proposal replaces."""
        folder = self.round_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with atomic_file(folder / name, force=True) as path:
                path.write_text(text, "utf-8")
        self.ledger.append(events)

    def mark(self, event: str, which: Sequence[str]) -> int:
        """Mark wells, and how many. Each of `which` is a well, `ROUND/WELL` as `2/B7`, or a variant, which is all of its
        wells that can be marked so; none at all with `ordered` is every well under way."""
        with self.locked():
            state = self.state()
            old = {"ordered": ("proposed",), "abandoned": ("proposed", "ordered", "failed")}.get(
                event, ("measured",)
            )
            able = {at: e for at, e in state.wells.items() if e.event in old}
            chosen = {} if which or event != "ordered" else dict(able)
            missing = []
            for text in which:
                well = re.fullmatch(r"(\d+)/(\+\d+|[A-Za-z]\d+)", text.strip())
                if well:
                    found = {at: able[at] for at in [(int(well[1]), well[2].upper())] if at in able}
                else:
                    name = str(self.space.read(text))
                    found = {at: e for at, e in able.items() if e.variant == name}
                chosen |= found
                if not found:
                    missing.append(text)
            if missing:
                raise InputError(
                    f"{', '.join(missing[:5])}: no well that can be marked {event}.",
                    code="campaign.mark",
                    hint=f"It must be {' or '.join(old)}. Name a variant, or a well as 2/B7: round 2, well B7.",
                )
            hit = list(chosen.values())
            if hit:
                self.ledger.append(
                    [Event(event, e.round, e.well, e.variant, e.source, e.values, e.errors) for e in hit]
                )
            return len(hit)

    def plate(self, number: int) -> str:
        """A round's plate.csv, whose hash the ledger has."""
        path = self.round_folder(number) / "plate.csv"
        try:
            data = path.read_bytes()
        except OSError:
            raise self._edited(path, "it is not there") from None
        if _sha(data) != self.state().plates.get(number):
            raise self._edited(path, "the hash differs")
        return data.decode()

    def ledger_text(self) -> str:
        """ledger.csv as far as it is committed, checked. Of a well the last row counts."""
        _, whole, _ = self.ledger.read()
        return (
            self.ledger.path.read_bytes()[:whole].decode() if whole else ",".join(self.ledger.header) + "\n"
        )

    def status(self) -> dict[str, Any]:
        state = self.state()
        best = {}
        known = [{k: v[0] for k, v in state.measured(i).items()} for i in range(len(self.objectives))]
        missed = {
            k
            for o, values in zip(self.objectives, known, strict=True)
            for k, v in values.items()
            if o.missed(v)
        }
        for o, found in zip(self.objectives, known, strict=True):
            values = {k: v for k, v in found.items() if k != "WT" and k not in missed}
            if values:
                name = (min if o.goal in ("min", "<=") else max)(values, key=lambda k: values[k])
                best[str(o)] = {"variant": name, "value": values[name]}
        events = ("proposed", "ordered", "measured", "failed", "abandoned", "excluded")
        return {
            "rounds": state.rounds,
            "space": self.space.size,
            "wells": {e: state.count(e) for e in events},
            "best": best,
        }


def _combined(settings: Settings) -> Space:
    return combinations(
        settings.wild_type,
        settings.sites,
        settings.mutations,
        {int(k): v for k, v in settings.allowed.items()},
        settings.forbidden,
    )


def wells(plate: int) -> list[str]:
    rows, columns = PLATES[plate]
    return [f"{chr(65 + r)}{c + 1}" for r in range(rows) for c in range(columns)]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
