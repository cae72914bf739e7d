from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_helpers import proteins

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import InputError
from bioseq.sequences.alphabet import protein
from training.corpus.draws import PASSES, chosen
from training.pretrain.evaluate import cut, perplexity, subset
from training.pretrain.initial import initialise
from training.pretrain.records.ngram import Trigram, baselines, unigram

A = protein()


@pytest.fixture
def encoder() -> PackedEncoder:
    made = PackedEncoder(ModelConfig("t", 2, 32, 4, 64))
    made.init_weights(torch.Generator().manual_seed(0), std=0.3)
    return made.eval()


def test_every_residue_is_chosen_in_exactly_one_pass_and_it_depends_on_the_seed():
    ids = A.encode(proteins(1, 0)[0]).ids
    places = chosen(ids, 0)
    assert len(places) == PASSES and sorted(np.concatenate(places).tolist()) == list(range(len(ids)))
    assert max(map(len, places)) - min(map(len, places)) <= 1
    assert any(not np.array_equal(a, b) for a, b in zip(places, chosen(ids, 1)))


def test_all_chosen_residues_are_masked_and_nothing_else(encoder, monkeypatch):
    seen = []
    forward = PackedEncoder.forward

    def spy(self, tokens, cu, longest, **kw):
        seen.extend(tokens[a + 1 : b - 1].clone() for a, b in zip(cu.tolist(), cu.tolist()[1:]))
        return forward(self, tokens, cu, longest, **kw)

    monkeypatch.setattr(PackedEncoder, "forward", spy)
    ids = A.encode("MKVLAAGWERTYPLKIHGFDSACQNT").ids
    perplexity(encoder, [ids])
    masks = torch.stack([row == A.mask_id for row in seen])
    assert len(seen) == PASSES and (masks.sum(0) == 1).all()
    for row, masked in zip(seen, masks):
        assert torch.equal(row[~masked], torch.from_numpy(ids.astype(np.int64))[~masked])


def test_it_equals_a_plain_computation_one_pass_and_protein_at_a_time(encoder):
    sequences = proteins(5, 4)
    got = perplexity(encoder, sequences, seed=3)
    total = count = 0.0
    for sequence in sequences:
        ids = torch.from_numpy(A.encode(sequence).ids.astype(np.int64))
        for places in chosen(ids.numpy().astype(np.uint8), 3):
            masked = ids.clone()
            masked[places] = A.mask_id
            row = torch.cat((torch.tensor([0]), masked, torch.tensor([2])))
            with torch.no_grad():
                logits = encoder.logits(
                    encoder(row, torch.tensor([0, len(row)], dtype=torch.int32), len(row))
                )
            logp = logits.double().log_softmax(-1)[1:-1]
            total -= float(logp[places, ids[places]].sum())
            count += len(places)
    assert got["residues"] == count == sum(map(len, sequences))
    assert got["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_batching_place_in_the_list_and_subsets_change_no_choice(encoder):
    sequences = proteins(9, 5)
    a = perplexity(encoder, sequences, budget=100)
    b = perplexity(encoder, sequences[::-1], budget=5000)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert perplexity(encoder, sequences, proteins=3)["proteins"] == 3
    assert subset(9, 3).tolist() == [0, 3, 6] and len(subset(9, 0)) == 9
    one = perplexity(encoder, sequences, passes=1)
    assert one["residues"] == sum(math.ceil(len(s) / PASSES) for s in sequences)


def test_a_model_that_knows_nothing_scores_the_vocabulary():
    flat = PackedEncoder(ModelConfig("t", 1, 16, 2, 16))
    with torch.no_grad():
        flat.embed_tokens.weight.zero_()
    assert perplexity(flat, proteins(2, 0))["perplexity"] == pytest.approx(33.0, rel=1e-5)


def test_long_proteins_are_cut_into_equal_windows(encoder):
    small = PackedEncoder(ModelConfig("t", 1, 16, 2, 16, max_residues=40))
    small.init_weights(torch.Generator().manual_seed(0))
    assert [len(w) for w in cut(np.zeros(100), 40)] == [34, 33, 33]
    assert perplexity(small, ["ACDEFGHIKL" * 10])["residues"] == 100
    with pytest.raises(InputError):
        perplexity(small, [])


def test_a_new_run_begins_at_the_unigram(corpus):
    encoder = PackedEncoder(ModelConfig("t", 2, 32, 4, 64))
    initialise(encoder, kind="local", std=0.001, seed=0, frequencies=corpus.frequencies())
    members = corpus.sets()["held"]
    assert perplexity(encoder, members)["perplexity"] == pytest.approx(unigram(corpus, members), rel=0.01)


def test_local_heads_look_at_their_neighbour():
    from bioseq.backbones.packed import encoder as module

    made = PackedEncoder(ModelConfig("t", 2, 64, 4, 64))
    initialise(made, kind="local", std=1e-6, seed=0, frequencies=np.full(33, 1 / 33))
    seen = {}
    original = module.attend

    def spy(q, k, v, cu, longest):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        seen.setdefault("weights", scores.softmax(-1))
        return original(q, k, v, cu, longest)

    module.attend = spy
    try:
        tokens = torch.tensor([0, *range(4, 24), 2])
        made(tokens, torch.tensor([0, 22], dtype=torch.int32), 22)
    finally:
        module.attend = original
    middle = seen["weights"][:, 10]
    assert middle[0].argmax() == 9 and middle[1].argmax() == 11  # the residue before, the one after
    assert middle[3].max() < 0.06  # a free head looks everywhere


def test_the_trigram_sums_to_one_and_finds_what_is_there(corpus):
    model = Trigram(corpus, vocabulary=33)
    assert model.weights.sum() == pytest.approx(1.0)
    letters = np.arange(33)
    mixed = model._parts([np.array([5, 6, x], dtype=np.uint8) for x in letters])[2::3] @ model.weights
    assert mixed.sum() == pytest.approx(1.0, abs=0.02)
    made = baselines(corpus, vocabulary=33)
    # Random sequences hold nothing to be learned from neighbours.
    assert made["trigram"]["held"] == pytest.approx(made["unigram"]["held"], rel=0.05)


def test_the_trigram_beats_the_unigram_where_order_matters(tmp_path):
    from training.corpus.corpus import open_corpus
    from training.corpus.prepare import Prepare, prepare

    draw = np.random.default_rng(0)
    words = ["ACD", "EFG", "HIK"]
    lines = ["".join(draw.choice(words, size=15)) for _ in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:280]))
    (tmp_path / "v.txt").write_text("\n".join(lines[280:]))
    prepare(
        Prepare(sources=(str(tmp_path / "a.txt"),), valid={"v": str(tmp_path / "v.txt")}),
        tmp_path / "c",
        progress=False,
    )
    made = baselines(open_corpus(tmp_path / "c"), vocabulary=33)
    # Two of three letters follow from the one before; the third is one of three: 3 ** (1 / 3) = 1.44.
    assert made["unigram"]["v"] == pytest.approx(9.0, rel=0.02)
    assert made["trigram"]["v"] == pytest.approx(3 ** (1 / 3), rel=0.1)
