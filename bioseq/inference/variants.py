"""Scores of variants and scans of all single substitutions: what is computed, and what it says.

Concept: a masked language model gives every residue a probability in its context. A substitution that the model
finds as likely as the wild-type residue scores 0, an unlikely one below 0. Scores are differences of natural
logarithms; they rank variants and have no unit of fitness.

Notation: `A24G`, `A24G:L50P`, `WT`; see `bioseq.sequences.mutations`. `WT` scores 0, and so does `A24A`: a residue that does
not change is not a mutated position.

Strategies. x is the wild type, x' the variant, T the set of mutated positions, x\\T the wild type with all of T
masked; log p is a log-softmax over the whole vocabulary (as in fair-esm), in float64 from the model's logits.

    masked-marginals        sum over t in T of  log p(x'_t | x\\T) - log p(x_t | x\\T)
    wt-marginals            sum over t in T of  log p(x'_t | x)    - log p(x_t | x)
    pseudo-log-likelihood   PLL(x') - PLL(x),   PLL(y) = sum over all i of log p(y_i | y\\{i})

The first two are Meier et al. 2021 (doi 10.1101/2021.07.09.450648), section 3. Masked marginals are theirs as
printed: the positions of one variant are masked together. (The script that came with fair-esm masks one position
at a time and adds; both agree on single mutants.) The third is Salazar et al. 2020 (doi
10.18653/v1/2020.acl-main.240), used as a difference by Meier et al.

Cost in passes of the model over the sequence: masked marginals one for each distinct set of positions (a scan of
L residues: L, not 19 L); wild-type marginals one in all; pseudo-log-likelihood L for the wild type and up to L - 1
more for every variant. Equal masked contexts are computed once.

Long sequences (over the model's limit): `error` refuses them. `window` gives each masked context the window of
that many residues around its masked positions, and wild-type marginals the overlapping windows that embedding
uses; what was done is told in `Scored.notes`.

A plan holds the queries of one request; `bioseq.inference.scoring` runs it. A server puts the queries of many
plans into its own batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np

from bioseq.errors import BioseqError, IllegalResidueError, MutationError, SpecError
from bioseq.homologs.reading import evidence
from bioseq.inference.batching import Window
from bioseq.inference.evidence import Evidence, Found, Homologs, Mixture, log_softmax
from bioseq.inference.query import Query, Result
from bioseq.progress import Progress
from bioseq.sequences.alphabet import Alphabet
from bioseq.sequences.fasta import Record
from bioseq.sequences.mutations import Variant, letters_of, parse, singles

Strategy = Literal["masked-marginals", "wt-marginals", "pseudo-log-likelihood"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


class Model(Protocol):
    """What plans are made and run with. `bioseq.inference.predictor.Predictor` is one."""

    name: str
    alphabet: Alphabet
    max_residues: int
    mixture: Mixture

    @property
    def has_lm_head(self) -> bool: ...
    def prepare(self, sequence: str | Record, *, logits: Any, long_sequences: Any) -> Query: ...
    def run(self, queries: Sequence[Query], *, progress: Progress | None = None) -> list[Result]: ...


def reads_homologs(model: Model) -> bool:
    """Whether the model's own probabilities take homologs in."""
    return bool(getattr(getattr(model, "config", None), "reads_homologs", False))


def give(query: Query, found: Found) -> None:
    """Let a backbone that reads homologs read these, in place of a search. Raises `SpecError` for a profile of
    another length."""
    if len(found.profile) != len(query.ids):
        raise SpecError(
            f"the profile has {len(found.profile)} columns, and the sequence {len(query.ids)} residues.",
            field="homologs",
            hint="Give the profile of this sequence.",
        )
    query.evidence, query.homologs = evidence(found.profile), found.profile.n_homologs


