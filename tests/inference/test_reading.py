"""A backbone that reads homologs, through the predictor: random weights, made-up families, real searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.cli import main
from bioseq.errors import AlignmentError, BioseqError, ReferenceSetError, SpecError
from bioseq.heads.head import Head
from bioseq.homologs.alignment import write_a3m
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.homologs.profile import profile
from bioseq.homologs.reading import READING
from bioseq.homologs.reference import build_reference
from bioseq.inference.homologs import find_homologs
from bioseq.sequences.fasta import Record

pytestmark = pytest.mark.skipif(
    find_mmseqs() is None, reason="needs MMseqs2 (pip install 'bioseq[homologs]')"
)
LETTERS = list("LAGVSERTIDPKQNFYMHWC")
CONFIG = ModelConfig("reading", 2, 32, 4, 64, max_residues=150, reads_homologs=True, convolution=3)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOSEQ_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference set of four families, another set, a backbone's bundle, and queries in `queries.txt`: one of
    each family, a stranger, and one that is longer than the backbone's limit."""
    folder = tmp_path_factory.mktemp("reading")
    draw = np.random.default_rng(0)

    def relative(ancestor: np.ndarray) -> str:
        return "".join(
            np.where(draw.random(len(ancestor)) < 0.25, draw.choice(LETTERS, len(ancestor)), ancestor)
        )

    ancestors = [draw.choice(LETTERS, n) for n in (80, 100, 120, 200)]
    members = [Record(f"m{i}_{k}", relative(a)) for i, a in enumerate(ancestors) for k in range(4)]
    reference = build_reference(members, folder / "reference", name="families")
    build_reference(members[:3], folder / "other", name="other")
    queries = [relative(a) for a in ancestors[:3]] + [
        "".join(draw.choice(LETTERS, 90)),
        relative(ancestors[3]),
    ]
    (folder / "queries.txt").write_text("\n".join(queries))
    encoder = PackedEncoder(CONFIG)
    generator = torch.Generator().manual_seed(0)
    encoder.init_weights(generator)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    extra = {"homologs": {"reference": reference.hash, "name": "families"}}
    save_backbone(folder / "bundle", encoder, name="reading", card="a card", evidence={}, extra=extra)
    return folder


@pytest.fixture
def queries(place: Path) -> list[str]:
    return (place / "queries.txt").read_text().split()


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_results_do_not_depend_on_batch_mates_and_say_how_many_were_read(
    place: Path, queries, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path))  # where nothing was searched before
    model = bioseq.load(place / "bundle", homologs=place / "reference", threads=1)
    together = model.embed(queries, long_sequences="window", progress=True)
    assert "searching homologs: 100 % (5/5" in capsys.readouterr().err
    for i, query in enumerate(queries):
        alone = bioseq.load(place / "bundle", homologs=place / "reference", threads=1)
        assert relative_error(together[i], alone.embed([query], long_sequences="window")[0]) <= 1e-5
    prepared = [model.prepare(q, logits="all", long_sequences="window") for q in queries]
    assert [r.homologs for r in model.run(prepared)] == [4, 4, 4, 0, 4]


def test_homologs_change_what_has_them_and_nothing_else(place: Path, queries) -> None:
    with_them = bioseq.load(place / "bundle", homologs=place / "reference").logits(queries[:4])
    plain = bioseq.load(place / "bundle", homologs="none")
    without = plain.logits(queries[:4])
    assert min(relative_error(a, b) for a, b in zip(with_them[:3], without[:3])) > 0.05
    assert np.array_equal(with_them[3], without[3])
    assert plain.run([plain.prepare(queries[0], logits="all")])[0].homologs is None


def test_masked_residues_are_hidden_from_the_search(place: Path, queries) -> None:
    model = bioseq.load(place / "bundle", homologs=place / "reference")
    letters = list(queries[0])
    a, b = letters.copy(), letters.copy()
    a[30], b[30] = "<mask>", "<mask>"
    b[30 + 1] = "W" if letters[31] != "W" else "Y"  # a visible residue does count
    first, second = model.logits(["".join(a), "".join(b)])
    visible = model.logits([queries[0]])[0]
    assert relative_error(first, second) > 1e-4
    assert relative_error(first, visible) > 1e-4
    query = model.prepare("".join(a), logits="all")
    model.reader.read([query], model.alphabet)
    hidden = model.prepare("".join([*letters[:30], "X", *letters[31:]]), logits="all")
    model.reader.read([hidden], model.alphabet)
    assert np.array_equal(query.evidence, hidden.evidence)


