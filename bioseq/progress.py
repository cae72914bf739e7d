"""Progress of long work on standard error: a bar on a terminal, one line per 10 % elsewhere."""

from __future__ import annotations

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

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.label, unit=f" {self.unit}", file=sys.stderr)
        return self

    def add(self, count: int = 1) -> None:
        self.done += count
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
