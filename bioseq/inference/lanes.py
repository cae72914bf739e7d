"""Batches at a time on a CPU, one thread each, and their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from bioseq.errors import ResourceError

T = TypeVar("T")


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError("no CUDA device is available.", hint="Use device 'cpu' or 'auto'.")
    return name


def in_order(batches: Iterable[Callable[[], list[T]]], lanes: int | None) -> Iterator[T]:
    """Results of the batches in their order, `lanes` batches at a time, each on one thread; None (a GPU): one after
    another.

    One thread a batch keeps the order of every reduction, and so the bytes of a result, the same for any
    number of lanes, and wastes no time at barriers inside small products.
    """
    if lanes is None:
        for batch in batches:
            yield from batch()
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if lanes == 1:
            for batch in batches:
                yield from batch()
            return
        with ThreadPoolExecutor(
            lanes, thread_name_prefix="bioseq-lane", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            running: deque[Future[list[T]]] = deque()
            for batch in batches:
                running.append(pool.submit(batch))
                if len(running) > 2 * lanes:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
    finally:
        torch.set_num_threads(before)
