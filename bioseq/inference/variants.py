"""Variants of a protein: mutation notation, scores, scans of all single substitutions.

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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from bioseq.errors import BioseqError, IllegalResidueError, MutationError, SpecError
from bioseq.inference.batching import Window
from bioseq.progress import Progress
from bioseq.sequences.alphabet import Alphabet
from bioseq.sequences.mutations import Mutation, Variant, apply, between, letters_of, parse, singles

if TYPE_CHECKING:
    from bioseq.inference.predictor import Answer, Predictor, Work
    from bioseq.sequences.fasta import Record

Strategy = Literal["masked-marginals", "wt-marginals", "pseudo-log-likelihood"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
__all__ = [
    "STRATEGIES",
    "Mutation",
    "Plan",
    "Scored",
    "Strategy",
    "Variant",
    "apply",
    "between",
    "parse",
    "plan_scan",
    "plan_scores",
    "scan",
    "scan_sites",
    "score",
    "score_variants",
    "singles",
    "window_around",
]

_MAX_WORKS = 20_000  # contexts held at once; bounds memory for pseudo-log-likelihoods of long tables


# ------------------------------------------------------------------ plans: what must be computed, and what it says


@dataclass(frozen=True, slots=True)
class Scored:
    """`values` float64 [variants], or float32 [L, 20] of a scan; `notes` say what was done to the sequence."""

    values: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Plan:
    """Works for `Predictor.run`, and `finish`, which turns their answers (in that order) into a `Scored`.

    A server puts the works of many requests into its own batches; `score_variants` runs them here.
    """

    works: list[Work]
    finish: Callable[[Sequence[Answer]], Scored]


@dataclass(slots=True)
class _Contexts:
    """Distinct masked contexts of one wild type, each with the places whose logits it must give."""

    predictor: Predictor
    base: Work
    works: list[Work] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, ids: np.ndarray, masked: Sequence[int]) -> tuple[int, int]:
        """The context of `ids` with the residues `masked` (zero-based, ascending) masked, and the window's
        start. Its logits come in the order of `masked`."""
        limit = self.predictor.max_residues
        window = window_around(masked[0], masked[-1], len(ids), limit)
        cut = ids[window.start : window.end].copy()
        places = np.asarray(masked, dtype=np.int64) - window.start
        cut[places] = self.predictor.alphabet.mask_id
        # The window's start is no part of the key: equal residues give equal logits wherever they were cut.
        key = places.tobytes() + b"|" + cut.tobytes()
        if key not in self.known:
            self.known[key] = len(self.works)
            self.works.append(
                replace(self.base, ids=cut, logits_at=places, cover=[Window(0, len(cut))], overlap=0)
            )
        return self.known[key], window.start


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


def _base(
    predictor: Predictor, wild_type: str | Record, strategy: str, long_sequences: str
) -> tuple[Work, str, tuple]:
    """The wild type prepared, its letters, and notes. Raises what `Predictor.prepare` raises."""
    if strategy not in STRATEGIES:
        raise SpecError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}.", field="strategy")
    if long_sequences not in ("error", "window"):
        raise SpecError(f"{long_sequences!r} is not one of error, window.", field="long_sequences")
    if predictor.encoder.lm_head is None:
        raise BioseqError(f"{predictor.name} has no language-model head: it cannot score variants.")
    text = wild_type if isinstance(wild_type, str) else wild_type.sequence
    if "<mask>" in text:
        raise IllegalResidueError("a wild type may hold no <mask>.", hint="Give the residue itself.")
    work = predictor.prepare(wild_type, logits="all", long_sequences=long_sequences)  # type: ignore[arg-type]
    notes = list(work.notes)
    if len(work.cover) > 1 and strategy != "wt-marginals":
        notes = [n for n in notes if " windows of " not in n]
        notes.append(
            f"{len(work.ids)} residues, over the limit: each masked context is the {predictor.max_residues} "
            "residues around its masked positions"
        )
    letters = letters_of(text)
    odd = sorted({a for a in letters if a not in predictor.alphabet.standard})
    if odd:
        notes.append(f"the wild type has {', '.join(odd)}: scores there are relative to that token")
    return work, letters, tuple(notes)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def plan_scores(
    predictor: Predictor,
    wild_type: str | Record,
    mutants: Sequence[str | Variant],
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
) -> Plan:
    """What must be computed to score these variants. Cheap, no torch. Raises `MutationError`, `SequenceError`."""
    base, letters, notes = _base(predictor, wild_type, strategy, long_sequences)
    variants = _read(mutants, letters, predictor.alphabet)
    ids = base.ids
    contexts = _Contexts(predictor, base)
    # One term a row: which variant, which context, which row of its logits, which token, plus or minus.
    terms: list[tuple[int, int, int, int, float]] = []
    if strategy == "wt-marginals" and any(v.changes for v in variants):
        contexts.works.append(base)
    for number, variant in enumerate(variants):
        places = [m.position - 1 for m in variant.changes]
        tokens = [predictor.alphabet.id(m.mutant) for m in variant.changes]
        if not places:
            continue
        if strategy == "pseudo-log-likelihood":
            terms += _pll_terms(contexts, number, ids, places, tokens)
            continue
        context = 0 if strategy == "wt-marginals" else contexts.add(ids, places)[0]
        for row, (place, token) in enumerate(zip(places, tokens)):
            at = place if strategy == "wt-marginals" else row
            terms.append((number, context, at, token, 1.0))
            terms.append((number, context, at, int(ids[place]), -1.0))

    def finish(answers: Sequence[Answer]) -> Scored:
        values = np.zeros(len(variants), dtype=np.float64)
        logs = [_log_softmax(_given(a)) for a in answers]
        for number, context, row, token, sign in terms:
            values[number] += sign * logs[context][row, token]
        return Scored(values, notes)

    return Plan(contexts.works, finish)


def _pll_terms(
    contexts: _Contexts, number: int, ids: np.ndarray, places: list[int], tokens: list[int]
) -> Iterator[tuple[int, int, int, int, float]]:
    """PLL(variant) - PLL(wild type); terms that stand in both (far-off windows) are left out."""
    mutated = ids.copy()
    mutated[places] = tokens
    limit = contexts.predictor.max_residues
    for i in range(len(ids)):
        window = window_around(i, i, len(ids), limit)
        if not any(window.start <= p < window.end for p in places):
            continue
        yield (number, contexts.add(mutated, [i])[0], 0, int(mutated[i]), 1.0)
        yield (number, contexts.add(ids, [i])[0], 0, int(ids[i]), -1.0)


def plan_scan(
    predictor: Predictor,
    sequence: str | Record,
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
) -> Plan:
    """What must be computed to score all single substitutions: L works by masked marginals, 1 by wild-type
    marginals, about 19 L^2 by pseudo-log-likelihood."""
    base, letters, notes = _base(predictor, sequence, strategy, long_sequences)
    ids, standard = base.ids, predictor.alphabet.standard_ids
    if strategy == "pseudo-log-likelihood":
        plan = plan_scores(
            predictor,
            sequence,
            singles(letters, predictor.alphabet),
            strategy=strategy,
            long_sequences=long_sequences,
        )

        def finish_singles(answers: Sequence[Answer]) -> Scored:
            return Scored(_fold(plan.finish(answers).values, letters, predictor.alphabet), notes)

        return Plan(plan.works, finish_singles)
    contexts = _Contexts(predictor, base)
    which = [0] * len(ids)
    if strategy == "wt-marginals":
        contexts.works.append(base)
    else:
        which = [contexts.add(ids, [i])[0] for i in range(len(ids))]

    def finish(answers: Sequence[Answer]) -> Scored:
        if strategy == "wt-marginals":
            logs = _log_softmax(_given(answers[0]))
        else:
            logs = _log_softmax(np.stack([_given(answers[c])[0] for c in which]))
        rows = np.arange(len(ids))
        return Scored((logs[:, standard] - logs[rows, ids][:, None]).astype(np.float32), notes)

    return Plan(contexts.works, finish)


def _fold(values: np.ndarray, letters: str, alphabet: Alphabet) -> np.ndarray:
    """Scores in the order of `singles` as float32 [L, 20], wild type 0."""
    table = np.zeros((len(letters), len(alphabet.standard)), dtype=np.float32)
    table[np.array([[new != old for new in alphabet.standard] for old in letters])] = values
    return table


def _given(answer: Answer) -> np.ndarray:
    assert answer.logits is not None
    return answer.logits


def _read(mutants: Sequence[str | Variant], letters: str, alphabet: Alphabet) -> list[Variant]:
    if isinstance(mutants, str):
        raise SpecError("give a list of variants, not one string.", field="mutants")
    # A Variant is read again: it may have been made for another wild type.
    return [parse(str(m), letters, alphabet=alphabet, index=i) for i, m in enumerate(mutants)]


# ------------------------------------------------------------------------------------------- scores and scans


class _Share(Progress):
    """Counts a chunk's passes as its share of the variants."""

    def __init__(self, bar: Progress, passes: int, variants: int):
        super().__init__(passes, "", enabled=False)
        self._whole, self._variants, self._counted = bar, variants, 0

    def add(self, count: int = 1) -> None:
        self.done += count
        counted = self.done * self._variants // self.total
        if counted > self._counted:
            self._whole.add(counted - self._counted)
            self._counted = counted


