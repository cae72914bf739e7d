"""Pretraining on nucleotides: either strand by the seed, exact resume, k-mer baselines, the card's words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from training_helpers import losses, same, weights

import bioseq
from bioseq.errors import CheckpointError, SpecError
from bioseq.sequences.alphabet import by_name, dna
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import open_corpus
from training.corpus.prepare import Prepare, prepare
from training.pretrain.batches import Batches
from training.pretrain.recipes import recipe
from training.pretrain.records.kmers import Kmers, kmer_baselines
from training.pretrain.run import run


def chain(count: int, seed: int, letters: str = "ACGT", length: int = 80) -> list[str]:
    """Sequences in which a letter mostly follows from the two before it."""
    rule = np.random.default_rng(99).dirichlet(np.full(4, 0.2), size=(4, 4)).cumsum(-1)
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        s = [0, 1]
        for u in draw.random(length):
            s.append(min(int(np.searchsorted(rule[s[-2], s[-1]], u)), 3))
        out.append("".join(letters[i] for i in s))
    return out


def made_corpus(folder: Path, alphabet: str, lines: list[str], valid: list[str]) -> str:
    (folder / "a.txt").write_text("\n".join(lines) + "\n")
    (folder / "v.txt").write_text("\n".join(valid) + "\n")
    plan = Prepare((str(folder / "a.txt"),), valid={"held": str(folder / "v.txt")}, alphabet=alphabet)
    prepare(plan, folder / "corpus", progress=False)
    return str(folder / "corpus")


@pytest.fixture
def spec(tmp_path):
    def make(alphabet: str = "dna", **settings) -> PretrainSpec:
        if not (tmp_path / "corpus").exists():
            letters = by_name(alphabet).standard
            made_corpus(tmp_path, alphabet, chain(200, 0, letters), chain(12, 1, letters))
        small = {
            "corpus": str(tmp_path / "corpus"), "output": str(tmp_path / "run"), "engine": "local", "steps": 20,
            "model.n_layers": 2, "model.d_model": 32, "model.n_heads": 2, "model.d_ff": 64, "precision": "float32",
            "crop": 60, "tokens_per_step": 512, "micro_tokens": 256, "schedule.warmup": 4, "schedule.decay": 5,
            "eval.every": 0, "checkpoint_every": 5, "checkpoint_minutes": 0, "log_every": 1, "workers.threads": 1,
            "trackers": [],
        }  # fmt: skip
        name = "dna_8m" if alphabet == "dna" else "rna_tiny"
        return recipe(name).override(small | {k.replace("__", "."): v for k, v in settings.items()})

    return make


def test_each_crop_is_read_on_either_strand_by_the_seed_alone(spec):
    both = spec(masking__mask=0.0, masking__random=0.0)  # chosen nucleotides stay as they are
    a, corpus = dna(), open_corpus(both.corpus)
    batches, again = Batches(both, corpus), Batches(both, open_corpus(both.corpus))
    turned = total = 0
    for step in range(6):
        items = batches.sampler.batch(step)
        crops = [
            corpus.residues(int(r), int(s), int(n))
            for r, s, n in zip(items.records, items.starts, items.lengths)
        ]
        seen = strands(batches, step)
        assert sorted(seen) == sorted(p for rank in (0, 1) for p in strands(again, step, rank, 2))
        forward = {c.tobytes() for c in crops}
        backward = {a.reverse_complement(c).tobytes() for c in crops}
        assert all(p in forward | backward for p in seen) and len(seen) == len(crops)
        turned += sum(p in backward for p in seen)
        total += len(seen)
    assert 0.3 < turned / total < 0.7
    plain = Batches(both.override({"reverse_complement": False}), corpus)
    items = plain.sampler.batch(0)
    expected = {
        corpus.residues(int(r), int(s), int(n)).tobytes()
        for r, s, n in zip(items.records, items.starts, items.lengths)
    }
    assert set(strands(plain, 0)) == expected


def strands(batches: Batches, step: int, rank: int = 0, world: int = 1) -> list[bytes]:
    """What each sequence of a step looks like, without <cls> and <eos>."""
    out = []
    for micro in batches.step(step, rank, world).micros:
        for begin, end in zip(micro.cu_seqlens[:-1].tolist(), micro.cu_seqlens[1:].tolist()):
            out.append(micro.tokens[begin + 1 : end - 1].numpy().astype(np.uint8).tobytes())
    return [one for one in out if one]


def test_the_targets_are_those_of_the_strand_that_is_shown(spec):
    both = spec()
    for micro in Batches(both, open_corpus(both.corpus)).step(3).micros:
        kept = micro.tokens[micro.places] == micro.targets
        masked = micro.tokens[micro.places] == dna().mask_id
        assert (masked | kept).float().mean() > 0.9  # the others were replaced at random


def test_a_run_on_both_strands_resumes_bit_equal_and_no_other_run_resumes_it(spec, tmp_path):
    whole = spec(output=str(tmp_path / "whole"), steps=12)
    run(whole, progress=False)
    part = whole.override(
        {"output": str(tmp_path / "part"), "steps": 7, "schedule.decay": 0, "schedule.warmup": 4}
    )
    whole = whole.override({"schedule.decay": 0, "output": str(tmp_path / "again")})
    run(whole, progress=False)
    run(part, progress=False)
    run(part.override({"steps": 12, "resume": True}), progress=False)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "part"))
    with pytest.raises(CheckpointError, match="reverse_complement"):
        run(part.override({"steps": 14, "resume": True, "reverse_complement": False}), progress=False)


@pytest.mark.parametrize("alphabet", ["dna", "rna"])
def test_a_run_ends_with_a_backbone_of_its_alphabet_and_a_card_of_nucleotides(spec, alphabet, tmp_path):
    run(spec(alphabet, steps=40, optimiser__lr=0.01), progress=False)
    folder = tmp_path / "run"
    seen = losses(folder)
    assert np.mean([seen[s] for s in range(36, 41)]) < np.mean([seen[s] for s in range(1, 6)])
    model = bioseq.load(folder / "best", threads=1)
    assert model.alphabet.name == alphabet
    letters = by_name(alphabet).standard
    assert model.embed([letters * 5]).shape == (1, 32)
    card = (folder / "card.md").read_text()
    assert "nucleotides" in card and "| set | sequences | nucleotides |" in card
    assert (
        "protein" not in card.replace("protein_", "") and "residue" not in card and "Swiss-Prot" not in card
    )
    assert ("either strand" in card) == (alphabet == "dna")
    evidence = json.loads((folder / "best" / "evidence.json").read_text())
    base = evidence["baselines"]
    best = min(base["kmers"][k]["held"] for k in base["kmers"])
    assert best < base["unigram"]["held"] < 4.2
    assert ("worse than counting k-mers" in card) == (evidence["perplexity"]["held"]["perplexity"] > best)


def test_a_protein_has_no_other_strand(spec):
    with pytest.raises(SpecError, match="a protein has no complementary strand") as fault:
        recipe("protein_tiny").override({"reverse_complement": True})
    assert fault.value.field == "reverse_complement"
    assert not recipe("rna_tiny").reverse_complement and recipe("dna_8m").reverse_complement
    assert recipe("rna_tiny").override({"reverse_complement": True}).reverse_complement  # double-stranded RNA


def test_kmers_find_the_order_of_a_chain_and_stay_there():
    a = dna()
    encode = lambda lines: [a.encode(s).ids for s in lines]  # noqa: E731
    train, held, test = encode(chain(300, 0)), encode(chain(20, 2)), encode(chain(40, 1))
    model = Kmers(a, train, held)
    found = model.perplexities(test)
    assert found[0] > found[1] > found[2] + 0.3, "the second letter before decides"
    assert max(found[2:]) < found[2] * 1.01, "higher orders are smoothed to what they can know"
    # Both sides know more than the left one; counted by hand for order 0.
    sides = Kmers(a, train, held, offsets=(-1, 1, -2, 2)).perplexities(test)
    assert sides[4] < found[2]
    share = np.bincount(np.concatenate(train), minlength=256)[a.standard_ids]
    share = share / share.sum()
    letters = np.concatenate(test)
    by_hand = math.exp(-np.mean(np.log(share[[a.standard.index(a.tokens[i]) for i in letters]])))
    assert found[0] == pytest.approx(by_hand, rel=1e-3)


def test_kmers_by_codon_place_know_what_depends_on_it():
    a, draw = dna(), np.random.default_rng(0)
    third = ["".join(draw.choice(list("ACGT"), 2)) + "A" for _ in range(6000)]
    lines = ["".join(third[i : i + 30]) for i in range(0, 6000, 30)]
    ids = [a.encode(s).ids for s in lines]
    plain = Kmers(a, ids[:150], ids[150:160], offsets=()).perplexities(ids[160:])[0]
    framed = Kmers(a, ids[:150], ids[150:160], offsets=(), phases=3).perplexities(ids[160:])[0]
    assert framed == pytest.approx(4 ** (2 / 3), rel=0.02) and plain > framed + 0.5


def test_unknown_letters_and_a_corpus_without_sets(tmp_path):
    corpus = open_corpus(made_corpus(tmp_path, "dna", chain(60, 0), ["ACGTNNRYACGT" * 4]))
    found = kmer_baselines(corpus, dna())
    assert math.isfinite(found["kmers"]["8"]["held"]) and set(found["kmers"]) == {str(k) for k in range(1, 9)}
    (tmp_path / "b.txt").write_text("\n".join(chain(20, 0)) + "\n")
    prepare(Prepare((str(tmp_path / "b.txt"),), alphabet="dna"), tmp_path / "bare", progress=False)
    assert kmer_baselines(open_corpus(tmp_path / "bare"), dna()) == {}
