"""The only inference path: HTTP, the command line, screening and the Python API all end here.

`prepare` turns a sequence into a `Work` without touching torch; `run` plans works by token budget, packs
them, makes one forward pass a batch, and scatters the answers to input order. A result does not depend on a
sequence's batch-mates: relative error <= 1e-5 in float32, <= 2e-2 in bfloat16.

Legend: T tokens of a pack, L residues of a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bioseq import batching
from bioseq.alphabet import Alphabet, protein
from bioseq.batching import SPECIAL_TOKENS, Window
from bioseq.errors import BioseqError, ResourceError, SequenceError, SequenceTooLongError, SpecError
from bioseq.model.encoder import PackedEncoder
from bioseq.pooling import EmbedAsk, reduce
from bioseq.progress import Progress

if TYPE_CHECKING:
    from bioseq.fasta import Record
    from bioseq.heads import Head
    from bioseq.registry import Registry

LongSequences = Literal["error", "window", "truncate"]
WINDOW_OVERLAP = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUDGETS = {"cpu": 2048, "cuda": 65536}  # tokens a batch; on a CPU what fits its caches


@dataclass(slots=True)
class Work:
    """One sequence's ask, prepared. `ids` uint8 [L] residues (mask tokens allowed), no special tokens.

    `logits_at`: None, "all", or int64 places of residues. `cover` are the windows that will be computed,
    `overlap` their overlap. `routes` are the passes it takes: the bare trunk (None) and one for each head
    with weights of its own.
    """

    ids: np.ndarray
    sequence: str
    embed: EmbedAsk | None = None
    logits_at: str | np.ndarray | None = None
    heads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cover: list[Window] = field(default_factory=list)
    overlap: int = 0
    routes: tuple[str | None, ...] = (None,)

    @property
    def tokens(self) -> int:
        """Packed tokens that this work costs, over windows and routes."""
        return len(self.routes) * sum(w.end - w.start + SPECIAL_TOKENS for w in self.cover)


@dataclass(slots=True)
class Answer:
    """What came of a `Work`: float32 `embedding`, float32 `logits` [P, V], `predictions` by head, and what was
    done to the sequence on the way (`notes`)."""

    embedding: np.ndarray | None = None
    logits: np.ndarray | None = None
    predictions: dict[str, dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Segment:
    work: int
    route: str | None
    window: int


class Predictor:
    """A backbone, its heads, and the way from sequences to numbers.

    `threads` fixes torch's thread count (process-wide), which fixes the order of reductions and so the bytes
    of results. `budget` is the number of tokens a batch. Not thread-safe: one engine, one predictor.
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
        if threads is not None:
            if threads < 1:
                raise SpecError(f"{threads} is below 1.", field="threads")
            torch.set_num_threads(threads)
        self.device = torch.device(_device(device))
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
            bundle = (self.registry or Registry()).resolve(name)
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
        long_sequences: LongSequences = "error",
        index: int | None = None,
        gaps: bool = False,
    ) -> Work:
        """Check and encode one sequence. Cheap, no torch. Raises subclasses of `SequenceError` that name the
        record and position, and `NotFoundError` for an unknown head."""
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
            route = name if self.heads[name].adapter or self.heads[name].trunk is not None else None
            if route not in routes:
                routes.append(route)
        return Work(
            ids=ids,
            sequence=text,
            embed=embed,
            logits_at=logits,
            heads=tuple(heads),
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
        by_trunk: dict[str | None, list[_Segment]] = defaultdict(list)
        for i, work in enumerate(works):
            for route in work.routes:
                trunk = route if route is not None and self.heads[route].trunk is not None else None
                by_trunk[trunk].extend(_Segment(i, route, w) for w in range(len(work.cover)))
        waiting: dict[tuple[int, str | None], dict[int, tuple[dict[int, Tensor], Tensor | None]]] = {}
        for trunk, segments in by_trunk.items():
            encoder = self.encoder if trunk is None else self.heads[trunk].trunk
            assert encoder is not None
            spans = [works[s.work].cover[s.window] for s in segments]
            lengths = [w.end - w.start + SPECIAL_TOKENS for w in spans]
            for group in batching.plan(lengths, self.budget):
                chosen = [segments[g] for g in group]
                for segment, hidden, logits in self._forward(encoder, works, chosen):
                    work, key = works[segment.work], (segment.work, segment.route)
                    if len(work.cover) > 1:
                        parts = waiting.setdefault(key, {})
                        parts[segment.window] = ({k: v.float() for k, v in hidden.items()}, logits)
                        if len(parts) < len(work.cover):
                            continue
                        hidden, logits = _merge([parts[w] for w in range(len(work.cover))], work)
                        del waiting[key]
                    self._keep(answers[segment.work], work, segment, hidden, logits, features)
                    if progress is not None and segment.route == work.routes[-1]:
                        progress.add(1)
        for name, rows in features.items():
            order = sorted(rows)
            head = self.heads[name]
            values: Any = [rows[i] for i in order]
            predictions = head.predict(
                values if head.per_residue else np.stack(values), [works[i].sequence for i in order]
            )
            for i, prediction in zip(order, predictions, strict=True):
                answers[i].predictions = (answers[i].predictions or {}) | {name: prediction}
        for work, answer in zip(works, answers):
            if len(work.heads) > 1 and answer.predictions:
                answer.predictions = {name: answer.predictions[name] for name in work.heads}
        return answers

    def _layers(self, works: Sequence[Work], segments: Sequence[_Segment]) -> tuple[int, ...]:
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

    def _forward(
        self, encoder: PackedEncoder, works: Sequence[Work], segments: list[_Segment]
    ) -> list[tuple[_Segment, dict[int, Tensor], Tensor | None]]:
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
    def _pass(
        self, encoder: PackedEncoder, works: Sequence[Work], segments: list[_Segment]
    ) -> list[tuple[_Segment, dict[int, Tensor], Tensor | None]]:
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
            rows.append(_logit_rows(works[s.work], s.route, window) + start + 1)
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
            result.append((s, slices, part))
        return result

    def _routed(self, encoder: PackedEncoder, segments: list[_Segment], bounds: list[int]) -> Any:
        if encoder is not self.encoder or all(s.route is None for s in segments):
            return nullcontext()
        from bioseq import adapters

        return adapters.routed(
            encoder, [(s.route, start, end) for s, start, end in zip(segments, bounds, bounds[1:])]
        )

    @torch.inference_mode()
    def _keep(
        self,
        answer: Answer,
        work: Work,
        segment: _Segment,
        hidden: dict[int, Tensor],
        logits: Tensor | None,
        features: dict[str, dict[int, np.ndarray]],
    ) -> None:
        if segment.route is None and work.embed is not None:
            answer.embedding = reduce(hidden, work.embed).cpu().numpy()
        if logits is not None:
            answer.logits = logits.cpu().numpy()
        for name in work.heads:
            if self._route(name) == segment.route:
                features[name][segment.work] = reduce(hidden, self.heads[name].embed_ask).cpu().numpy()

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
        long_sequences: LongSequences = "error",
        progress: bool = False,
    ) -> list[dict[str, dict[str, Any]]]:
        """One dict a sequence, keyed by head; each prediction in the documented form."""
        if isinstance(heads, str):
            heads = [h for h in heads.split(",") if h]
        works = self._works(seqs, heads=tuple(heads), long_sequences=long_sequences)
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

    def masked(self, work: Work, places: np.ndarray) -> Work:
        """A copy of `work` with these residues replaced by <mask>."""
        ids = work.ids.copy()
        ids[places] = self.alphabet.mask_id
        return replace(work, ids=ids)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError("no CUDA device is available.", hint="Use device 'cpu' or 'auto'.")
    return name


