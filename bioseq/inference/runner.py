"""One forward pass of a packed batch: segments in, what was asked of each out.

Legend: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bioseq.backbones import lora
from bioseq.backbones.packed.config import EVIDENCE_WIDTH
from bioseq.backbones.pooling import reduce
from bioseq.backbones.protocol import Backbone
from bioseq.errors import ResourceError
from bioseq.heads.head import Head
from bioseq.heads.relatives import joined
from bioseq.inference import batching
from bioseq.inference.batching import Window
from bioseq.inference.query import Part, Query, Result, Segment, logit_rows
from bioseq.sequences.alphabet import Alphabet


class BatchRunner:
    """Runs batches on `encoder`, or on the trunk of a head that has its own. `heads` is the predictor's own map."""

    def __init__(
        self, encoder: Backbone, alphabet: Alphabet, heads: Mapping[str, Head], device: torch.device
    ):
        self.encoder, self.alphabet, self.heads, self.device = encoder, alphabet, heads, device

    def _layers(self, queries: Sequence[Query], segments: Sequence[Segment]) -> tuple[int, ...]:
        depth = self.encoder.config.n_layers
        wanted: set[int] = set()
        for s in segments:
            query = queries[s.query]
            if s.route is None and query.embed is not None:
                wanted.update(query.embed.layers)
            if s.route is None and query.logits_at is not None:
                wanted.add(-1)
            for name in query.heads:
                if self.heads[name].route(name) == s.route:
                    wanted.update(self.heads[name].embed_options.layers)
        return tuple(sorted({-1 if layer == depth else layer for layer in wanted})) or (-1,)

    def run(self, encoder: Backbone, queries: Sequence[Query], segments: list[Segment]) -> list[Part]:
        """One packed pass; halves the batch and tries again when a GPU runs out of memory."""
        try:
            return self._pass(encoder, queries, segments)
        except torch.OutOfMemoryError:
            if len(segments) == 1:
                raise ResourceError(
                    f"one sequence of {len(queries[segments[0].query].ids)} residues does not fit this device.",
                    hint="Choose long sequences 'window', a smaller model, or a larger device.",
                ) from None
        torch.cuda.empty_cache()
        half = len(segments) // 2
        return self.run(encoder, queries, segments[:half]) + self.run(encoder, queries, segments[half:])

    @torch.inference_mode()
    def _pass(self, encoder: Backbone, queries: Sequence[Query], segments: list[Segment]) -> list[Part]:
        windows = [queries[s.query].cover[s.window] for s in segments]
        ids = [queries[s.query].ids[w.start : w.end] for s, w in zip(segments, windows)]
        batch = batching.pack(
            ids, np.arange(len(ids)), cls_id=self.alphabet.cls_id, eos_id=self.alphabet.eos_id
        )
        tokens_T = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        cu_seqlens = torch.from_numpy(batch.cu_seqlens).to(self.device, non_blocking=True)
        layers = self._layers(queries, segments)
        bounds = batch.cu_seqlens.tolist()
        evidence_TE = self._evidence(encoder, [queries[s.query] for s in segments], windows, bounds)
        with self._routed(encoder, segments, bounds):
            out = encoder(tokens_T, cu_seqlens, batch.max_seqlen, layers=layers, evidence_TE=evidence_TE)
        hidden = dict(zip(layers, out if isinstance(out, tuple) else (out,)))
        rows: list[np.ndarray] = []
        for s, start, window in zip(segments, bounds, windows):
            rows.append(logit_rows(queries[s.query], s.route, window) + start + 1)
        logits: list[Tensor | None] = [None] * len(segments)
        counts = [len(r) for r in rows]
        if sum(counts):
            chosen = torch.from_numpy(np.concatenate(rows)).to(self.device)
            known = None if evidence_TE is None else evidence_TE[chosen]
            flat = encoder.logits(hidden[-1][chosen], known).float()
            logits = [part if n else None for part, n in zip(flat.split(counts), counts)]
        depth = self.encoder.config.n_layers
        result = []
        for s, start, end, part in zip(segments, bounds, bounds[1:], logits):
            slices = {layer: h[start:end] for layer, h in hidden.items()}
            if -1 in slices:
                slices[depth] = slices[-1]
            if len(queries[s.query].cover) > 1:
                kept = {layer: h.float() for layer, h in slices.items()}
                result.append(Part(s, hidden=kept, logits=part))
            else:
                result.append(self.reduced(queries[s.query], s, slices, part))
        return result

    def _evidence(
        self, encoder: Backbone, queries: Sequence[Query], windows: Sequence[Window], bounds: list[int]
    ) -> Tensor | None:
        """What the homologs say of the pack, float32 [T, E]; None where nobody has any."""
        if not encoder.config.reads_homologs or all(q.evidence is None for q in queries):
            return None
        rows = np.zeros((bounds[-1], EVIDENCE_WIDTH), dtype=np.float32)
        for query, window, start in zip(queries, windows, bounds):
            if query.evidence is not None:
                part = query.evidence[window.start : window.end]
                rows[start + 1 : start + 1 + len(part)] = part
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def _routed(self, encoder: Backbone, segments: list[Segment], bounds: list[int]) -> Any:
        if encoder is not self.encoder or all(s.route is None for s in segments):
            return nullcontext()
        return lora.routed(
            lora.taking(encoder),
            [(s.route, start, end) for s, start, end in zip(segments, bounds, bounds[1:])],
        )

    @torch.inference_mode()
    def reduced(
        self, query: Query, segment: Segment, hidden: dict[int, Tensor], logits: Tensor | None
    ) -> Part:
        part = Part(segment, logits=logits)
        if segment.route is None and query.embed is not None:
            part.embedding = reduce(hidden, query.embed).cpu().numpy()
        for name in query.heads:
            if self.heads[name].route(name) == segment.route:
                part.features[name] = reduce(hidden, self.heads[name].embed_options).cpu().numpy()
        return part

    def predictions(
        self, queries: Sequence[Query], results: list[Result], features: dict[str, dict[int, np.ndarray]]
    ) -> None:
        """Put what each head says into `results`; `features` are by head and query."""
        for name, rows in features.items():
            order = sorted(rows)
            head = self.heads[name]
            values: Any = [rows[i] for i in order]
            told = [queries[i].told[name] for i in order if name in queries[i].told]
            predictions = head.predict(
                values if head.per_residue else np.stack(values),
                [queries[i].sequence for i in order],
                lengths=[len(queries[i].ids) for i in order],
                nearest=[queries[i].nearest for i in order],
                members=[queries[i].members for i in order],
                told=joined(told) if len(told) == len(order) else None,
            )
            for i, prediction in zip(order, predictions, strict=True):
                results[i].predictions = (results[i].predictions or {}) | {name: prediction}
        for query, result in zip(queries, results):
            if len(query.heads) > 1 and result.predictions:
                result.predictions = {name: result.predictions[name] for name in query.heads}
