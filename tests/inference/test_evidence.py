"""Model, homologs and matrix together: against written formulas; the weights and their fit."""

from __future__ import annotations

import numpy as np
import pytest

from bioseq.backbones.protocol import Backbone
from bioseq.errors import BundleError, SpecError
from bioseq.homologs.matrix import conditional
from bioseq.homologs.profile import Profile
from bioseq.inference.evidence import Evidence, Found, Mixture
from bioseq.inference.fitting import fit_mixture, puzzles
from bioseq.inference.query import Result
from bioseq.inference.scoring import scan_sites, score_variants
from bioseq.sequences.alphabet import protein
from bioseq.sequences.mutations import singles

ALPHABET = protein()
STANDARD = ALPHABET.standard
WILD = "MKTAYIAKQRQX"


class Toy:
    """A model with known logits: one table for every context, so that formulas can be written by hand."""

    name, alphabet, max_residues, has_lm_head = "toy", ALPHABET, 100, True
    encoder = Backbone()  # takes every sequence

    def __init__(self, mixture: Mixture | None = None, table: np.ndarray | None = None):
        self.mixture = mixture or Mixture()
        rng = np.random.default_rng(1)
        self.table = rng.normal(0, 2, (60, len(ALPHABET))).astype(np.float32) if table is None else table

    def prepare(self, sequence, *, logits, long_sequences):
        from bioseq.inference.predictor import Predictor

        return Predictor.prepare(self, sequence, logits=logits, long_sequences=long_sequences)

    def run(self, queries, *, progress=None):
        full = [np.arange(len(q.ids)) if isinstance(q.logits_at, str) else q.logits_at for q in queries]
        return [Result(logits=self.table[at]) for at in full]

    def p(self, place: int) -> np.ndarray:
        x = self.table[place, ALPHABET.standard_ids].astype(float)
        return np.exp(x) / np.exp(x).sum()


def profile(length: int = len(WILD), number: int = 5, seed: int = 0) -> Found:
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 9, length) if number else np.zeros(length)
    p = rng.dirichlet(np.ones(20), length)
    counts = p * depth[:, None]
    return Found(Profile(WILD[:length], np.log(p), counts, depth, number, 3.2), "test")


def by_hand(toy: Toy, homologs: Found, text: str) -> float:
    old, place, new = text[0], int(text[1:-1]) - 1, text[-1]
    m = toy.mixture
    w = m.alone / (1 + homologs.profile.depth[place] / m.half)
    p = (1 - w) * homologs.profile.probs[place] + w * toy.p(place)
    a, b = STANDARD.index(old), STANDARD.index(new)
    return (1 - m.matrix) * np.log(p[b] / p[a]) + m.matrix * np.log(conditional()[a, b] / conditional()[a, a])


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals"])
def test_scores_are_the_written_mixture(strategy):
    toy, homologs = Toy(Mixture(0.8, 4.0, 0.4)), profile()
    texts = ["M1A", "K8R", "R10W"]
    scored = score_variants(toy, WILD, [*texts, "M1A:K8R", "WT"], strategy=strategy, homologs=homologs)
    want = [by_hand(toy, homologs, t) for t in texts]
    assert min(map(abs, want)) > 1e-3
    np.testing.assert_allclose(scored.values, [*want, want[0] + want[1], 0.0], atol=1e-12)
    table = scan_sites(toy, WILD, strategy=strategy, homologs=homologs)
    np.testing.assert_allclose(table.values[7, STANDARD.index("R")], want[1], rtol=1e-6)
    assert table.homologs.number == scored.homologs.number == 5


def test_pseudo_log_likelihoods_are_mixed_too():
    toy, homologs = Toy(), profile()
    plain = score_variants(toy, WILD, ["K8R"], strategy="pseudo-log-likelihood", homologs="none")
    mixed = score_variants(toy, WILD, ["K8R"], strategy="pseudo-log-likelihood", homologs=homologs)
    # This model gives a place the same logits in every context, so only the mutated place differs.
    np.testing.assert_allclose(mixed.values, [by_hand(toy, homologs, "K8R")], atol=1e-12)
    assert abs(plain.values[0] - mixed.values[0]) > 1e-3


def test_scans_equal_scores_of_all_singles():
    toy, homologs = Toy(), profile()
    table = scan_sites(toy, WILD, homologs=homologs).values
    scores = score_variants(toy, WILD, singles(WILD), homologs=homologs).values
    np.testing.assert_allclose(
        [table[m.position - 1, STANDARD.index(m.mutant)] for v in singles(WILD) for m in v.mutations],
        scores,
        rtol=1e-5,
        atol=1e-6,
    )