def _logit_rows(work: Work, route: str | None, window: Window) -> np.ndarray:
    """Residues of this window whose logits are computed; all of them where windows are merged later."""
    if route is not None or work.logits_at is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(work.logits_at, str) or len(work.cover) > 1:
        return np.arange(window.end - window.start, dtype=np.int64)
    return np.asarray(work.logits_at, dtype=np.int64)


def _merge(
    parts: list[tuple[dict[int, Tensor], Tensor | None]], work: Work
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Average windows with a linear taper; <cls> is the first window's, <eos> the last one's."""
    weights = [torch.from_numpy(w) for w in batching.taper(work.cover, work.overlap)]
    hidden: dict[int, Tensor] = {}
    for layer, first in parts[0][0].items():
        merged = first.new_zeros((len(work.ids) + SPECIAL_TOKENS, first.shape[1]))
        merged[0], merged[-1] = first[0], parts[-1][0][layer][-1]
        for (layers, _), window, weight in zip(parts, work.cover, weights):
            merged[window.start + 1 : window.end + 1] += (
                layers[layer][1:-1] * weight.to(first.device)[:, None]
            )
        hidden[layer] = merged
    if parts[0][1] is None:
        return hidden, None
    logits = parts[0][1].new_zeros((len(work.ids), parts[0][1].shape[1]))
    for (_, part), window, weight in zip(parts, work.cover, weights):
        assert part is not None
        logits[window.start : window.end] += part * weight.to(part.device)[:, None]
    if not isinstance(work.logits_at, str):
        logits = logits[torch.as_tensor(np.asarray(work.logits_at, dtype=np.int64), device=logits.device)]
    return hidden, logits
