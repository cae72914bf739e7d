"""How far a backbone is trusted beside homologs: its `Mixture`, fitted by likelihood.

The proteins are in `bioseq/sample/relatives.fasta`: representatives of clusters of Swiss-Prot, most of them with the
aligned residues of one relative. They are among the clusters to which the profile's strengths were fitted, and they
stand in the training file of the shipped backbone and in the shipped reference set: the perplexities here compare the
two experts and are not those of new proteins (see docs/homologs.md and the card's own protocol for these). A reference
set of yours that holds the relatives themselves makes the matrix's share too small. 15 % of the residues of each are masked, for the model and for the search. `alone`
and `half` are those under which the masked residues are likeliest; t is the share of the matrix in the log-linear
pool under which the relative's residues at the same places are likeliest. Hits above 95 % identity are left out, so
that a reference set which holds the proteins themselves gives the same answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bioseq.bundles.bundle import Bundle, amend_bundle, with_section
from bioseq.errors import SpecError
from bioseq.homologs.matrix import conditional
from bioseq.homologs.profile import Profile
from bioseq.inference.evidence import FILE, Mixture, log_softmax
from bioseq.inference.variants import Model
from bioseq.progress import Progress
from bioseq.sequences.fasta import read_fasta

PROTEINS = Path(__file__).parents[1] / "sample" / "relatives.fasta"
HIDDEN = 0.15
HEADING = "## Beside homologs"
_ALONE = np.linspace(0.0, 1.0, 101)
_HALF = np.logspace(-2, 3, 101)


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A protein with some residues hidden: `masked` text with "<mask>", `places` int64 [P], and the codes of the
    true residues and of the relative's ones there, int64 [P] (-1: none)."""

    masked: str
    places: np.ndarray
    truth: np.ndarray
    relative: np.ndarray


def puzzles(letters: str, path: str | Path = PROTEINS, *, seed: int = 0) -> list[Puzzle]:
    """The proteins of the file with 15 % of their residues hidden; `letters` are the standard ones, in order."""
    proteins: list[list[str]] = []
    for record in read_fasta(path):
        if "/" in record.id:  # PROTEIN/RELATIVE: the relative's residues on the columns of the one before
            proteins[-1].append(record.sequence)
        else:
            proteins.append([record.sequence])
    code = {a: i for i, a in enumerate(letters)}
    rng = np.random.default_rng(seed)
    out = []
    for sequence, *aligned in proteins:
        known = np.array([i for i, a in enumerate(sequence) if a in code])
        places = np.sort(rng.choice(known, max(1, round(HIDDEN * len(known))), replace=False))
        text = list(sequence)
        for i in places:
            text[i] = "<mask>"
        other = aligned[0] if aligned else "-" * len(sequence)
        out.append(
            Puzzle(
                "".join(text),
                places,
                np.array([code[sequence[i]] for i in places]),
                np.array([code.get(other[i], -1) for i in places]),
            )
        )
    return out


def fit_mixture(
    model: Model, search: Callable[[Sequence[str]], list[Profile]], *, seed: int = 0, progress: bool = False
) -> Mixture:
    """`search` gives the homologs of masked sequences, without those above 95 % identity. Raises `SpecError` for a
    backbone that is not one of proteins or has no language-model head."""
    alphabet = model.alphabet
    if alphabet.name != "protein" or not model.has_lm_head:
        raise SpecError(f"{model.name} gives no probabilities of amino acids.", field="model")
    tasks = puzzles(alphabet.standard, seed=seed)
    profiles = search([p.masked for p in tasks])
    queries = [model.prepare(p.masked, logits=p.places, long_sequences="window") for p in tasks]
    with Progress(len(queries), "masked residues", unit="proteins", enabled=progress) as bar:
        logits = np.concatenate([r.logits for r in model.run(queries, progress=bar)])
    from_model = np.exp(log_softmax(logits[:, alphabet.standard_ids]))
    from_profile = np.exp(
        np.concatenate([f.log_probs[p.places] for f, p in zip(profiles, tasks)]).astype(np.float64)
    )
    depth = np.concatenate([f.depth[p.places] for f, p in zip(profiles, tasks)])
    truth = np.concatenate([p.truth for p in tasks])
    relative = np.concatenate([p.relative for p in tasks])
    rows = np.arange(len(truth))
    own, column = from_model[rows, truth], from_profile[rows, truth]
    alone, half = _weights(own, column, depth)
    w = Mixture(alone, half).weight(depth)
    mixed = (1.0 - w) * column + w * own
    there = relative >= 0
    inner = np.log((1.0 - w[:, None]) * from_profile + w[:, None] * from_model)[there]
    matrix = _share(inner, np.log(conditional())[truth[there]], relative[there])
    return Mixture(
        alone,
        half,
        matrix,
        fitted={
            "proteins": len(tasks),
            "residues": len(truth),
            "without_homologs": float(np.mean(depth == 0)),
            "perplexity": {
                "model": _perplexity(own),
                "homologs": _perplexity(column),
                "both": _perplexity(mixed),
            },
            "seed": seed,
        },
    )