def test_probabilities_stay_probabilities():
    """Without a wild type, as for masked residues: rows of the mixed log-probabilities sum to one."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(WILD), len(ALPHABET)))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    mixed = Evidence.of(profile(), Mixture(0.7, 3.0, 0.5), len(WILD)).mix(
        log_p, np.arange(len(WILD)), ALPHABET
    )
    np.testing.assert_allclose(np.exp(mixed).sum(1), 1.0)
    others = np.setdiff1d(np.arange(len(ALPHABET)), ALPHABET.standard_ids)
    np.testing.assert_array_equal(mixed[:, others], log_p[:, others])


def test_the_model_speaks_where_homologs_are_silent():
    mixture = Mixture(alone=0.9, half=2.0)
    np.testing.assert_allclose(mixture.weight(np.array([0.0, 2.0, 6.0])), [0.9, 0.45, 0.225])


def test_the_notes_tell_what_stood_behind_a_score():
    told = score_variants(Toy(), WILD, ["M1A"], homologs=profile()).notes
    assert any("5 homologs in test, effective number 3.2" in n and "not fitted" in n for n in told)
    fitted = Mixture(0.9, 1.0, 0.7, fitted={"proteins": 1})
    scored = score_variants(Toy(fitted), WILD, ["M1A"], homologs=profile(number=0))
    assert any("no homologs in test" in n and "0.90" in n for n in scored.notes)
    assert not any("not fitted" in n for n in scored.notes)
    assert scored.homologs.depth.tolist() == [0.0] * len(WILD)
    assert score_variants(Toy(), WILD, ["M1A"], homologs="none").homologs is None


def test_wrong_use_is_told():
    with pytest.raises(SpecError, match="11 columns, and the sequence 12 residues"):
        score_variants(Toy(), WILD, ["M1A"], homologs=profile(11))
    with pytest.raises(SpecError, match="either homologs or an alignment"):
        score_variants(Toy(), WILD, ["M1A"], homologs="default", alignment="x.a3m")


def test_a_mixture_round_trips_and_bad_ones_are_refused():
    mixture = Mixture(0.25, 7.5, 0.5, fitted={"proteins": 3})
    assert Mixture.from_json(mixture.to_json()) == mixture
    for text in (
        "[]",
        "nonsense",
        mixture.to_json().replace("0.25", "1.25"),
        mixture.to_json().replace("7.5", "NaN"),
        mixture.to_json().replace("7.5", '"much"'),
        mixture.to_json().replace('"matrix"', '"matrices"'),
    ):
        with pytest.raises(BundleError, match=r"mixture\.json"):
            Mixture.from_json(text)


# --------------------------------------------------------------------------------------------------- the fit


class Knowing(Toy):
    """Gives the true residue of each masked place the probability `right`, and the rest evenly."""

    def __init__(self, right: float):
        super().__init__()
        self.right, self.tasks = right, iter(puzzles(STANDARD))

    def run(self, queries, *, progress=None):
        out = []
        for task in self.tasks:
            p = np.full((len(task.places), 20), (1 - self.right) / 19)
            p[np.arange(len(p)), task.truth] = self.right
            logits = np.full((len(p), len(ALPHABET)), -30.0)
            logits[:, ALPHABET.standard_ids] = np.log(p)
            out.append(Result(logits=logits))
        return out


def homologs_of(right: float):
    """Profiles that know as much, a third of them without homologs and even."""

    def search(texts):
        out = []
        for i, task in enumerate(puzzles(STANDARD)):
            length = task.masked.replace("<mask>", "X")
            p = np.full((len(length), 20), 0.05)
            if i % 3:
                p[task.places] = (1 - right) / 19
                p[task.places, task.truth] = right
            depth = np.full(len(length), 8.0 if i % 3 else 0.0)
            out.append(Profile(length, np.log(p), p * depth[:, None], depth, 9 if i % 3 else 0, 8.0))
        return out

    return search


def test_a_backbone_that_knows_nothing_gets_no_weight():
    mixture = fit_mixture(Knowing(0.02), homologs_of(0.4))
    assert mixture.weight(np.array([0.0, 8.0])).max() < 0.01
    found = mixture.fitted["perplexity"]
    assert found["both"] <= found["homologs"] * 1.001 < found["model"]


def test_a_strong_backbone_is_heard_beside_homologs():
    weak, strong = (fit_mixture(Knowing(right), homologs_of(0.2)) for right in (0.1, 0.7))
    assert strong.weight(np.array(8.0)) > 0.5 > 0.1 > weak.weight(np.array(8.0))
    assert strong.alone > 0.9
    assert strong.fitted["perplexity"]["both"] < 2


def test_the_proteins_of_the_fit_are_what_they_say():
    tasks = puzzles(STANDARD)
    assert len(tasks) == 250
    assert sum((t.relative >= 0).any() for t in tasks) > 140
    same = np.concatenate([(t.relative == t.truth)[t.relative >= 0] for t in tasks]).mean()
    assert 0.5 < same < 0.8  # relatives, neither copies nor strangers
    assert all(t.masked.count("<mask>") == len(t.places) for t in tasks)


def test_rows_of_different_contexts_are_on_one_scale() -> None:
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(len(ALPHABET)), len(WILD)))
    ids = ALPHABET.encode(WILD).ids
    mixed = Evidence.of(profile(), Mixture(0.7, 3.0, 0.5), len(WILD)).mix(
        log_p, np.arange(len(WILD)), ALPHABET, ids
    )
    np.testing.assert_allclose(np.exp(mixed).sum(1), 1.0, atol=1e-9)