def test_a_missing_or_another_reference_set_is_refused(place: Path) -> None:
    with pytest.raises(ReferenceSetError, match=r"reads homologs from 'families'.*'other' is another set"):
        bioseq.load(place / "bundle", homologs=place / "other")
    with pytest.raises(ReferenceSetError, match="does not exist"):
        bioseq.load(place / "bundle", homologs=place / "nowhere")
    with pytest.raises(SpecError, match="default does not read homologs"):
        bioseq.load("default", homologs=place / "reference")


def test_scores_of_a_reading_backbone_are_not_mixed_with_the_profile_again(place: Path, queries) -> None:
    model = bioseq.load(place / "bundle", homologs=place / "reference")
    changes = [f"{queries[0][0]}1{'W' if queries[0][0] != 'W' else 'Y'}"]
    own = model.score(queries[0], changes)
    plain = bioseq.load(place / "bundle", homologs="none")
    assert own != plain.score(queries[0], changes)
    assert model.score(queries[0], changes, homologs="none") == plain.score(queries[0], changes)
    found = find_homologs(model, queries[:1], place / "reference", auto="none", variants=True)
    assert found is not None
    assert plain.score(queries[0], changes, homologs=found[0]) == pytest.approx(own, abs=1e-5)


def test_a_call_may_leave_homologs_out(place: Path, queries) -> None:
    model = bioseq.load(place / "bundle", homologs=place / "reference", threads=1)
    plain = bioseq.load(place / "bundle", homologs="none", threads=1)
    assert np.array_equal(model.embed(queries[:2], homologs="none"), plain.embed(queries[:2]))
    assert np.array_equal(model.logits(queries[:1], homologs="none")[0], plain.logits(queries[:1])[0])
    assert relative_error(model.embed(queries[:2]), plain.embed(queries[:2])) > 1e-3
    # a named set is read in place of its own, by each sequence alone as among others
    few = [
        model.embed(queries[:2], homologs=place / "other"),
        plain.embed(queries[:1], homologs=place / "other"),
    ]
    assert relative_error(few[0][0], few[1][0]) <= 1e-5
    assert relative_error(few[0][0], model.embed(queries[:1])[0]) > 1e-3
    assert np.array_equal(few[0][1], plain.embed(queries[1:2])[0]), (
        "of its family there is nothing in that set"
    )
    with pytest.raises(ReferenceSetError, match="does not exist"):
        model.embed(queries[:1], homologs="elsewhere")
    with pytest.raises(SpecError, match="does not read homologs"):
        bioseq.load("default").embed(queries[:1], homologs=place / "other")


def test_a_scan_searches_its_wild_type_once(place: Path, queries, monkeypatch) -> None:
    model = bioseq.load(place / "bundle", homologs=place / "reference", threads=1)
    searched: list[list[str]] = []
    profiles = model.reader._door.profiles
    monkeypatch.setattr(
        model.reader._door, "profiles", lambda texts, **_: searched.append(texts) or profiles(texts)
    )
    table = model.scan(
        queries[4], long_sequences="window"
    )  # longer than the backbone's limit: contexts are windows
    assert [t for texts in searched for t in texts] == [queries[4]]
    changes = [f"{queries[4][p]}{p + 1}{'W' if queries[4][p] != 'W' else 'Y'}" for p in (0, 99, 199)]
    scores = model.score(queries[4], changes, long_sequences="window")
    standard = model.alphabet.standard
    scanned = [table[int(c[1:-1]) - 1, standard.index(c[-1])] for c in changes]
    assert np.allclose(scores, scanned, atol=1e-4)
    assert np.abs(table - model.scan(queries[4], homologs="none", long_sequences="window")).max() > 0.05