@dataclass(frozen=True, slots=True)
class Scored:
    """`values` float64 [variants], or float32 [L, 20] of a scan; `notes` say what was done to the sequence and
    which evidence there was; `homologs` is None where none were asked for."""

    values: np.ndarray
    notes: tuple[str, ...] = ()
    homologs: Homologs | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Queries for `Predictor.run`, and `finish`, which turns their results (in that order) into a `Scored`."""

    queries: list[Query]
    finish: Callable[[Sequence[Result]], Scored]


@dataclass(frozen=True, slots=True)
class WildType:
    """A wild type that was checked for a strategy. `query` asks for the logits of all its residues; `evidence` is
    mixed into every probability."""

    model: Model
    strategy: str
    query: Query
    letters: str
    notes: tuple[str, ...]
    evidence: Evidence | None = None

    @classmethod
    def prepare(
        cls, model: Model, sequence: str | Record, strategy: str, long_sequences: str = "error"
    ) -> WildType:
        """Raises `SpecError`, and what `Predictor.prepare` raises."""
        if strategy not in STRATEGIES:
            raise SpecError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}.", field="strategy")
        if long_sequences not in ("error", "window"):
            raise SpecError(f"{long_sequences!r} is not one of error, window.", field="long_sequences")
        if not model.has_lm_head:
            raise BioseqError(f"{model.name} has no language-model head: it cannot score variants.")
        text = sequence if isinstance(sequence, str) else sequence.sequence
        if "<mask>" in text:
            raise IllegalResidueError("a wild type may hold no <mask>.", hint="Give the residue itself.")
        query = model.prepare(sequence, logits="all", long_sequences=long_sequences)
        notes = list(query.notes)
        if len(query.cover) > 1 and strategy != "wt-marginals":
            notes = [n for n in notes if " windows of " not in n]
            notes.append(
                f"{len(query.ids)} residues, over the limit: each masked context is the {model.max_residues} "
                "residues around its masked positions"
            )
        letters = letters_of(text)
        odd = sorted({a for a in letters if a not in model.alphabet.standard})
        if odd:
            notes.append(f"the wild type has {', '.join(odd)}: scores there are relative to that token")
        return cls(model, strategy, query, letters, tuple(notes))

    def with_homologs(self, found: Found | None) -> WildType:
        """With the homologs of this wild type as evidence. Raises `SpecError` for those of another sequence."""
        if found is None:
            return self
        if reads_homologs(self.model):
            give(self.query, found)
            return self
        beside = Evidence.of(found, self.model.mixture, len(self.query.ids))
        return replace(self, notes=(*self.notes, beside.note), evidence=beside)

    def read(self, mutants: Sequence[str | Variant]) -> list[Variant]:
        """All variants, each checked against this wild type. Raises `MutationError`."""
        if isinstance(mutants, str):
            raise SpecError("give a list of variants, not one string.", field="mutants")
        alphabet = self.model.alphabet
        return [parse(m, self.letters, alphabet=alphabet, index=i) for i, m in enumerate(mutants)]

    def singles(self) -> list[Variant]:
        return singles(self.letters, self.model.alphabet)

    def scored(self, values: np.ndarray) -> Scored:
        if self.evidence is None:
            return Scored(values, Result(notes=self.notes, homologs=self.query.homologs).told)
        return Scored(values, self.notes, self.evidence.summary())

    def fold(self, values: np.ndarray) -> np.ndarray:
        """Scores in the order of `singles` as float32 [L, 20], wild type 0."""
        standard = self.model.alphabet.standard
        table = np.zeros((len(self.letters), len(standard)), dtype=np.float32)
        table[np.array([[new != old for new in standard] for old in self.letters])] = values
        return table


@dataclass(slots=True)
class _Contexts:
    """Distinct contexts of one wild type. Each gives the logits of some residues, one row a residue, row after
    row; `places` are the residues, by context, and `first` each context's first row."""

    wild: WildType
    queries: list[Query] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, ids: np.ndarray, masked: Sequence[int]) -> int:
        """The first row of the context of `ids` with the residues `masked` (zero-based, ascending) masked; its
        rows are in the order of `masked`."""
        window = window_around(masked[0], masked[-1], len(ids), self.wild.model.max_residues)
        cut = ids[window.start : window.end].copy()
        places = np.asarray(masked, dtype=np.int64) - window.start
        cut[places] = self.wild.model.alphabet.mask_id
        # Equal residues give equal logits wherever they were cut, but homologs belong to a place.
        anywhere = self.wild.evidence is None and not reads_homologs(self.wild.model)
        start = b"" if anywhere else window.start.to_bytes(8, "little")
        key = places.tobytes() + b"|" + cut.tobytes() + start
        if key not in self.known:
            whole = self.wild.query
            query = replace(whole, ids=cut, logits_at=places, cover=[Window(0, len(cut))], overlap=0)
            # One search of the whole wild type stands for all its contexts.
            query.evidence, query.part_of, query.start = None, whole, window.start
            if whole.evidence is not None:
                query.evidence = whole.evidence[window.start : window.end]
            self.known[key] = self._append(query, places + window.start)
        return self.known[key]

    def add_whole(self) -> None:
        """The wild type as it is, all residues: row i is residue i."""
        self._append(self.wild.query, np.arange(len(self.wild.query.ids)))

    def _append(self, query: Query, places: np.ndarray) -> int:
        row = self.first[-1] + len(self.places[-1]) if self.first else 0
        self.queries.append(query)
        self.places.append(places)
        self.first.append(row)
        return row

    def log_p(self, results: Sequence[Result]) -> np.ndarray:
        """Log-probabilities float64 [rows, V], mixed with the evidence."""
        logs = log_softmax(np.concatenate([r.logits for r in results]))
        if self.wild.evidence is None:
            return logs
        places = np.concatenate(self.places)
        return self.wild.evidence.mix(logs, places, self.wild.model.alphabet, self.wild.query.ids)


