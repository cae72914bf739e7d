"""Mutation notation, the three scoring formulas against closed forms and brute force, scans, windows."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.protocol import Backbone
from bioseq.errors import (
    BioseqError,
    EmptySequenceError,
    IllegalResidueError,
    MutationError,
    SequenceTooLongError,
    SpecError,
)
from bioseq.inference import scoring
from bioseq.inference.evidence import Mixture
from bioseq.inference.predictor import Predictor
from bioseq.inference.query import Result
from bioseq.inference.scoring import scan_sites, score_variants
from bioseq.inference.variants import STRATEGIES, Plan, WildType, plan_scan, plan_scores, window_around
from bioseq.sequences.alphabet import dna, protein
from bioseq.sequences.fasta import Record, read_fasta
from bioseq.sequences.mutations import Mutation, Variant, apply, between, parse, singles

DATA = Path(__file__).parent.parent / "data"
STANDARD = protein().standard
WILD = "MKTAYIAKQRQISFVKSHFSRQ"


def score(model, *args, **options) -> list[float]:
    return score_variants(model, *args, homologs="none", **options).values.tolist()


def scan(model, *args, **options) -> np.ndarray:
    return scan_sites(model, *args, homologs="none", **options).values


def scores_plan(model, wild_type, mutants, strategy="masked-marginals") -> Plan:
    wild = WildType.prepare(model, wild_type, strategy)
    return plan_scores(wild, wild.read(mutants))


def scan_plan(model, sequence, strategy="masked-marginals") -> Plan:
    return plan_scan(WildType.prepare(model, sequence, strategy))


# ------------------------------------------------------------------------------------------------ notation


def test_notation_is_one_based_folded_and_ordered():
    variant = parse("l6i:a4G", "MKTAYL")
    assert variant == Variant((Mutation("A", 4, "G"), Mutation("L", 6, "I")))
    assert str(variant) == "A4G:L6I"
    assert apply("mktayl*", variant) == "MKTGYI"
    assert parse(" wt ", "MK") == Variant()
    assert str(Variant()) == "WT"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A5G", r"the wild type has Y at position 5, not A"),
        ("A4G:L5P", r"the wild type has Y at position 5, not L"),
        ("A0G", "position 0 is outside"),
        ("A7G", "position 7 is outside the wild type of 6 residues"),
        ("A4X", "X is not a standard residue"),
        ("A4U", "U is not a standard residue"),
        ("A4G:A4V", "position 4 is given twice"),
        ("4G", "'4G' is not a substitution"),
        ("A4", "'A4' is not a substitution"),
        ("A4del", "is not a substitution"),
        ("A4*", "is not a substitution"),
        ("A4G,Y5F", "is not a substitution"),
        ("A4G:", "is not a substitution"),
        ("", "0 characters is not a substitution"),
        ("A٤G", "is not a substitution"),  # digits of other scripts
    ],
)
def test_bad_mutations_are_refused(text, words):
    with pytest.raises(MutationError, match=words):
        parse(text, "MKTAYL")


def test_mutation_errors_count_variants_and_show_no_sequence():
    with pytest.raises(MutationError, match=r"variant 3: Y4F: "):
        parse("Y4F", WILD, index=2)
    for text in (WILD, WILD[:8], f"A4G:{WILD}"):
        with pytest.raises(MutationError) as caught:
            parse(text, WILD)
        assert WILD[:8] not in str(caught.value)


def test_dna_has_its_own_standard_letters():
    assert str(parse("A1T", "ACGT", alphabet=dna())) == "A1T"
    with pytest.raises(MutationError, match="standard"):
        parse("A1N", "ACGT", alphabet=dna())


@settings(deadline=None, max_examples=100)
@given(st.text(STANDARD, min_size=1, max_size=30), st.data())
def test_text_variant_and_sequence_tell_the_same(wild_type, data):
    sequence = "".join(data.draw(st.sampled_from([a, *STANDARD])) for a in wild_type)
    variant = between(wild_type, sequence)
    assert parse(str(variant), wild_type) == variant
    assert apply(wild_type, variant) == sequence
    assert [m.position for m in variant.mutations] == [
        i for i, (a, b) in enumerate(zip(wild_type, sequence), 1) if a != b
    ]


def test_between_refuses_other_lengths():
    with pytest.raises(MutationError, match="5 residues, but the wild type has 6"):
        between("MKTAYL", "MKTAY")


# -------------------------------------------------- formulas against closed forms, with a stand-in for the model


class Toy:
    """Stands where `Predictor` stands. Its logits are a known function of the whole context, drawn from a hash,
    so that a wrong context, row, token or sign changes the score."""

    def __init__(self, max_residues: int = 1022):
        self.max_residues = max_residues
        self.alphabet = protein()
        self.name = "toy"
        self.has_lm_head = True
        self.mixture = Mixture()
        self.seen: list[tuple[bytes, int]] = []
        self.encoder = Backbone()  # takes every sequence
        self.prepare = Predictor.prepare.__get__(self)

    def logits_of(self, ids: np.ndarray) -> np.ndarray:
        seed = int.from_bytes(ids.tobytes()[-64:].rjust(64, b"\0"), "little") % (2**63) + len(ids)
        return np.random.default_rng(seed).normal(0, 3, (len(ids), len(self.alphabet))).astype(np.float32)

    def run(self, queries, *, progress=None):
        results = []
        for query in queries:
            assert len(query.cover) == 1 and query.cover[0].end == len(query.ids) <= self.max_residues
            full = self.logits_of(query.ids)
            self.seen.append((query.ids.tobytes(), query.tokens))
            at = slice(None) if isinstance(query.logits_at, str) else query.logits_at
            results.append(Result(logits=full[at]))
            if progress is not None:
                progress.add(1)
        return results

    def log_p(self, text: list[str]) -> np.ndarray:
        """[L, V] by the textbook, for a list of tokens."""
        x = self.logits_of(np.array([self.alphabet.id(t) for t in text], dtype=np.uint8)).astype(np.float64)
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        return np.log(p)

    def masked(self, text: str, places) -> np.ndarray:
        return self.log_p(["<mask>" if i in places else a for i, a in enumerate(text)])


def reference(toy, wild_type: str, variant: Variant, strategy: str) -> float:
    """The formulas of the docstring, written out one position at a time."""
    token = toy.alphabet.id
    mutant = apply(wild_type, variant)
    places = [i for i in range(len(wild_type)) if mutant[i] != wild_type[i]]
    if strategy == "pseudo-log-likelihood":
        pll = [sum(toy.masked(y, [i])[i, token(y[i])] for i in range(len(y))) for y in (mutant, wild_type)]
        return pll[0] - pll[1]
    table = toy.log_p(list(wild_type)) if strategy == "wt-marginals" else toy.masked(wild_type, places)
    return sum(table[i, token(mutant[i])] - table[i, token(wild_type[i])] for i in places)


CHOICES = ["T3S", "M1A:Q22W", "A4G:Y5F:I6V", "K8R", "WT", "A7A", "A7A:K8R"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_equal_the_written_formulas(strategy):
    toy = Toy()
    got = score(toy, WILD, CHOICES, strategy=strategy)
    want = [reference(toy, WILD, parse(c, WILD), strategy) for c in CHOICES]
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert got[4] == got[5] == 0.0
    assert got[3] == got[6]  # a residue that stays is not masked
    assert min(abs(v) for v in (got[:4])) > 1e-3  # the comparison is of something


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scans_equal_scores_of_all_singles(strategy):
    toy = Toy()
    short = WILD[:9]
    table = scan(toy, short, strategy=strategy)
    assert table.shape == (9, 20) and table.dtype == np.float32
    for i, a in enumerate(short):
        assert table[i, STANDARD.index(a)] == 0.0
    scores = score(toy, short, singles(short), strategy=strategy)
    np.testing.assert_allclose(table[table != 0], scores, rtol=1e-6)
    # and each lies where its letter says
    cell = table[3, STANDARD.index("W")]
    np.testing.assert_allclose(cell, reference(toy, short, parse("A4W", short), strategy), rtol=1e-6)


def test_equal_contexts_are_computed_once():
    toy = Toy()
    assert len(scan_plan(toy, WILD).queries) == len(WILD)
    assert len(scan_plan(toy, WILD, strategy="wt-marginals").queries) == 1
    assert len(scores_plan(toy, WILD, singles(WILD)).queries) == len(WILD)
    assert len(scores_plan(toy, WILD, ["A4G:K8R", "K8E:A4V", "A4W:K8W", "A4G", "WT"]).queries) == 2
    assert scores_plan(toy, WILD, ["WT"]).queries == []
    # wild type L, and L - 1 more for each single mutant: the mutated position's context is shared.
    assert (
        len(scores_plan(toy, WILD, ["A4G", "K8R"], strategy="pseudo-log-likelihood").queries) == 22 + 2 * 21
    )


def test_only_the_masked_rows_are_asked_for():
    for query in scores_plan(Toy(), WILD, ["A4G:K8R", "M1A"]).queries:
        places = np.flatnonzero(query.ids == protein().mask_id)
        assert isinstance(query.logits_at, np.ndarray)
        assert query.logits_at.tolist() == places.tolist()
        assert query.tokens == len(WILD) + 2


def test_long_tables_run_in_chunks_with_the_same_scores(monkeypatch):
    toy = Toy()
    every = singles(WILD)[:60]
    for strategy in STRATEGIES:
        whole = score(toy, WILD, every, strategy=strategy)
        monkeypatch.setattr(scoring, "_MAX_QUERIES", 50)
        assert score(toy, WILD, every, strategy=strategy) == whole
        monkeypatch.undo()


def test_progress_counts_every_variant(capsys):
    score(Toy(), WILD, singles(WILD)[:40], progress=True)
    assert "scoring: 100 % (40/40 variants" in capsys.readouterr().err
    scan(Toy(), WILD, progress=True)
    assert f"scanning: 100 % ({len(WILD)}/{len(WILD)} passes" in capsys.readouterr().err


def test_nothing_is_computed_before_all_is_checked():
    toy = Toy()
    with pytest.raises(MutationError, match="variant 2"):
        score(toy, WILD, ["A4G", "A5G"])
    assert toy.seen == []


@pytest.mark.parametrize(
    ("wild_type", "error"),
    [
        ("", EmptySequenceError),
        ("MK-L", IllegalResidueError),
        ("MK<mask>L", IllegalResidueError),
        ("MK1", IllegalResidueError),
    ],
)
def test_bad_wild_types(wild_type, error):
    with pytest.raises(error):
        score(Toy(), wild_type, ["M1A"])
    with pytest.raises(error):
        scan(Toy(), wild_type)


def test_wrong_use_is_told():
    with pytest.raises(SpecError, match="strategy: 'magic'"):
        score(Toy(), WILD, ["A4G"], strategy="magic")
    with pytest.raises(SpecError, match="long_sequences"):
        score(Toy(), WILD, ["A4G"], long_sequences="truncate")
    with pytest.raises(SpecError, match="list of variants"):
        score(Toy(), WILD, "A4G")
    headless = Toy()
    headless.has_lm_head = False
    with pytest.raises(BioseqError, match="no language-model head"):
        scan(headless, WILD)


def test_no_variants_no_scores():
    assert score(Toy(), WILD, []) == []


def test_notes_tell_what_was_done():
    scored = score_variants(Toy(), "MKXAJL*", ["M1A"], homologs="none")
    assert any("stop codon" in n for n in scored.notes)
    assert any("J read as X" in n for n in scored.notes)
    assert any("has J, X" in n for n in scored.notes)
    assert score_variants(Toy(), WILD.lower(), ["T3S"], homologs="none").notes == ()
    assert score(Toy(), WILD.lower(), ["T3S"]) == score(Toy(), WILD, ["T3S"])


# ------------------------------------------------------------------------------------------ long sequences


@settings(max_examples=200)
@given(st.integers(1, 60), st.integers(1, 40), st.data())
def test_a_window_holds_its_places_and_is_as_large_as_may_be(length, limit, data):
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first, length - 1))
    if length > limit and last - first + 1 > limit:
        with pytest.raises(MutationError, match=f"window of {limit}"):
            window_around(first, last, length, limit)
        return
    window = window_around(first, last, length, limit)
    assert 0 <= window.start <= first <= last < window.end <= length
    assert window.end - window.start == min(length, limit)


def test_long_wild_types_are_refused_or_windowed_and_told():
    toy = Toy(max_residues=10)
    with pytest.raises(SequenceTooLongError, match="22 residues; the limit is 10"):
        score(toy, WILD, ["T3S"])
    for strategy in ("masked-marginals", "pseudo-log-likelihood"):
        scored = score_variants(
            toy, WILD, ["T3S", "H18A:S17G"], strategy=strategy, long_sequences="window", homologs="none"
        )
        assert any("10 residues around its masked positions" in n for n in scored.notes)
        assert np.abs(scored.values).min() > 1e-6
    with pytest.raises(MutationError, match="positions 1 and 22 do not fit"):
        score(toy, WILD, ["M1A:Q22W"], long_sequences="window")


def test_a_window_scores_as_its_residues_alone_would():
    toy = Toy(max_residues=10)
    window = window_around(11, 11, len(WILD), 10)
    part = WILD[window.start : window.end]
    at = 12 - window.start
    old = WILD[11]
    assert score(toy, WILD, [f"{old}12W"], long_sequences="window") == score(toy, part, [f"{old}{at}W"])


def test_pll_of_a_long_sequence_leaves_out_far_windows_only():
    toy = Toy(max_residues=7)
    got = score(toy, WILD, ["A4G"], strategy="pseudo-log-likelihood", long_sequences="window")[0]
    mutant = apply(WILD, parse("A4G", WILD))

    def pll(y: str) -> float:
        total = 0.0
        for i in range(len(y)):
            w = window_around(i, i, len(y), 7)
            total += toy.masked(y[w.start : w.end], [i - w.start])[i - w.start, toy.alphabet.id(y[i])]
        return total

    assert got == pytest.approx(pll(mutant) - pll(WILD), abs=1e-9)
    assert len(toy.seen) < 2 * len(WILD)


# ------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def model() -> Predictor:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(5))
    # Larger than the training start: scores must differ between contexts by more than rounding.
    with torch.no_grad():
        for p in encoder.parameters():
            p.mul_(3.0) if p.ndim > 1 else p.add_(
                0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            )
    return Predictor(encoder, name="tiny", threads=1)


def brute(model: Predictor, wild_type: str, text: str, strategy: str) -> float:
    """Through the public `logits` with "<mask>" written into the sequence, one sequence a call."""

    def log_p(tokens: list[str]) -> np.ndarray:
        (logits,) = model.logits(["".join(tokens)])
        return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()

    def hide(y: str, places: list[int]) -> np.ndarray:
        return log_p(["<mask>" if i in places else a for i, a in enumerate(y)])

    mutant = apply(wild_type, parse(text, wild_type))
    places = [i for i, (a, b) in enumerate(zip(wild_type, mutant)) if a != b]
    token = model.alphabet.id
    if strategy == "pseudo-log-likelihood":
        new, old = (sum(hide(y, [i])[i, token(y[i])] for i in range(len(y))) for y in (mutant, wild_type))
        return new - old
    table = log_p(list(wild_type)) if strategy == "wt-marginals" else hide(wild_type, places)
    return sum(table[i, token(mutant[i])] - table[i, token(wild_type[i])] for i in places)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_packed_batched_way_equals_one_sequence_at_a_time(model, strategy):
    texts = ["T3S", "M1A:Q22W", "A4G:Y5F:I6V", "K8R"]
    got = model.score(WILD, texts, strategy=strategy, homologs="none")
    want = [brute(model, WILD, t, strategy) for t in texts]
    assert min(map(abs, want)) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_scores_do_not_depend_on_the_other_variants_or_their_order(model):
    every = [str(v) for v in singles(WILD)]
    table = dict(zip(every, model.score(WILD, every, homologs="none")))
    alone = {t: model.score(WILD, [t], homologs="none")[0] for t in every[::37]}
    turned = dict(zip(every[::-1], model.score(WILD, every[::-1], homologs="none")))
    for text, value in alone.items():
        assert table[text] == pytest.approx(value, abs=2e-5)
    np.testing.assert_allclose([turned[t] for t in every], [table[t] for t in every], atol=2e-5)


def test_scan_of_a_real_protein(model):
    record = next(r for r in read_fasta(DATA / "proteins_30_1000.fasta") if len(r.sequence) < 80)
    table = model.scan(record, homologs="none")
    assert table.shape == (len(record.sequence), 20)
    assert np.isfinite(table).all() and table.std() > 1e-3
    wild = np.array([STANDARD.index(a) for a in record.sequence])
    assert (table[np.arange(len(wild)), wild] == 0).all()


def test_wt_marginals_of_a_long_sequence_use_the_tapered_windows(model):
    short = Predictor(model.encoder, name="short", threads=1)
    short.max_residues = 16
    scored = score_variants(
        short, WILD, ["A4G", "R21K"], strategy="wt-marginals", long_sequences="window", homologs="none"
    )
    assert any("2 windows of 16" in n for n in scored.notes)
    (logits,) = short.logits([WILD], long_sequences="window")
    table = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    token = short.alphabet.id
    want = [table[3, token("G")] - table[3, token("A")], table[20, token("K")] - table[20, token("R")]]
    np.testing.assert_allclose(scored.values, want, atol=1e-6)


def test_errors_name_the_record(model):
    with pytest.raises(
        IllegalResidueError, match=r"p53.fasta:1: record 'p53': illegal residue at position 3"
    ):
        model.scan(Record("p53", "MK!L", "p53.fasta:1"), homologs="none")


def test_the_gb1_table_parses_and_scores(model):
    (wild,) = read_fasta(DATA / "gb1_wild_type.fasta")
    with open(DATA / "gb1_61.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        assert str(between(wild.sequence, row["sequence"])) == row["mutant"]
    plan = scores_plan(model, wild, [r["mutant"] for r in rows])
    sites = {tuple(m.position for m in parse(r["mutant"], wild.sequence).mutations) for r in rows} - {()}
    assert len(plan.queries) == len(sites) <= 15  # four sites vary
    values = plan.finish(model.run(plan.queries)).values
    assert values[0] == 0.0 and np.isfinite(values).all() and len(set(values.tolist())) > 50


def test_plans_of_many_requests_may_share_one_run(model):
    """What a server does: queries of several plans in one list, results dealt back."""
    first = scores_plan(model, WILD, ["A4G", "K8R"])
    second = scan_plan(model, WILD[:12])
    results = model.run([*first.queries, *second.queries])
    mixed = (
        first.finish(results[: len(first.queries)]).values,
        second.finish(results[len(first.queries) :]).values,
    )
    np.testing.assert_allclose(mixed[0], model.score(WILD, ["A4G", "K8R"], homologs="none"), atol=2e-5)
    np.testing.assert_allclose(mixed[1], model.scan(WILD[:12], homologs="none"), atol=2e-5)


def test_one_letter_proteins_can_be_scored(model):
    for strategy, letter in itertools.product(STRATEGIES, "MW"):
        assert np.isfinite(model.score(letter, [f"{letter}1A"], strategy=strategy, homologs="none")).all()


def test_variant_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("A4G", WILD).mutations = ()


def test_masked_marginals_equal_those_of_transformers_on_the_same_weights(model, tmp_path):
    """An independent reference from the tokenizer to the logits, one unpadded sequence a call."""
    from transformers import EsmForMaskedLM, EsmTokenizer

    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "hf", model.config, model.encoder.state_dict())
    reference_model = EsmForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = EsmTokenizer.from_pretrained(tmp_path / "hf")
    (wild,) = read_fasta(DATA / "gb1_wild_type.fasta")
    with open(DATA / "gb1_61.csv", newline="") as handle:
        texts = [row["mutant"] for row in csv.DictReader(handle)][1::6]
    want = []
    for text in texts:
        variant = parse(text, wild.sequence)
        tokens = tokenizer(wild.sequence, return_tensors="pt")["input_ids"]
        places = [m.position for m in variant.mutations]  # <cls> shifts by the one of one-based
        tokens[0, places] = tokenizer.mask_token_id
        with torch.no_grad():
            log_p = torch.log_softmax(reference_model(input_ids=tokens).logits[0].double(), -1)
        to_id = tokenizer.convert_tokens_to_ids
        want.append(
            sum(
                log_p[m.position, to_id(m.mutant)] - log_p[m.position, to_id(m.wild_type)]
                for m in variant.mutations
            )
        )
    assert np.std(want) > 1e-2
    np.testing.assert_allclose(model.score(wild, texts, homologs="none"), [float(w) for w in want], atol=5e-5)
