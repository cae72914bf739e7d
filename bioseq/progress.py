"""Progress of long work on standard error: a bar on a terminal, one line per 10 % elsewhere.

Where `BIOSEQ_PROGRESS_FILE` names a file, the state is also written there as one JSON object, at most once a
second, replaced whole: {"label", "done", "total", "unit", "fraction"}. Job schedulers read it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType


class Progress:
    """Counts up to `total` of `unit`. Quiet when `enabled` is false.

    >>> with Progress(100, "embedding", unit="sequences", enabled=False) as bar:
    ...     bar.add(10)
    """

    def __init__(self, total: int, label: str, *, unit: str = "items", enabled: bool = True):
        self.total, self.label, self.unit, self.enabled = max(int(total), 1), label, unit, enabled
        self.done, self._tenth, self._started = 0, 0, time.monotonic()
        self._bar = None
        self._file = os.environ.get("BIOSEQ_PROGRESS_FILE")
        self._told = float("-inf")

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.label, unit=f" {self.unit}", file=sys.stderr)
        return self

    def add(self, count: int = 1) -> None:
        self.done += count
        if self._file:
            self._tell(self._file)
        if self._bar is not None:
            self._bar.update(count)
        elif self.enabled and self.done * 10 // self.total > self._tenth:
            self._tenth = self.done * 10 // self.total
            seconds = time.monotonic() - self._started
            rate = self.done / seconds if seconds > 0 else 0.0
            left = (self.total - self.done) / rate if rate else 0.0
            print(
                f"{self.label}: {self._tenth * 10} % ({self.done}/{self.total} {self.unit}, "
                f"{rate:.0f} {self.unit}/s, {left:.0f} s left)",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, file: str) -> None:
        now = time.monotonic()
        if now - self._told < 1 and self.done < self.total:
            return
        self._told = now
        state = {
            "label": self.label,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "fraction": min(self.done / self.total, 1.0),
        }
        temporary = f"{file}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as handle:
            json.dump(state, handle)
        os.replace(temporary, file)

    def rename(self, label: str) -> None:
        """A new label, for a second count beside the first."""
        self.label = label
        if self._bar is not None:
            self._bar.set_description(label, refresh=False)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