def window_around(first: int, last: int, length: int, limit: int) -> Window:
    """The `limit` residues around the zero-based places first..last, shifted inwards at the ends.

    Raises `MutationError` if they lie further apart than that.
    """
    if length <= limit:
        return Window(0, length)
    if last - first + 1 > limit:
        raise MutationError(
            f"positions {first + 1} and {last + 1} do not fit one window of {limit} residues.",
            hint="Score them apart, or choose the strategy wt-marginals.",
        )
    start = min(max((first + last + 1) // 2 - limit // 2, 0), length - limit)
    return Window(start, start + limit)


def plan_scores(wild: WildType, variants: Sequence[Variant]) -> Plan:
    """What must be computed to score these variants of `wild`, as `WildType.read` gives them. Cheap, no torch."""
    alphabet, ids = wild.model.alphabet, wild.query.ids
    contexts = _Contexts(wild)
    # One term each: which variant, which row of the log-probabilities, which token, plus or minus.
    terms: list[tuple[int, int, int, float]] = []
    if wild.strategy == "wt-marginals" and any(v.changes for v in variants):
        contexts.add_whole()
    for number, variant in enumerate(variants):
        places = [m.position - 1 for m in variant.changes]
        tokens = [alphabet.id(m.mutant) for m in variant.changes]
        if not places:
            continue
        if wild.strategy == "pseudo-log-likelihood":
            terms += _pll_terms(contexts, number, places, tokens)
            continue
        first = 0 if wild.strategy == "wt-marginals" else contexts.add(ids, places)
        for at, (place, token) in enumerate(zip(places, tokens)):
            row = place if wild.strategy == "wt-marginals" else first + at
            terms.append((number, row, token, 1.0))
            terms.append((number, row, int(ids[place]), -1.0))

    def finish(results: Sequence[Result]) -> Scored:
        values = np.zeros(len(variants), dtype=np.float64)
        if terms:
            numbers, rows, tokens, signs = (np.array(column) for column in zip(*terms))
            np.add.at(values, numbers, signs * contexts.log_p(results)[rows, tokens])
        return wild.scored(values)

    return Plan(contexts.queries, finish)


def _pll_terms(
    contexts: _Contexts, number: int, places: list[int], tokens: list[int]
) -> Iterator[tuple[int, int, int, float]]:
    """PLL(variant) - PLL(wild type); terms that stand in both (far-off windows) are left out."""
    ids = contexts.wild.query.ids
    mutated = ids.copy()
    mutated[places] = tokens
    for i in range(len(ids)):
        window = window_around(i, i, len(ids), contexts.wild.model.max_residues)
        if not any(window.start <= p < window.end for p in places):
            continue
        yield (number, contexts.add(mutated, [i]), int(mutated[i]), 1.0)
        yield (number, contexts.add(ids, [i]), int(ids[i]), -1.0)


def plan_scan(wild: WildType) -> Plan:
    """What must be computed to score all single substitutions: L queries by masked marginals, 1 by wild-type
    marginals, about 19 L^2 by pseudo-log-likelihood."""
    if wild.strategy == "pseudo-log-likelihood":
        plan = plan_scores(wild, wild.singles())
        return Plan(plan.queries, lambda results: wild.scored(wild.fold(plan.finish(results).values)))
    ids, standard = wild.query.ids, wild.model.alphabet.standard_ids
    contexts = _Contexts(wild)
    places = np.arange(len(ids))
    if wild.strategy == "wt-marginals":
        contexts.add_whole()
        rows = places
    else:
        rows = np.array([contexts.add(ids, [i]) for i in range(len(ids))])

    def finish(results: Sequence[Result]) -> Scored:
        logs = contexts.log_p(results)[rows]
        return wild.scored((logs[:, standard] - logs[places, ids][:, None]).astype(np.float32))

    return Plan(contexts.queries, finish)
