"""One forward pass of a packed batch: segments in, what was asked of each out.

Legend: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.pooling import reduce
from bioseq.errors import ResourceError
from bioseq.inference import batching
from bioseq.inference.query import Part, Segment, Work, logit_rows
from bioseq.sequences.alphabet import Alphabet

if TYPE_CHECKING:
    from bioseq.heads.head import Head


class Passes:
    """Passes over `encoder`, or over the trunk of a head of its own. `heads` is the predictor's own map."""

    def __init__(
        self, encoder: PackedEncoder, alphabet: Alphabet, heads: Mapping[str, Head], device: torch.device
    ):
        self.encoder, self.alphabet, self.heads, self.device = encoder, alphabet, heads, device

    def _layers(self, works: Sequence[Work], segments: Sequence[Segment]) -> tuple[int, ...]:
        depth = self.encoder.config.n_layers
        wanted: set[int] = set()
        for s in segments:
            work = works[s.work]
            if s.route is None and work.embed is not None:
                wanted.update(work.embed.layers)
            if s.route is None and work.logits_at is not None:
                wanted.add(-1)
            for name in work.heads:
                if self.heads[name].route(name) == s.route:
                    wanted.update(self.heads[name].embed_ask.layers)
        return tuple(sorted({-1 if layer == depth else layer for layer in wanted})) or (-1,)

    def run(self, encoder: PackedEncoder, works: Sequence[Work], segments: list[Segment]) -> list[Part]:
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
        return self.run(encoder, works, segments[:half]) + self.run(encoder, works, segments[half:])

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
        depth = self.encoder.config.n_layers
        result = []
        for s, start, end, part in zip(segments, bounds, bounds[1:], logits):
            slices = {layer: h[start:end] for layer, h in hidden.items()}
            if -1 in slices:
                slices[depth] = slices[-1]
            if len(works[s.work].cover) > 1:
                kept = {layer: h.float() for layer, h in slices.items()}
                result.append(Part(s, hidden=kept, logits=part))
            else:
                result.append(self.reduced(works[s.work], s, slices, part))
        return result

    def _routed(self, encoder: PackedEncoder, segments: list[Segment], bounds: list[int]) -> Any:
        if encoder is not self.encoder or all(s.route is None for s in segments):
            return nullcontext()
        from bioseq.backbones import lora as adapters

        return adapters.routed(
            encoder, [(s.route, start, end) for s, start, end in zip(segments, bounds, bounds[1:])]
        )

    @torch.inference_mode()
    def reduced(self, work: Work, segment: Segment, hidden: dict[int, Tensor], logits: Tensor | None) -> Part:
        part = Part(segment, logits=logits)
        if segment.route is None and work.embed is not None:
            part.embedding = reduce(hidden, work.embed).cpu().numpy()
        for name in work.heads:
            if self.heads[name].route(name) == segment.route:
                part.features[name] = reduce(hidden, self.heads[name].embed_ask).cpu().numpy()
        return part
