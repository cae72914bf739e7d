"""The client that blocks.

    remote = bioseq.connect("http://127.0.0.1:8000", api_key=...)
    remote.embed(seqs)          # the same methods, the same shapes, the same numbers as `bioseq.load(...)`

Requests are packed by the server's own limits, answers come back in input order, and 429, 5xx, broken connections
and answers that are not whole are asked for again with growing pauses, keeping to the server's Retry-After.

What it cannot do: choose device or arithmetic (they are the server's).
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from bioseq.client import calls
from bioseq.client import campaigns as campaign_calls
from bioseq.client import jobs as job_calls
from bioseq.client import keys as key_calls
from bioseq.client.asynchronous import AsyncClient
from bioseq.client.drivers import Blocking, run
from bioseq.client.exchange import Connection

__all__ = ["AsyncClient", "Client", "connect"]
P = ParamSpec("P")
T = TypeVar("T")


def connect(
    url: str,
    api_key: str | None = None,
    *,
    model: str = "default",
    timeout: float = 600.0,
    retries: int = 8,
    transport: Any = None,
) -> Client:
    """A client of the service at `url`. `retries` is how often a request is tried again, `timeout` seconds
    bound one try. Nothing is sent before the first call. Raises `MissingExtraError` without httpx."""
    return Client(url, api_key, model=model, timeout=timeout, retries=retries, transport=transport)


def _blocking(
    function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(function)
    def call(self: Any, *args: P.args, **options: P.kwargs) -> T:
        return run(functools.partial(function, self, *args, **options))

    return call


def _blocking_each(
    function: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    @functools.wraps(function)
    def call(self: Any, *args: P.args, **options: P.kwargs) -> Iterator[T]:
        items = function(self, *args, **options)
        try:
            while True:
                yield run(items.__anext__)
        except StopAsyncIteration:
            return
        finally:
            run(items.aclose)

    return call


class Client(Connection):
    """Synchronous; safe to use from several threads. A context manager; closing it is optional.

    Raises `SequenceError` subclasses, `MutationError`, `NotFoundError` and `SpecError` as the local predictor
    does, and `ServiceError` for what only a service can answer (401, 403, 429 and 5xx after all retries).
    """

    _driver = Blocking
    limits = _blocking(calls.limits)
    models = _blocking(calls.models)
    estimate = _blocking(calls.estimate)
    embed = _blocking(calls.embed)
    logits = _blocking(calls.logits)
    predict = _blocking(calls.predict)
    score = _blocking(calls.score)
    scan = _blocking(calls.scan)
    search = _blocking(calls.search)
    stores = _blocking(calls.stores)
    homologs = _blocking(calls.homologs)
    keys = _blocking(key_calls.keys)
    create_key = _blocking(key_calls.create_key)
    revoke_key = _blocking(key_calls.revoke_key)
    upload = _blocking(job_calls.upload)
    files = _blocking(job_calls.files)
    delete_file = _blocking(job_calls.delete_file)
    submit = _blocking(job_calls.submit)
    jobs = _blocking(job_calls.jobs)
    job = _blocking(job_calls.job)
    cancel = _blocking(job_calls.cancel)
    purge = _blocking(job_calls.purge)
    logs = _blocking(job_calls.logs)
    follow = _blocking_each(job_calls.follow)
    wait = _blocking(job_calls.wait)
    result_files = _blocking(job_calls.result_files)
    result = _blocking(job_calls.result)
    create_campaign = _blocking(campaign_calls.create_campaign)
    campaigns = _blocking(campaign_calls.campaigns)
    campaign = _blocking(campaign_calls.campaign)
    delete_campaign = _blocking(campaign_calls.delete_campaign)
    ingest = _blocking(campaign_calls.ingest)
    mark = _blocking(campaign_calls.mark)
    plate = _blocking(campaign_calls.plate)
    campaign_ledger = _blocking(campaign_calls.campaign_ledger)
    campaign_report = _blocking(campaign_calls.campaign_report)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        run(self.driver.close_all)