def test_an_alignment_of_another_query_is_refused(place: Path, queries, tmp_path: Path) -> None:
    model = bioseq.load(place / "bundle", homologs="none")
    alignment = tmp_path / "other.a3m"
    alignment.write_text(f">q\n{queries[1]}\n>m\n{queries[1]}\n")
    with pytest.raises(BioseqError, match=r"(?i)query|sequence"):
        model.score(
            queries[0], [f"{queries[0][0]}1{'W' if queries[0][0] != 'W' else 'Y'}"], alignment=alignment
        )


def test_an_alignment_is_read_in_place_of_a_search(
    place: Path, queries, tmp_path: Path, monkeypatch, capsys
) -> None:
    """By the backbone, and by a head that reads profiles; what nothing reads is refused."""
    model = bioseq.load(place / "bundle", homologs=place / "reference", threads=1)
    a3m, fasta = tmp_path / "mine.a3m", tmp_path / "q.fasta"
    (hits,) = bioseq.homologs(place / "reference", settings=READING, quiet=True).search(queries[:1])
    write_a3m(hits, a3m)
    want = model.embed(queries[:1])
    plain = bioseq.load(place / "bundle", homologs="none", threads=1)
    assert relative_error(plain.embed(queries[:1], alignment=a3m, homologs="auto"), want) <= 1e-5
    width = 21 + 21
    tensors = {
        "features.mean": torch.zeros(width), "features.scale": torch.ones(width), "ood.mean": torch.zeros(32),
        "ood.project": torch.eye(32)[:, :4].contiguous(), "ood.grid": torch.linspace(0, 3, 101),
        "conv.0.weight": torch.randn(3, width, 3, generator=torch.Generator().manual_seed(0)),
        "conv.0.bias": torch.zeros(3),
    }  # fmt: skip
    settings = {"blocks": ["profile"], "classes": ["H", "E", "C"], "reference": ""}
    head = Head("shape", "per_residue", ["H", "E", "C"], settings, tensors, {"temperature": 1.0})
    head.base_weights_hash = plain.weights_hash
    monkeypatch.setattr("bioseq.heads.searching.check_reference", lambda *_: None)
    monkeypatch.setattr("bioseq.heads.searching.find_profiles", lambda texts, **_: [profile(hits)])
    plain.load_head("shape", head)
    searched = plain.predict(queries[:1], ["shape"])[0]["shape"]
    monkeypatch.setattr("bioseq.heads.searching.find_profiles", None)
    (aligned,) = plain.predict(queries[:1], ["shape"], alignment=a3m)
    assert np.allclose(aligned["shape"]["probabilities"], searched["probabilities"], atol=1e-6)
    fasta.write_text(f">q\n{queries[0]}\n")
    call = ["embed", str(fasta), "--model", str(place / "bundle"), "--homologs", "auto"]
    monkeypatch.setattr("bioseq.homologs.reference.SHIPPED", place / "reference")
    assert main([*call, "--alignment", str(a3m), "-o", str(tmp_path / "e.npz")]) == 0
    assert relative_error(np.load(tmp_path / "e.npz")["embeddings"], want) <= 1e-5
    fasta.write_text(f">q\n{queries[0]}\n>other\n{queries[1]}\n")
    assert main([*call, "--alignment", str(a3m), "-o", str(tmp_path / "f.npz")]) == 1
    assert "2 sequences were given" in capsys.readouterr().err
    with pytest.raises(AlignmentError, match="none of its"):
        plain.embed(queries[1:2], alignment=a3m)
    with pytest.raises(SpecError, match="does not read homologs"):
        bioseq.load("default").embed(queries[:1], alignment=a3m)


def test_the_command_line_takes_the_set_or_none(place: Path, queries, tmp_path: Path, capsys) -> None:
    fasta = tmp_path / "q.fasta"
    fasta.write_text(f">q\n{queries[0]}\n")
    found = {}
    for name in (str(place / "reference"), "none"):
        out = tmp_path / f"{len(found)}.npz"
        assert (
            main(["embed", str(fasta), "--model", str(place / "bundle"), "--homologs", name, "-o", str(out)])
            == 0
        )
        found[name] = np.load(out)["embeddings"]
        own = bioseq.load(place / "bundle", homologs=name).embed(queries[:1])
        assert relative_error(found[name], own) <= 1e-5
    assert relative_error(*found.values()) > 1e-3
