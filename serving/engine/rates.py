"""How fast each runner is, measured: decayed sums of tokens and seconds, divided last."""

from __future__ import annotations

import weakref
from typing import Any

_KEEP = 0.9  # of the sums, per batch


class Rates:
    """Not thread-safe: the engine holds its lock."""

    def __init__(self) -> None:
        self._sums: weakref.WeakKeyDictionary[Any, list[float]] = weakref.WeakKeyDictionary()
        self._all = [0.0, 0.0]

    def add(self, runner: Any, tokens: int, seconds: float) -> None:
        for sums in (self._sums.setdefault(runner, [0.0, 0.0]), self._all):
            sums[0] = sums[0] * _KEEP + tokens
            sums[1] = sums[1] * _KEEP + seconds

    def seconds_per_token(self, runner: Any) -> float:
        """Of one lane; 0 before the runner's first batch."""
        tokens, seconds = self._sums.get(runner, (0.0, 0.0))
        return seconds / tokens if tokens else 0.0

    def overall(self) -> float:
        tokens, seconds = self._all
        return seconds / tokens if tokens else 0.0

    def tokens_per_second(self, lanes: int = 1) -> float | None:
        """Of all lanes together; None before the first batch."""
        rate = self.overall()
        return round(lanes / rate, 1) if rate > 0 else None
