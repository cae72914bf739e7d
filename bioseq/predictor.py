"""The only inference path: HTTP, the command line, screening and the Python API all end here.

`prepare` turns a sequence into a `Work` without touching torch; `run` plans works by token budget, packs
them, makes one forward pass a batch, and scatters the answers to input order. A result does not depend on a
sequence's batch-mates: relative error <= 1e-5 in float32, <= 2e-2 in bfloat16.

Legend: T tokens of a pack, L residues of a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bioseq import batching
from bioseq.alphabet import Alphabet, protein
from bioseq.batching import SPECIAL_TOKENS, Window
from bioseq.errors import BioseqError, ResourceError, SequenceError, SequenceTooLongError, SpecError
from bioseq.model.encoder import PackedEncoder
from bioseq.model.memory import keep_heap
from bioseq.pooling import EmbedAsk, reduce
from bioseq.progress import Progress
from bioseq.work import Answer, Part, Segment, Work, logit_rows, merge

if TYPE_CHECKING:
    from bioseq.fasta import Record
    from bioseq.heads import Head
    from bioseq.registry import Registry

LongSequences = Literal["error", "window", "truncate"]
WINDOW_OVERLAP = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUDGETS = {"cpu": 1024, "cuda": 65536}  # tokens a batch; on a CPU what fits its caches


class Predictor:
    """A backbone, its heads, and the way from sequences to numbers.

    On a CPU, `threads` batches are computed at a time (default: all cores), each on one thread, so that the
    bytes of a result do not depend on it. `budget` is the number of tokens a batch. Not thread-safe: one
    engine, one predictor.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        *,
        name: str = "unnamed",
        version: int | None = None,
        content_hash: str = "",
        alphabet: Alphabet | None = None,
        dtype: str = "float32",
        device: str = "auto",
        threads: int | None = None,
        budget: int | None = None,
        registry: Registry | None = None,
    ):
        if dtype not in DTYPES:
            raise SpecError(f"{dtype!r} is not one of {', '.join(DTYPES)}.", field="dtype")
        if threads is not None and threads < 1:
            raise SpecError(f"{threads} is below 1.", field="threads")
        self.threads = threads or len(os.sched_getaffinity(0))
        self.device = torch.device(_device(device))
        if self.device.type == "cpu":
            keep_heap()
        self.name, self.version, self.hash = name, version, content_hash
        self.alphabet = alphabet or protein()
        self.config = encoder.config
        self.dtype = dtype
        self.encoder = encoder.to(self.device, DTYPES[dtype]).eval().requires_grad_(False)
        self.registry = registry
        self.heads: dict[str, Head] = {}
        self.max_residues = self.config.max_residues
        self.budget = max(budget or BUDGETS.get(self.device.type, 2048), self.max_residues + SPECIAL_TOKENS)

    # ------------------------------------------------------------------ heads

    def load_head(self, name: str, head: Head | None = None) -> Head:
        """Make a head answer under `name`: a registry name, `NAME@V`, or a bundle directory.

        Raises `NotFoundError`, or `BundleError` for a head of another backbone.
        """
        from bioseq import heads as heads_module
        from bioseq.registry import Registry

        if head is None:
            bundle = (self.registry or Registry()).resolve(name, kind="head")
            head = heads_module.Head.load(bundle)
        heads_module.check_base(head, backbone_hash=self.hash, backbone_name=self.name)
        if head.adapter is not None:
            from bioseq import adapters

            if name in self.heads:
                adapters.detach(self.encoder, name)
            adapters.attach(self.encoder, name, head.adapter)
        if head.trunk is not None:
            head.trunk.to(self.device, DTYPES[self.dtype]).eval()
        self.heads[name] = head
        return head

    def unload_head(self, name: str) -> None:
        head = self.heads.pop(name)
        if head.adapter is not None:
            from bioseq import adapters

            adapters.detach(self.encoder, name)

    # ---------------------------------------------------------------- prepare

    def prepare(
        self,
        sequence: str | Record,
        *,
        embed: EmbedAsk | None = None,
        logits: str | np.ndarray | None = None,
        heads: Sequence[str] = (),
        nearest: int = 0,
        long_sequences: LongSequences = "error",
        index: int | None = None,
        gaps: bool = False,
    ) -> Work:
        """Check and encode one sequence. Cheap, no torch. Raises subclasses of `SequenceError` that name the
        record and position, and `NotFoundError` for an unknown head."""
        if nearest < 0:
            raise SpecError(f"{nearest} is below 0.", field="nearest")
        text = sequence if isinstance(sequence, str) else sequence.sequence
        record = None if isinstance(sequence, str) else sequence.id
        source = None if isinstance(sequence, str) else sequence.source
        try:
            encoded = self.alphabet.encode(text, gaps=gaps, masks="<mask>" in text)
            ids, notes = encoded.ids, list(encoded.notes)
            overlap = 0
            cover = [Window(0, len(ids))]
            if len(ids) > self.max_residues:
                if long_sequences == "truncate":
                    notes.append(f"truncated from {len(ids)} to {self.max_residues} residues")
                    ids = ids[: self.max_residues]
                    cover = [Window(0, len(ids))]
                elif long_sequences == "window":
                    overlap = min(WINDOW_OVERLAP, self.max_residues // 4)
                    cover = batching.windows(len(ids), self.max_residues, overlap)
                    notes.append(
                        f"{len(ids)} residues in {len(cover)} windows of {self.max_residues} "
                        f"overlapping by at least {overlap}"
                    )
                elif long_sequences == "error":
                    raise SequenceTooLongError(
                        f"{len(ids)} residues; the limit is {self.max_residues}.",
                        hint="Cut it, or choose long sequences 'window' or 'truncate'.",
                    )
                else:
                    raise SpecError(
                        f"{long_sequences!r} is not one of error, window, truncate.", field="long_sequences"
                    )
        except SequenceError as error:
            raise error.at(index=index, record=record, source=source) from None
        for layer in embed.layers if embed else ():
            if not -self.config.n_layers - 1 <= layer <= self.config.n_layers:
                raise SpecError(
                    f"layer {layer} is not there; this model has 0 to {self.config.n_layers}.", field="layers"
                )
        routes: list[str | None] = [None] if embed is not None or logits is not None else []
        for name in heads:
            if name not in self.heads:
                self.load_head(name)
            route = self._route(name)
            if route not in routes:
                routes.append(route)
        return Work(
            ids=ids,
            sequence=text,
            embed=embed,
            logits_at=logits,
            heads=tuple(heads),
            nearest=nearest,
            notes=tuple(notes),
            cover=cover,
            overlap=overlap,
            routes=tuple(routes) or (None,),
        )

    # -------------------------------------------------------------------- run

    def run(self, works: Sequence[Work], *, progress: Progress | None = None) -> list[Answer]:
        """Answers in the order of `works`. One forward pass a batch of `budget` tokens."""
        answers = [Answer(notes=w.notes) for w in works]
        features: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        waiting: dict[tuple[int, str | None], dict[int, Part]] = defaultdict(dict)
        for part in self._lanes(self._batches(works)):
            segment, work = part.segment, works[part.segment.work]
            key = (segment.work, segment.route)
            if len(work.cover) > 1:
                waiting[key][segment.window] = part
                if len(waiting[key]) < len(work.cover):
                    continue
                parts = waiting.pop(key)
                hidden, logits = merge([parts[w] for w in range(len(work.cover))], work)
                part = self._reduced(work, segment, hidden, logits)
            answer = answers[segment.work]
            if part.embedding is not None:
                answer.embedding = part.embedding
            if part.logits is not None:
                answer.logits = part.logits.cpu().numpy()
            for name, values in part.features.items():
                features[name][segment.work] = values
            if progress is not None and segment.route == work.routes[-1]:
                progress.add(1)
        self._predictions(works, answers, features)
        return answers

    def _batches(self, works: Sequence[Work]) -> Iterator[Callable[[], list[Part]]]:
        """One forward pass each. What goes together depends on the works and the budget alone."""
        by_trunk: dict[str | None, list[Segment]] = defaultdict(list)
        for i, work in enumerate(works):
            for route in work.routes:
                trunk = route if route is not None and self.heads[route].trunk is not None else None
                by_trunk[trunk].extend(Segment(i, route, w) for w in range(len(work.cover)))
        for trunk, segments in by_trunk.items():
            encoder = self.encoder if trunk is None else self.heads[trunk].trunk
            assert encoder is not None
            spans = [works[s.work].cover[s.window] for s in segments]
            lengths = [w.end - w.start + SPECIAL_TOKENS for w in spans]
            for group in batching.plan(lengths, self.budget):
                yield partial(self._forward, encoder, works, [segments[g] for g in group])

    def _lanes(self, batches: Iterator[Callable[[], list[Part]]]) -> Iterator[Part]:
        """Results of the batches in their order; on a CPU, `threads` batches at a time, each on one thread.

        One thread a batch keeps the order of every reduction, and so the bytes of a result, the same for any
        number of threads, and wastes no time at barriers inside small products.
        """
        if self.device.type != "cpu":
            for batch in batches:
                yield from batch()
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.threads == 1:
                for batch in batches:
                    yield from batch()
                return
            with ThreadPoolExecutor(
                self.threads,
                thread_name_prefix="bioseq-lane",
                initializer=torch.set_num_threads,
                initargs=(1,),
            ) as pool:
                running: deque[Future[list[Part]]] = deque()
                for batch in batches:
                    running.append(pool.submit(batch))
                    if len(running) > 2 * self.threads:
                        yield from running.popleft().result()
                while running:
                    yield from running.popleft().result()
        finally:
            torch.set_num_threads(before)

    def _predictions(
        self, works: Sequence[Work], answers: list[Answer], features: dict[str, dict[int, np.ndarray]]
    ) -> None:
        for name, rows in features.items():
            order = sorted(rows)
            head = self.heads[name]
            values: Any = [rows[i] for i in order]
            predictions = head.predict(
                values if head.per_residue else np.stack(values),
                [works[i].sequence for i in order],
                nearest=[works[i].nearest for i in order],
            )
            for i, prediction in zip(order, predictions, strict=True):
                answers[i].predictions = (answers[i].predictions or {}) | {name: prediction}
        for work, answer in zip(works, answers):
            if len(work.heads) > 1 and answer.predictions:
                answer.predictions = {name: answer.predictions[name] for name in work.heads}

    def _layers(self, works: Sequence[Work], segments: Sequence[Segment]) -> tuple[int, ...]:
        depth = self.config.n_layers
        wanted: set[int] = set()
        for s in segments:
            work = works[s.work]
            if s.route is None and work.embed is not None:
                wanted.update(work.embed.layers)
            if s.route is None and work.logits_at is not None:
                wanted.add(-1)
            for name in work.heads:
                if self._route(name) == s.route:
                    wanted.update(self.heads[name].embed_ask.layers)
        return tuple(sorted({-1 if layer == depth else layer for layer in wanted})) or (-1,)

    def _route(self, head: str) -> str | None:
        return head if self.heads[head].adapter or self.heads[head].trunk is not None else None

    def _forward(self, encoder: PackedEncoder, works: Sequence[Work], segments: list[Segment]) -> list[Part]:
        """One packed pass; halves the batch and tries again when a GPU runs out of memory."""
        try:
            return self._pass(encoder, works, segments)
        except torch.OutOfMemoryError:
            if len(segments) == 1:
                raise ResourceError(
                    f"one sequence of {len(works[segments[0].work].ids)} residues does not fit this device.",
                    hint="Choose long sequences 'window', a smaller model, or a larger device.",
                ) from None
        torch.cuda.empty_cache()
        half = len(segments) // 2
        return self._forward(encoder, works, segments[:half]) + self._forward(encoder, works, segments[half:])

    @torch.inference_mode()
    def _pass(self, encoder: PackedEncoder, works: Sequence[Work], segments: list[Segment]) -> list[Part]:
        windows = [works[s.work].cover[s.window] for s in segments]
        ids = [works[s.work].ids[w.start : w.end] for s, w in zip(segments, windows)]
        batch = batching.pack(
            ids, np.arange(len(ids)), cls_id=self.alphabet.cls_id, eos_id=self.alphabet.eos_id
        )
        tokens_T = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        cu_seqlens = torch.from_numpy(batch.cu_seqlens).to(self.device, non_blocking=True)
        layers = self._layers(works, segments)
        bounds = batch.cu_seqlens.tolist()
        with self._routed(encoder, segments, bounds):
            out = encoder(tokens_T, cu_seqlens, batch.max_seqlen, layers=layers)
        hidden = dict(zip(layers, out if isinstance(out, tuple) else (out,)))
        rows: list[np.ndarray] = []
        for s, start, window in zip(segments, bounds, windows):
            rows.append(logit_rows(works[s.work], s.route, window) + start + 1)
        logits: list[Tensor | None] = [None] * len(segments)
        counts = [len(r) for r in rows]
        if sum(counts):
            chosen = torch.from_numpy(np.concatenate(rows)).to(self.device)
            flat = encoder.logits(hidden[-1][chosen]).float()
            logits = [part if n else None for part, n in zip(flat.split(counts), counts)]
        depth = self.config.n_layers
        result = []
        for s, start, end, part in zip(segments, bounds, bounds[1:], logits):
            slices = {layer: h[start:end] for layer, h in hidden.items()}
            if -1 in slices:
                slices[depth] = slices[-1]
            if len(works[s.work].cover) > 1:
                kept = {layer: h.float() for layer, h in slices.items()}
                result.append(Part(s, hidden=kept, logits=part))
            else:
                result.append(self._reduced(works[s.work], s, slices, part))
        return result

    def _routed(self, encoder: PackedEncoder, segments: list[Segment], bounds: list[int]) -> Any:
        if encoder is not self.encoder or all(s.route is None for s in segments):
            return nullcontext()
        from bioseq import adapters

        return adapters.routed(
            encoder, [(s.route, start, end) for s, start, end in zip(segments, bounds, bounds[1:])]
        )

    @torch.inference_mode()
    def _reduced(
        self, work: Work, segment: Segment, hidden: dict[int, Tensor], logits: Tensor | None
    ) -> Part:
        part = Part(segment, logits=logits)
        if segment.route is None and work.embed is not None:
            part.embedding = reduce(hidden, work.embed).cpu().numpy()
        for name in work.heads:
            if self._route(name) == segment.route:
                part.features[name] = reduce(hidden, self.heads[name].embed_ask).cpu().numpy()
        return part

    # ------------------------------------------------------------- public API

    def _works(self, seqs: Iterable[str | Record] | str, **ask: Any) -> list[Work]:
        if isinstance(seqs, str):
            raise SpecError("give a list of sequences, not one string.", field="seqs")
        return [self.prepare(s, index=i, **ask) for i, s in enumerate(seqs)]

    def _run(self, works: list[Work], label: str, progress: bool) -> list[Answer]:
        with Progress(len(works), label, unit="sequences", enabled=progress) as bar:
            return self.run(works, progress=bar)

    def embed(
        self,
        seqs: Iterable[str | Record],
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (-1,),
        per_residue: bool = False,
        long_sequences: LongSequences = "error",
        progress: bool = False,
    ) -> Any:
        """Embeddings in input order, float32, not normalised.

        [N, D]; [N, layers, D] for several layers; with `per_residue` a list of [L_i, D] (or
        [layers, L_i, D]). `pooling` is mean, max or cls.
        """
        ask = EmbedAsk(pooling, tuple(layers), per_residue)  # type: ignore[arg-type]
        works = self._works(seqs, embed=ask, long_sequences=long_sequences)
        rows = [a.embedding for a in self._run(works, "embedding", progress)]
        if per_residue:
            return rows
        shape = (self.config.d_model,) if len(ask.layers) == 1 else (len(ask.layers), self.config.d_model)
        return np.stack(rows) if rows else np.empty((0, *shape), dtype=np.float32)  # type: ignore[arg-type]

    def logits(
        self,
        seqs: Iterable[str | Record],
        *,
        long_sequences: LongSequences = "error",
        progress: bool = False,
    ) -> list[np.ndarray]:
        """LM logits of every residue, a list of float32 [L_i, V]; "<mask>" in a sequence is a mask token."""
        if self.encoder.lm_head is None:
            raise BioseqError(f"{self.name} has no language-model head: it can embed only.")
        works = self._works(seqs, logits="all", long_sequences=long_sequences)
        return [a.logits for a in self._run(works, "logits", progress)]  # type: ignore[misc]

    def predict(
        self,
        seqs: Iterable[str | Record],
        heads: Sequence[str],
        *,
        nearest: int = 0,
        long_sequences: LongSequences = "error",
        progress: bool = False,
    ) -> list[dict[str, dict[str, Any]]]:
        """One dict a sequence, keyed by head; each prediction in the documented form, with `nearest` the so
        many nearest training examples of each."""
        if isinstance(heads, str):
            heads = [h for h in heads.split(",") if h]
        works = self._works(seqs, heads=tuple(heads), nearest=nearest, long_sequences=long_sequences)
        return [a.predictions or {} for a in self._run(works, "predicting", progress)]

    def score(
        self,
        wild_type: str | Record,
        mutants: Sequence[str],
        *,
        strategy: str = "masked-marginals",
        **options: Any,
    ) -> list[float]:
        """Variant scores, higher is more likely; see `bioseq.variants` for notation and formulas."""
        from bioseq import variants

        return variants.score(self, wild_type, mutants, strategy=strategy, **options)

    def scan(
        self, sequence: str | Record, *, strategy: str = "masked-marginals", **options: Any
    ) -> np.ndarray:
        """Scores of all single substitutions, float32 [L, 20], letters in the order of `alphabet.standard`."""
        from bioseq import variants

        return variants.scan(self, sequence, strategy=strategy, **options)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError("no CUDA device is available.", hint="Use device 'cpu' or 'auto'.")
    return name
