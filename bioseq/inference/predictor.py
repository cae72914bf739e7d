"""The only inference path: HTTP, the command line, screening and the Python API all end here.

`prepare` turns a sequence into a `Query` without touching torch; `run` plans queries by token budget, packs
them, makes one forward pass a batch, and scatters the results to input order. A result does not depend on a
sequence's batch-mates: relative error <= 1e-5 in float32, <= 2e-2 in bfloat16.

Legend: T tokens of a pack, L residues of a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bioseq.backbones import lora
from bioseq.backbones.contacts import ContactHead
from bioseq.backbones.packed.int8 import to_int8
from bioseq.backbones.packed.memory import keep_heap
from bioseq.backbones.pooling import EmbedOptions
from bioseq.backbones.protocol import Backbone
from bioseq.bundles.registry import Registry
from bioseq.errors import BioseqError, SequenceError, SequenceTooLongError, SpecError
from bioseq.heads.head import Head, check_base
from bioseq.inference import batching
from bioseq.inference.batching import SPECIAL_TOKENS, Window
from bioseq.inference.evidence import Mixture, residue_probabilities
from bioseq.inference.homologs import HomologsOption, find_homologs, let_read
from bioseq.inference.interpretation import attribute, contacts
from bioseq.inference.lanes import device_of, in_order
from bioseq.inference.query import Part, Query, Result, Segment, merge
from bioseq.inference.reading import HomologReader
from bioseq.inference.runner import BatchRunner
from bioseq.inference.scoring import scan_sites, score_variants
from bioseq.progress import Progress
from bioseq.sequences.alphabet import Alphabet, protein
from bioseq.sequences.fasta import Record
from bioseq.sequences.mutations import Variant

LongSequences = Literal["error", "window", "truncate"]
WINDOW_OVERLAP = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # int8: of the rest
BUDGETS = {"cpu": 1024, "cuda": 65536}  # tokens a batch; on a CPU what fits its caches


class Predictor:
    """A backbone, its heads, and the way from sequences to numbers.

    On a CPU, `threads` batches are computed at a time (default: all cores), each on one thread, so that the
    bytes of a result do not depend on it. `budget` is the number of tokens a batch. Not thread-safe: one
    engine, one predictor.
    """

    def __init__(
        self,
        encoder: Backbone,
        *,
        name: str = "unnamed",
        version: int | None = None,
        content_hash: str = "",
        weights_hash: str = "",
        alphabet: Alphabet | None = None,
        dtype: str = "float32",
        device: str = "auto",
        threads: int | None = None,
        budget: int | None = None,
        registry: Registry | None = None,
        mixture: Mixture | None = None,
        reader: HomologReader | None = None,
    ):
        if dtype not in DTYPES:
            raise SpecError(f"{dtype!r} is not one of {', '.join(DTYPES)}.", field="dtype")
        if threads is not None and threads < 1:
            raise SpecError(f"{threads} is below 1.", field="threads")
        self.threads = threads or len(os.sched_getaffinity(0))
        self.device = torch.device(device_of(device))
        if self.device.type == "cpu":
            keep_heap()
        self.name, self.version = name, version
        self.content_hash, self.weights_hash = content_hash, weights_hash
        self.alphabet = alphabet or protein()
        self.config = encoder.config
        self.dtype = dtype
        self.encoder = self._ready(encoder).requires_grad_(False)
        self.registry = registry
        self.mixture = mixture or Mixture()
        self.reader = reader if encoder.config.reads_homologs else None
        self.contact_head: ContactHead | None = None  # given by `bioseq.load`, where a checkpoint has one
        self.heads: dict[str, Head] = {}
        self._runner = BatchRunner(self.encoder, self.alphabet, self.heads, self.device)
        self.max_residues = self.config.max_residues
        self.budget = max(budget or BUDGETS.get(self.device.type, 2048), self.max_residues + SPECIAL_TOKENS)

    @property
    def has_lm_head(self) -> bool:
        return self.encoder.lm_head is not None

    def _ready(self, encoder: Backbone) -> Backbone:
        """The encoder, in place, on the device and in the arithmetic."""
        if self.dtype == "int8":
            return to_int8(encoder, self.device).eval()
        return encoder.to(self.device, DTYPES[self.dtype]).eval()

    # ------------------------------------------------------------------ heads

    def load_head(self, name: str, head: Head | None = None) -> Head:
        """Make a head answer under `name`: a registry name, `NAME@V`, or a bundle directory.

        Raises `NotFoundError`, or `BundleError` for a head of another backbone.
        """
        if head is None:
            head = Head.load((self.registry or Registry()).resolve(name, kind="head"))
        check_base(head, self, self.name)
        if head.adapter is not None:
            if name in self.heads:
                lora.detach(lora.taking(self.encoder), name)
            lora.attach(lora.taking(self.encoder), name, head.adapter)
        if head.trunk is not None:
            self._ready(head.trunk)
        self.heads[name] = head
        return head

    def unload_head(self, name: str) -> None:
        head = self.heads.pop(name)
        if head.adapter is not None:
            lora.detach(lora.taking(self.encoder), name)

    # ---------------------------------------------------------------- prepare

    def prepare(
        self,
        sequence: str | Record,
        *,
        embed: EmbedOptions | None = None,
        logits: str | np.ndarray | None = None,
        heads: Sequence[str] = (),
        nearest: int = 0,
        members: bool = False,
        long_sequences: LongSequences = "error",
        index: int | None = None,
        gaps: bool = False,
    ) -> Query:
        """Check and encode one sequence. Cheap, no torch. Raises subclasses of `SequenceError` that name the
        record and position, and `NotFoundError` for an unknown head."""
        if nearest < 0:
            raise SpecError(f"{nearest} is below 0.", field="nearest")
        text = sequence if isinstance(sequence, str) else sequence.sequence
        record = None if isinstance(sequence, str) else sequence.id
        source = None if isinstance(sequence, str) else sequence.source
        try:
            self.alphabet.check_kind(text)
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
            for window in cover:
                self.encoder.check(ids[window.start : window.end])
        except SequenceError as error:
            raise error.at(index=index, record=record, source=source) from None
        if embed is not None:
            embed.check(self.config)
        routes: list[str | None] = [None] if embed is not None or logits is not None else []
        for name in heads:
            if name not in self.heads:
                self.load_head(name)
            route = self.heads[name].route(name)
            if route not in routes:
                routes.append(route)
        return Query(
            ids=ids,
            sequence=text,
            embed=embed,
            logits_at=logits,
            heads=tuple(heads),
            nearest=nearest,
            members=members,
            notes=tuple(notes),
            cover=cover,
            overlap=overlap,
            routes=tuple(routes) or (None,),
        )

    # -------------------------------------------------------------------- run

    def run(self, queries: Sequence[Query], *, progress: Progress | None = None) -> list[Result]:
        """Results in the order of `queries`. One forward pass a batch of `budget` tokens. For a backbone that reads
        homologs those of all queries are searched first, together."""
        settled = {i: q.known for i, q in enumerate(queries) if q.known is not None and self._settles(q)}
        if self.reader is not None:
            asking = [q for i, q in enumerate(queries) if i not in settled or len(q.routes) > 1]
            self.reader.read(asking, self.alphabet, progress=progress is not None and progress.enabled)
        results = [Result(notes=q.notes, homologs=q.homologs) for q in queries]
        features: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        for i, vector in settled.items():
            results[i].embedding = vector
            for name in queries[i].heads:
                if self.heads[name].route(name) is None:
                    features[name][i] = vector
            if progress is not None and queries[i].routes[-1] is None:
                progress.add(1)
        waiting: dict[tuple[int, str | None], dict[int, Part]] = defaultdict(dict)
        for part in in_order(
            self._batches(queries, settled), self.threads if self.device.type == "cpu" else None
        ):
            segment, query = part.segment, queries[part.segment.query]
            key = (segment.query, segment.route)
            if len(query.cover) > 1:
                waiting[key][segment.window] = part
                if len(waiting[key]) < len(query.cover):
                    continue
                parts = waiting.pop(key)
                hidden, logits = merge([parts[w] for w in range(len(query.cover))], query)
                part = self._runner.reduced(query, segment, hidden, logits)
            result = results[segment.query]
            if part.embedding is not None:
                result.embedding = part.embedding
            if part.logits is not None:
                result.logits = part.logits.cpu().numpy()
            for name, values in part.features.items():
                features[name][segment.query] = values
            if progress is not None and segment.route == query.routes[-1]:
                progress.add(1)
        self._runner.predictions(queries, results, features)
        return results

    def _settles(self, query: Query) -> bool:
        """Whether all that a query asks of the bare trunk is the embedding that is known."""
        asked = [self.heads[n].embed_options for n in query.heads if self.heads[n].route(n) is None]
        return query.logits_at is None and all(options == query.embed for options in asked)

    def _batches(
        self, queries: Sequence[Query], settled: Container[int] = ()
    ) -> Iterator[Callable[[], list[Part]]]:
        """One forward pass each; the bare trunk's of `settled` queries are left out. What goes together depends on the
        queries and the budget alone."""
        by_trunk: dict[str | None, list[Segment]] = defaultdict(list)
        for i, query in enumerate(queries):
            for route in query.routes:
                if route is None and i in settled:
                    continue
                trunk = route if route is not None and self.heads[route].trunk is not None else None
                by_trunk[trunk].extend(Segment(i, route, w) for w in range(len(query.cover)))
        for trunk, segments in by_trunk.items():
            encoder = self.encoder if trunk is None else self.heads[trunk].trunk
            assert encoder is not None
            spans = [queries[s.query].cover[s.window] for s in segments]
            lengths = [w.end - w.start + SPECIAL_TOKENS for w in spans]
            for group in batching.plan(lengths, self.budget):
                yield partial(self._runner.run, encoder, queries, [segments[g] for g in group])

    # ------------------------------------------------------------- public API

    def _queries(self, seqs: Iterable[str | Record], **options: Any) -> list[Query]:
        if isinstance(seqs, str):
            raise SpecError("give a list of sequences, not one string.", field="seqs")
        return [self.prepare(s, index=i, **options) for i, s in enumerate(seqs)]

    def _run(self, queries: list[Query], label: str, progress: bool) -> list[Result]:
        with Progress(len(queries), label, unit="sequences", enabled=progress) as bar:
            return self.run(queries, progress=bar)

    def embed(
        self,
        seqs: Iterable[str | Record],
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (-1,),
        per_residue: bool = False,
        long_sequences: LongSequences = "error",
        homologs: HomologsOption = "auto",
        alignment: str | Path | None = None,
        progress: bool = False,
    ) -> Any:
        """Embeddings in input order, float32, not normalised.

        [N, D]; [N, layers, D] for several layers; with `per_residue` a list of [L_i, D] (or
        [layers, L_i, D]). `pooling` is mean, max or cls. For a backbone that reads homologs `homologs` is auto (its own
        set), none, or another set, and `alignment` a file of the one sequence's.
        """
        options = EmbedOptions(pooling, tuple(layers), per_residue)  # type: ignore[arg-type]
        queries = self._queries(seqs, embed=options, long_sequences=long_sequences)
        let_read(self, self.heads, queries, homologs, alignment)
        rows = [r.embedding for r in self._run(queries, "embedding", progress)]
        if per_residue:
            return rows
        shape = (
            (self.config.d_model,) if len(options.layers) == 1 else (len(options.layers), self.config.d_model)
        )
        return np.stack(rows) if rows else np.empty((0, *shape), dtype=np.float32)  # type: ignore[arg-type]

    def logits(
        self,
        seqs: Iterable[str | Record],
        *,
        long_sequences: LongSequences = "error",
        homologs: HomologsOption = "auto",
        alignment: str | Path | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """LM logits of every residue, a list of float32 [L_i, V]; "<mask>" in a sequence is a mask token.

        With `homologs` (default, or a reference set) they are log-probabilities of model and homologs together;
        masked residues are hidden from the search too. `alignment` is a file of one sequence's homologs instead.
        A backbone that reads homologs reads those instead of its own set, or with "none" no homologs.
        """
        if not self.has_lm_head:
            raise BioseqError(f"{self.name} has no language-model head: it can embed only.")
        seqs = seqs if isinstance(seqs, str) else list(seqs)
        queries = self._queries(seqs, logits="all", long_sequences=long_sequences)
        found = None
        if self.config.reads_homologs:
            let_read(self, self.heads, queries, homologs, alignment)
        else:
            # what the model reads: a truncated sequence has the homologs of what was kept
            kept = [self.alphabet.decode(q.ids) for q in queries]
            found = find_homologs(self, kept, homologs, alignment, auto="none")
        logits: list[np.ndarray] = [r.logits for r in self._run(queries, "logits", progress)]  # type: ignore[misc]
        if found is None:
            return logits
        return [
            residue_probabilities(raw, one, self.mixture, self.alphabet)
            for raw, one in zip(logits, found, strict=True)
        ]

    def predict(
        self,
        seqs: Iterable[str | Record],
        heads: Sequence[str],
        *,
        nearest: int = 0,
        members: bool = False,
        long_sequences: LongSequences = "error",
        homologs: HomologsOption = "auto",
        alignment: str | Path | None = None,
        progress: bool = False,
    ) -> list[dict[str, dict[str, Any]]]:
        """One dict a sequence, keyed by head; each prediction in the documented form, with `nearest` the so
        many nearest training examples of each, with `members` what each member of the head's ensemble says.
        `homologs` and `alignment` as in `embed`; heads that read profiles read the alignment too."""
        if isinstance(heads, str):
            heads = [h for h in heads.split(",") if h]
        queries = self._queries(
            seqs,
            heads=tuple(heads),
            nearest=nearest,
            members=members,
            long_sequences=long_sequences,
        )
        let_read(self, self.heads, queries, homologs, alignment)
        return [r.predictions or {} for r in self._run(queries, "predicting", progress)]

    def score(
        self,
        wild_type: str | Record,
        mutants: Sequence[str | Variant],
        *,
        strategy: str = "masked-marginals",
        **options: Any,
    ) -> list[float]:
        """Variant scores, higher is more likely; see `bioseq.inference.variants` for the formulas and
        `score_variants` for the options."""
        return score_variants(self, wild_type, mutants, strategy=strategy, **options).values.tolist()

    def scan(
        self, sequence: str | Record, *, strategy: str = "masked-marginals", **options: Any
    ) -> np.ndarray:
        """Scores of all single substitutions, float32 [L, 20], letters in the order of `alphabet.standard`."""
        return scan_sites(self, sequence, strategy=strategy, **options).values

    contacts = contacts
    attribute = attribute
