"""An engine and the models it holds: asks in, replies out. What an engine replica is made of.

Backbones are loaded by exact name when first asked for and the least recently used is dropped beyond
`max_models`; heads likewise within each backbone. A model in use by a request is never dropped. Everything
that touches a loaded model runs in the engine's thread, between batches.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.errors import BioseqError, NotFoundError, ServiceError
from serving.engine.asks import Ask, Fault, Reply
from serving.engine.batcher import Engine
from serving.engine.queueing import EngineDead, Observer

if TYPE_CHECKING:
    from bioseq.inference.evidence import Homologs
    from bioseq.inference.predictor import Predictor
    from serving.engine.catalogue import Catalogue
    from serving.settings import Settings


def lanes(settings: Settings) -> int:
    """One on a GPU; on a CPU the threads asked for, else this replica's share of the cores."""
    if settings.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return 1
    if settings.threads:
        return settings.threads
    return max(1, len(os.sched_getaffinity(0)) // settings.engine_replicas)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def device_failed(error: BaseException) -> bool:
    """Whether an error is one after which every computation of this process fails: CUDA's errors but out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or (
        isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver error"))
    )


def _probe(device: Any) -> None:
    import torch

    if float(torch.ones(2, device=device).sum()) != 2.0:
        raise EngineDead("the device computes wrongly.")


Loader = Callable[[str], "Predictor"]


@dataclass
class Slot:
    """A loaded backbone; `users` are the requests that hold it, `heads` when each head was last used."""

    predictor: Predictor
    users: int = 0
    heads: OrderedDict[str, int] = field(default_factory=OrderedDict)


class Host:
    """`load` makes a predictor of an exact name; by default `bioseq.load` with the service's settings."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        *,
        load: Loader | None = None,
        observer: Observer | None = None,
        on_death: Callable[[], None] | None = None,
    ):
        self.settings, self.catalogue = settings, catalogue
        self._load = load or self._load_by_name
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Slot]] = {}
        self.engine = Engine(
            lanes=lanes(settings),
            max_queue_s=settings.max_queue_s,
            max_queued_tokens=settings.max_queued_tokens,
            observer=observer,
            on_start=_one_thread,
            fatal=device_failed,
            on_death=on_death,
        )

    def _load_by_name(self, exact: str) -> Predictor:
        from bioseq.inference.loading import load

        s = self.settings
        # One thread a batch: the engine's lanes run several batches at a time themselves.
        return load(
            exact,
            dtype=s.dtype,
            device=s.device,
            threads=1,
            budget=s.budget,
            registry=self.catalogue.registry,
            homologs="none",  # what a backbone reads was searched before
        )

    async def start(self) -> None:
        """Start the worker, load the default backbone and run once, so that the first request is fast and
        the speed is known."""
        self.engine.start()
        await asyncio.to_thread(self.catalogue.refresh)
        await self.warm()

    async def warm(self) -> None:
        """Have the default backbone ready."""
        exact = self.catalogue.backbone().exact
        if exact in self._slots:
            return
        slot = await self._slot(exact)
        # The second run is measured; the first pays for lazy initialisation.
        for _ in range(2):
            from bioseq.backbones.pooling import EmbedOptions

            probe = (slot.predictor.alphabet.standard * 50)[: min(200, slot.predictor.max_residues)]
            queries = [slot.predictor.prepare(probe, embed=EmbedOptions()) for _ in range(4)]
            await self.engine.submit(slot.predictor, queries, admitted=True)

    async def check(self) -> None:
        """Raises when the engine's threads are dead or hang, or its device computes nothing any more."""
        self.engine.check()
        for slot in list(self._slots.values()):
            device = getattr(slot.predictor, "device", None)
            if device is not None and device.type == "cuda":
                try:
                    await asyncio.wait_for(asyncio.to_thread(_probe, device), 20.0)
                except Exception as error:
                    raise EngineDead(
                        f"the device {device} does not answer ({type(error).__name__})."
                    ) from None

    def status(self) -> dict[str, Any]:
        return {
            **self.engine.status(),
            "models": {
                exact: {"heads": sorted(slot.heads), "budget": slot.predictor.budget}
                for exact, slot in list(self._slots.items())
            },
        }

    async def answer(self, ask: Ask) -> Reply:
        """Never raises but when cancelled."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ask.timeout_s):
                reply = await self._answer(ask)
        except TimeoutError:
            fault = Fault("ServiceError", "the request's time ran out.", "request.timeout", status=408)
            return Reply(fault=fault)
        except BioseqError as error:
            return Reply(fault=Fault.of(error, offset=ask.offset))
        except Exception as error:
            from serving.telemetry.logs import trouble

            trouble("ask failed", error)
            return Reply(fault=Fault.of(error))
        return replace(reply, engine_s=time.perf_counter() - began)

    async def _answer(self, ask: Ask) -> Reply:
        slot = await self._slot(ask.model)
        slot.users += 1
        try:
            if ask.heads:
                await self._heads(slot, ask.heads)
            if ask.kind in ("score", "scan"):
                return await self._variants(slot.predictor, ask)
            return await self._sequences(slot.predictor, ask)
        finally:
            slot.users -= 1
            for head in ask.heads:
                slot.heads[head] = max(0, slot.heads.get(head, 1) - 1)

    # -- loaded things -------------------------------------------------------------------------------------

    async def _slot(self, exact: str) -> Slot:
        slot = self._slots.get(exact)
        if slot is not None:
            self._slots.move_to_end(exact)
            return slot
        # Requests that ask for it at the same time wait for one load; a cancelled one does not stop it.
        task = self._loading.get(exact)
        if task is None:
            task = self._loading[exact] = asyncio.create_task(self._open(exact))
            task.add_done_callback(lambda _: self._loading.pop(exact, None))
        return await asyncio.shield(task)

    async def _open(self, exact: str) -> Slot:
        slot = Slot(await asyncio.to_thread(self._load, exact))
        self._slots[exact] = slot
        for name in list(self._slots):
            if len(self._slots) <= self.settings.max_models:
                break
            if self._slots[name].users == 0 and name != exact:
                del self._slots[name]
        return slot

    async def _heads(self, slot: Slot, heads: tuple[str, ...]) -> None:
        """Load what is missing. A use is counted before, so that nothing in use is unloaded."""
        for head in heads:
            slot.heads[head] = slot.heads.get(head, 0) + 1
            slot.heads.move_to_end(head)
        missing = [h for h in heads if h not in slot.predictor.heads]
        if missing:
            await asyncio.wrap_future(self.engine.call(lambda: self._load_heads(slot, missing)))

    def _load_heads(self, slot: Slot, heads: list[str]) -> None:
        from bioseq.heads.head import Head

        for name in heads:
            if name not in slot.predictor.heads:
                try:
                    bundle = self.catalogue.registry.resolve(name, paths=False)
                except NotFoundError as error:
                    raise NotFoundError(error.message, code="head.not_found", hint=error.hint) from None
                slot.predictor.load_head(name, Head.load(bundle))
        idle = [n for n, users in slot.heads.items() if users == 0 and n in slot.predictor.heads]
        for name in idle[: max(0, len(slot.predictor.heads) - self.settings.max_heads)]:
            slot.predictor.unload_head(name)
            del slot.heads[name]

    # -- asks ----------------------------------------------------------------------------------------------

    async def _sequences(self, predictor: Predictor, ask: Ask) -> Reply:
        from bioseq.backbones.pooling import EmbedOptions
        from bioseq.inference.variants import give

        what: dict[str, Any] = {"long_sequences": ask.long_sequences}
        if ask.kind == "embed":
            o = ask.options
            what["embed"] = EmbedOptions(o["pooling"], tuple(o["layers"]), o["per_residue"])
        elif ask.kind == "logits":
            _need_lm_head(predictor)
            what["logits"] = "all"
        else:
            what["heads"], what["nearest"] = ask.heads, ask.options["nearest"]
        queries = [predictor.prepare(s, index=i, **what) for i, s in enumerate(ask.sequences)]
        for i, query in enumerate(queries):
            query.told = {head: ask.told[head][i] for head in self._searching(predictor, ask)}
            if ask.reads and ask.found:
                give(query, ask.found[i])
        results = await self.engine.submit(predictor, queries, admitted=ask.admitted, caller=ask.caller)
        _raise_first(results)
        notes = tuple(r.told for r in results)
        if ask.kind == "predict":
            return Reply(predictions=[r.predictions for r in results], notes=notes)
        rows = [r.embedding if ask.kind == "embed" else r.logits for r in results]
        if ask.found and not ask.reads:
            return await asyncio.to_thread(_beside_homologs, predictor, ask, rows, notes)
        ragged = ask.kind == "logits" or ask.options["per_residue"]
        return Reply(arrays=rows if ragged else np.stack(rows), notes=notes, homologs=_read(ask))

    @staticmethod
    def _searching(predictor: Predictor, ask: Ask) -> list[str]:
        """The heads that read homologs. Raises `ServiceError` where these were not found before: no engine searches."""
        heads = [h for h in ask.heads if predictor.heads[h].reads_homologs]
        if any(h not in ask.told for h in heads):
            raise ServiceError(
                "an engine was asked without the homologs that a head reads.", status=503, retry_after=5,
                code="homologs.missing", hint="Ask again.",
            )  # fmt: skip
        return heads

    async def _variants(self, predictor: Predictor, ask: Ask) -> Reply:
        from bioseq.inference.variants import Plan, WildType, plan_scan, plan_scores

        _need_lm_head(predictor)
        o = ask.options

        def planned() -> Plan:
            wild = WildType.prepare(predictor, ask.sequences[0], o["strategy"], ask.long_sequences)
            wild = wild.with_homologs(ask.found[0] if ask.found else None)
            return plan_scan(wild) if ask.kind == "scan" else plan_scores(wild, wild.read(o["mutants"]))

        plan = await asyncio.to_thread(planned)
        results = await self.engine.submit(predictor, plan.queries, admitted=ask.admitted, caller=ask.caller)
        _raise_first(results)
        scored = plan.finish(results)
        notes = (tuple(scored.notes),)
        told = _read(ask) if scored.homologs is None else (scored.homologs,)
        if ask.kind == "scan":
            return Reply(arrays=[scored.values], notes=notes, homologs=told)
        return Reply(scores=[float(v) for v in scored.values], notes=notes, homologs=told)


def _read(ask: Ask) -> tuple[Homologs, ...] | None:
    """What a backbone read that reads homologs."""
    from bioseq.inference.evidence import Homologs

    return tuple(map(Homologs.of, ask.found)) if ask.reads and ask.found else None


def _beside_homologs(predictor: Predictor, ask: Ask, rows: list[Any], notes: Any) -> Reply:
    """Logits mixed with what the homologs say."""
    from bioseq.inference.evidence import Evidence, residue_probabilities

    mixture, alphabet = predictor.mixture, predictor.alphabet
    told = tuple(Evidence.of(f, mixture, len(row)).summary() for f, row in zip(ask.found, rows, strict=True))
    mixed = [residue_probabilities(row, f, mixture, alphabet) for f, row in zip(ask.found, rows, strict=True)]
    return Reply(arrays=mixed, notes=notes, homologs=told)


def _need_lm_head(predictor: Predictor) -> None:
    if not predictor.has_lm_head:
        from bioseq.errors import SpecError

        raise SpecError(
            f"{predictor.name} has no language-model head: it can embed and predict only.", field="model"
        )


def _raise_first(results: list[Any]) -> None:
    """A request is answered whole or not at all: the first item's error is the request's."""
    for result in results:
        if isinstance(result, EngineDead):
            raise result
    for result in results:
        if isinstance(result, BaseException):
            raise result
