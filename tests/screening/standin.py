"""A deterministic engine without a model, to test and measure the data path. No command reaches it."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.screening.isolation import Screened, isolate
from serving.screening.tables.columns import HeadColumns

HEADS = (
    HeadColumns("stability", "regression", (), 1, "sha256:stand-in", "kcal/mol"),
    HeadColumns("place", "multilabel", ("nucleus", "membrane"), 1, "sha256:stand-in"),
)


@dataclass(frozen=True)
class StandIn:
    """Numbers from a hash of each sequence, at memory speed. The faults serve the tests: a sequence with
    `poison` kills its worker, one with `trip` raises, more than `fits` residues at once do not fit in memory;
    `fatal` is the path of a file whose absence fails the engine. `seconds` is a delay a call."""

    heads: tuple[HeadColumns, ...] = HEADS
    alphabet: str = "protein"
    width: int = 8
    budget: int = 2048
    memory_bytes: int = 0
    device: str = "cpu"
    seconds: float = 0.0
    poison: str = ""
    trip: str = ""
    fits: int = 1 << 60
    fatal: str = ""
    name: str = "stand-in"

    def identity(self) -> dict[str, Any]:
        return {
            "model": {"name": self.name, "version": 1, "hash": "sha256:stand-in"},
            "heads": [
                {"name": h.name, "version": h.version, "hash": h.hash, "task": h.task} for h in self.heads
            ],
            "engine": {"dtype": "float32", "device": "cpu", "threads": 1, "batch_tokens": self.budget},
        }

    def cards(self) -> dict[str, str]:
        return {self.name: "A stand-in: its numbers mean nothing."}

    def build(self) -> _StandInEngine:
        return _StandInEngine(self)


class _StandInEngine:
    def __init__(self, settings: StandIn):
        self.settings = settings

    def run(self, sequences: Sequence[str], embed: Sequence[bool]) -> list[Screened]:
        s = self.settings
        if s.fatal and not os.path.exists(s.fatal):
            raise FileNotFoundError(2, "No such file or directory", s.fatal)
        if s.seconds:
            time.sleep(s.seconds)

        def compute(places: list[int]) -> list[Screened]:
            if sum(len(sequences[i]) for i in places) > s.fits:
                raise MemoryError
            if s.trip and any(s.trip in sequences[i] for i in places):
                raise RuntimeError("a fault")
            if s.poison and any(s.poison in sequences[i] for i in places):
                os.kill(os.getpid(), signal.SIGKILL)
            return [self._one(sequences[i], embed[i]) for i in places]

        done = isolate(compute, list(range(len(sequences))))
        return [done[i] for i in range(len(sequences))]

    def _one(self, sequence: str, embed: bool) -> Screened:
        digest = hashlib.blake2b(sequence.encode(), digest_size=32).digest()
        a, b, c, ood = (digest[k] / 255 for k in range(4))
        value = 4 * a - 2
        predictions = {
            "stability": {
                "value": value,
                "interval": [value - 0.5, value + 0.5],
                "ood": ood,
                "ood_percentile": ood,
            },
            "place": {
                "value": [n for n, p in (("nucleus", b), ("membrane", c)) if p > 0.5],
                "probabilities": {"nucleus": b, "membrane": c},
                "ood": ood,
                "ood_percentile": ood,
            },
        }
        cells = {k: v for head in self.settings.heads for k, v in head.cells(predictions[head.name]).items()}
        vector = (
            np.frombuffer(digest, dtype=np.uint8)[: self.settings.width].astype(np.float32) / 255
            if embed
            else None
        )
        return Screened(cells, embedding=vector)