def score_variants(
    predictor: Predictor,
    wild_type: str | Record,
    mutants: Sequence[str | Variant],
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    progress: bool = False,
) -> Scored:
    """Scores float64 [len(mutants)] in input order, with notes. All variants are checked before any is scored."""
    base, letters, notes = _base(predictor, wild_type, strategy, long_sequences)
    variants = _read(mutants, letters, predictor.alphabet)
    each = len(base.ids) if strategy == "pseudo-log-likelihood" else 1
    size = max(1, _MAX_WORKS // each)
    values = [np.zeros(0, dtype=np.float64)]
    with Progress(len(variants), "scoring", unit="variants", enabled=progress) as bar:
        for at in range(0, len(variants), size):
            chunk = variants[at : at + size]
            plan = plan_scores(predictor, wild_type, chunk, strategy=strategy, long_sequences=long_sequences)
            answers = predictor.run(plan.works, progress=_Share(bar, len(plan.works), len(chunk)))
            values.append(plan.finish(answers).values)
            if not plan.works:  # wild types only
                bar.add(len(chunk))
    return Scored(np.concatenate(values), notes)


def scan_sites(
    predictor: Predictor,
    sequence: str | Record,
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    progress: bool = False,
) -> Scored:
    """All single substitutions: float32 [L, 20], letters in the order of `alphabet.standard`, wild type 0."""
    if strategy == "pseudo-log-likelihood":
        _, letters, _ = _base(predictor, sequence, strategy, long_sequences)
        scored = score_variants(
            predictor,
            sequence,
            singles(letters, predictor.alphabet),
            strategy=strategy,
            long_sequences=long_sequences,
            progress=progress,
        )
        return Scored(_fold(scored.values, letters, predictor.alphabet), scored.notes)
    plan = plan_scan(predictor, sequence, strategy=strategy, long_sequences=long_sequences)
    with Progress(len(plan.works), "scanning", unit="passes", enabled=progress) as bar:
        return plan.finish(predictor.run(plan.works, progress=bar))


def score(
    predictor: Predictor,
    wild_type: str | Record,
    mutants: Sequence[str | Variant],
    strategy: str = "masked-marginals",
    *,
    long_sequences: str = "error",
    progress: bool = False,
) -> list[float]:
    """`score_variants` without the notes, as plain floats; higher is more likely."""
    return score_variants(
        predictor, wild_type, mutants, strategy=strategy, long_sequences=long_sequences, progress=progress
    ).values.tolist()


def scan(
    predictor: Predictor,
    sequence: str | Record,
    strategy: str = "masked-marginals",
    *,
    long_sequences: str = "error",
    progress: bool = False,
) -> np.ndarray:
    """`scan_sites` without the notes."""
    return scan_sites(
        predictor, sequence, strategy=strategy, long_sequences=long_sequences, progress=progress
    ).values
