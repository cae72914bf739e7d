"""Contacts against transformers; attributions against answers computed by hand."""

import csv
import json
import math

import numpy as np
import pytest

import bioseq
from bioseq.backbones import contacts as maps
from bioseq.backbones.importing import import_checkpoint
from bioseq.errors import BioseqError, ResourceError, SpecError
from bioseq.inference import interpretation

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "MKVLY", "ACDEFGHIKLMNPQRSTVWYBX" * 4]


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    import family_folders

    folder = tmp_path_factory.mktemp("esm2")
    family_folders.esm2(folder)
    return folder, transformers.EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_contacts_equal_transformers(esm2, tmp_path, family):
    import torch

    folder, theirs = esm2
    if family == "esm1b":  # learned positions; its limit here is 76 residues
        import family_folders
        import transformers

        folder = tmp_path / "esm1b"
        family_folders.esm1b(folder)
        theirs = transformers.EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    import_checkpoint(folder, tmp_path / "bundle", name="m")
    for source in (folder, tmp_path / "bundle"):
        model = bioseq.load(source, threads=1)
        texts = [s[:70] for s in SEQUENCES]
        for sequence, got in zip(texts, model.contacts(texts), strict=True):
            ids = torch.tensor([[0, *(model.alphabet.id(a) for a in sequence), 2]])
            with torch.no_grad():
                want = theirs.predict_contacts(ids, torch.ones_like(ids))[0].numpy()
            assert got.shape == (len(sequence), len(sequence)) and got.dtype == np.float32
            assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
            assert np.allclose(got, got.T, atol=1e-6) and (got >= 0).all() and (got <= 1).all()


def test_what_has_no_contacts_says_so(esm2, monkeypatch):
    with pytest.raises(BioseqError, match="protein_8m has no contact head"):
        bioseq.load("default", threads=1).contacts(["MKV"])
    model = bioseq.load(esm2[0], threads=1)
    monkeypatch.setattr(interpretation, "MOST_BYTES", maps.needed_bytes(model.encoder, 30))
    model.contacts(["M" * 30])
    with pytest.raises(ResourceError, match="sequence 2: the attention maps of 31 residues"):
        model.contacts(["MKV", "M" * 31])
    with pytest.raises(SpecError, match="not one string"):
        model.contacts("MKV")


def test_contacts_do_not_depend_on_the_other_sequences(esm2):
    model = bioseq.load(esm2[0], threads=1)
    for one, among in zip(SEQUENCES, model.contacts(SEQUENCES[::-1])[::-1], strict=True):
        assert np.abs(model.contacts([one])[0] - among).max() <= 1e-5


def test_the_stated_bytes_are_those_that_are_needed(esm2):
    import torch
    from torch.profiler import ProfilerActivity, profile

    model = bioseq.load(esm2[0], threads=1)
    tokens = torch.full((602,), 5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        maps.contact_map(model.encoder, tokens, model.contact_head)
    steps = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(steps, key=lambda e: e.start_ns())])
    stated = maps.needed_bytes(model.encoder, 600)
    # beside the maps: the logits, and states of 600 residues
    assert 0.9 * stated <= held.max() <= stated + 3 * 4 * 600**2


PROTEIN = "MKTLLLTLVVVTIVCLDLGYTRICFNHQSSQPQTTKTCSPGESSCYNKQWSDFRGTIIERGCGCPTVKPGIKLSCCESEVCNN"


@pytest.fixture(scope="module")
def model():
    return bioseq.load("default", threads=1)


def test_an_attribution_is_the_answer_less_the_answer_without_the_residue(model):
    found = model.attribute(PROTEIN, "localization", label="extracellular")
    assert (
        found.unit == "log-odds" and found.label == "extracellular" and found.values.shape == (len(PROTEIN),)
    )
    whole = model.predict([PROTEIN], ["localization"])[0]["localization"]["probabilities"]["extracellular"]
    assert found.answer == pytest.approx(math.log(whole / (1 - whole)), abs=1e-4)
    query = model.prepare(PROTEIN, heads=("localization",))
    one = interpretation.answers(
        model, [interpretation.masked(model, query, [7])], "localization", "extracellular"
    )
    assert found.values[7] == pytest.approx(found.answer - one[0], abs=1e-4)
    assert (query.ids != model.alphabet.mask_id).all(), "the query itself is left as it was"
    assert found.values.std() > 0


def test_the_default_label_is_the_most_probable(model):
    probabilities = model.predict([PROTEIN], ["localization"])[0]["localization"]["probabilities"]
    assert model.attribute(PROTEIN[:40], "localization").label in probabilities
    assert model.attribute(PROTEIN, "localization").label == max(probabilities, key=probabilities.get)


def test_wrong_use_is_told(model):
    with pytest.raises(SpecError, match="answers for each residue"):
        model.attribute(PROTEIN, "secondary_structure")
    with pytest.raises(SpecError, match="'moon' is not one of"):
        model.attribute(PROTEIN, "localization", label="moon")


def run(*words):
    from bioseq.cli import main

    return main([str(w) for w in words])


def test_the_commands_write_tables_and_pictures(esm2, tmp_path, capsys):
    (tmp_path / "in.fasta").write_text(f">one\n{SEQUENCES[0]}\n>two\n{SEQUENCES[1]}\n")
    assert (
        run(
            "contacts",
            tmp_path / "in.fasta",
            "--model",
            esm2[0],
            "-o",
            tmp_path / "c.csv",
            "--picture",
            tmp_path / "c.svg",
        )
        == 0
    )
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    want = bioseq.load(esm2[0], threads=1).contacts(SEQUENCES[:1])[0]
    mine = [r for r in rows if r["id"] == "one"]
    assert all(int(r["j"]) - int(r["i"]) >= 6 for r in rows)
    top = max(mine, key=lambda r: float(r["probability"]))
    assert float(top["probability"]) == pytest.approx(want[int(top["i"]) - 1, int(top["j"]) - 1], abs=1e-4)
    assert (tmp_path / "c-1.svg").read_text().startswith("<?xml") and (tmp_path / "c-2.svg").exists()
    assert run("contacts", tmp_path / "in.fasta", "--model", esm2[0], "-o", tmp_path / "c.npz") == 0
    with np.load(tmp_path / "c.npz") as kept:
        assert np.allclose(kept["1"], want, atol=1e-6)

    (tmp_path / "p.fasta").write_text(f">toxin\n{PROTEIN}\n")
    assert (
        run(
            "attribute",
            tmp_path / "p.fasta",
            "--head",
            "localization",
            "-o",
            tmp_path / "a.csv",
            "--picture",
            tmp_path / "a.svg",
        )
        == 0
    )
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert "".join(r["residue"] for r in rows) == PROTEIN and {r["id"] for r in rows} == {"toxin"}
    assert [int(r["position"]) for r in rows] == list(range(1, len(PROTEIN) + 1))
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert run("attribute", tmp_path / "p.fasta", "--head", "localization", "-o", tmp_path / "a.csv") == 1
    assert "exists" in capsys.readouterr().err
    assert json.dumps(rows)