def _weights(own: np.ndarray, column: np.ndarray, depth: np.ndarray) -> tuple[float, float]:
    """The likeliest `alone` and `half` on a grid."""
    best = (-np.inf, 0.0, 1.0)
    for half in _HALF:
        for alone in _ALONE:
            w = Mixture(alone, half).weight(depth)
            best = max(best, (float(np.log((1.0 - w) * column + w * own).mean()), float(alone), float(half)))
    return best[1], best[2]


def _share(inner: np.ndarray, matrix: np.ndarray, truth: np.ndarray) -> float:
    """Share of the matrix in exp(a inner + b matrix), normalised, under which `truth` is likeliest: Newton's method
    on a concave function of (a, b)."""
    features = np.stack([inner, matrix], axis=1)
    weights = np.array([0.5, 0.5])
    for _ in range(50):
        z = np.einsum("nfa,f->na", features, weights)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        mean = np.einsum("nfa,na->nf", features, p)
        gradient = (features[np.arange(len(truth)), :, truth] - mean).sum(axis=0)
        spread = np.einsum("nfa,nga,na->fg", features, features, p) - mean.T @ mean
        step = np.linalg.solve(spread + 1e-9 * np.eye(2), gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    a, b = np.maximum(weights, 0.0)
    return float(b / (a + b)) if a + b > 0 else 1.0


def _perplexity(p: np.ndarray) -> float:
    return float(np.exp(-np.log(p).mean()))


def card_section(mixture: Mixture) -> str:
    """What a model's card says of its mixture, Markdown. `fitted["held_out"]` are figures of other proteins
    (`training.release.mixture`)."""
    assert mixture.fitted is not None
    found, p = mixture.fitted, mixture.fitted["perplexity"]
    told = found.get("held_out")
    elsewhere = "the table below has" if told else "docs/homologs.md has"
    section = f"""
{HEADING}

Weights beside homologs, fitted by likelihood on {found["proteins"]} development proteins ({found["residues"]:,} masked
residues, hidden from the search too; {found["without_homologs"]:.0%} of them in columns without homologs): alone
{mixture.alone:.2f}, half {mixture.half:.3g}, matrix {mixture.matrix:.2f}. The profile's strengths were fitted to the same
clusters, and the proteins stand in Swiss-Prot, so these perplexities compare the experts; {elsewhere} those of
new proteins.

| masked residues predicted from | perplexity |
|---|---|
| the model alone | {p["model"]:.2f} |
| homologs alone | {p["homologs"]:.2f} |
| both | {p["both"]:.2f} |
"""
    if not told:
        return section
    rows = "\n".join(
        f"| {name} | {one['proteins']:,} | {one['residues']:,} | {one['perplexity']['model']:.2f} "
        f"| {one['perplexity']['homologs']:.2f} | **{one['perplexity']['both']:.2f}** |"
        for name, one in told["sets"].items()
    )
    return f"""{section}
Held-out proteins, homologs from `{told["reference"]}`; the masked residues (passes 1 to {told["passes"]} of the protocol)
were hidden from the search too.

| set | proteins | residues | model | homologs | both |
|---|---|---|---|---|---|
{rows}
"""


def with_mixture(bundle: Bundle, mixture: Mixture, path: str | Path, *, force: bool = False) -> Bundle:
    """Write a backbone's bundle again as `path`, with the mixture in it and in its card."""
    card = with_section(bundle.card(), card_section(mixture))
    evidence = {**bundle.evidence(), "mixture": json.loads(mixture.to_json())}
    files = {FILE: mixture.to_json(), "card.md": card, "evidence.json": json.dumps(evidence, indent=1) + "\n"}
    return amend_bundle(bundle, path, files, force=force)
