"""`bioseq score` and `bioseq scan`: tables, pictures, bad input, nothing half-written."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.cli import main
from bioseq.commands.heatmap import draw_scan
from bioseq.inference.loading import load
from bioseq.ranking import spearman

DATA = Path(__file__).parent.parent / "data"
GB1 = str(DATA / "gb1_wild_type.fasta")
TABLE = str(DATA / "gb1_61.csv")
WILD = "MKTAYIAKQRQ"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_backbone(path, encoder, name="tiny", card="A test model with random weights.", evidence={})
    return str(path)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def run(*argv: object) -> int:
    """The model alone, unless a test asks for homologs."""
    words = [str(a) for a in argv]
    return main(words if "--homologs" in words or "--help" in words else [*words, "--homologs", "none"])


# ------------------------------------------------------------------------------------------------------ score


def test_literal_variants_to_standard_output(model, capsys):
    assert run("score", "--model", model, "--wild-type", WILD, "t3s", "A4G:Y5F", "WT", "-o", "-") == 0
    printed = capsys.readouterr()
    table = list(csv.DictReader(io.StringIO(printed.out)))
    assert [r["mutant"] for r in table] == ["T3S", "A4G:Y5F", "WT"]
    want = load(model).score(WILD, ["T3S", "A4G:Y5F", "WT"], homologs="none")
    np.testing.assert_allclose([float(r["score"]) for r in table], want, atol=1e-4)
    assert want[0] != 0 and want[2] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_variants(model, tmp_path, packed):
    text = b"# chosen by hand\nT3S\n\nA4G:Y5F  # a double\n"
    path = tmp_path / "mutants.txt"
    path.write_bytes(gzip.compress(text) if packed else text)
    out = tmp_path / "deep" / "scores.csv"
    assert run("score", "--model", model, "--wild-type", WILD, path, "K2R", "-o", out) == 0
    assert [r["mutant"] for r in rows(out)] == ["T3S", "A4G:Y5F", "K2R"]


def test_variants_on_standard_input(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"T3S\n")))
    out = tmp_path / "scores.csv"
    assert run("score", "--model", model, "--wild-type", WILD, "-", "-o", out) == 0
    assert [r["mutant"] for r in rows(out)] == ["T3S"]


def test_an_assay_table_gets_its_spearman(model, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    call = ("score", "--model", model, "--wild-type", GB1, TABLE, "--measured", "target", "-o", out)
    assert run(*call) == 0
    table = rows(out)
    assert len(table) == 61
    assert [r["target"] for r in table[:2]] == ["1", "1.64547"]
    rho = spearman(
        np.array([float(r["target"]) for r in table]), np.array([float(r["score"]) for r in table])
    )
    assert f"Spearman of score and target: {rho:.3f}"[:-1] in capsys.readouterr().err


def test_whole_sequences_say_the_same_as_notation(model, tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert run("score", "--model", model, "--wild-type", GB1, TABLE, "-o", one) == 0
    assert run("score", "--model", model, "--wild-type", GB1, TABLE, "--column", "sequence", "-o", two) == 0
    assert one.read_text() == two.read_text()


def test_unmeasured_rows_are_left_out_of_the_correlation(model, tmp_path, capsys):
    table = tmp_path / "t.tsv"
    table.write_text("mutant\tfitness\nT3S\t0.5\nA4G\t\nK2R\t0.9\n")
    out = tmp_path / "s.csv"
    assert run("score", "--model", model, "--wild-type", WILD, table, "--measured", "fitness", "-o", out) == 0
    assert "2 variants; 1 without a measurement left out" in capsys.readouterr().err
    assert rows(out)[1]["fitness"] == ""


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("m.txt", "T3S\nA5G\n", (), "m.txt:2: A5G: the wild type has Y at position 5, not A"),
        ("m.txt", "\n# nothing\n", (), "no variant to score"),
        ("m.txt", b"\xff\xfe\x00T", (), "not UTF-8 text"),
        ("m.txt", gzip.compress(b"T3S\n" * 99, mtime=0)[:20], (), "breaks off"),
        ("m.csv", "mutant,fitness\nT3S,1\nA5G,2\n", (), "row 2: A5G: the wild type has Y"),
        (
            "m.csv",
            "mutant,fitness\nT3S,high\nA4G,2\n",
            ("--measured", "fitness"),
            "not numbers (row 1; 1 in all)",
        ),
        ("m.csv", "name,fitness\nT3S,1\n", (), "no column 'mutant'"),
        ("m.csv", "mutant,fitness\nT3S,1\n", ("--measured", "activity"), "no column 'activity'"),
        ("m.csv", "sequence\nMKTAY\n", (), "row 1: 5 residues, but the wild type has 11"),
        ("m.csv", "", (), "no column"),
        ("m.txt", "T3S\n", ("--measured", "fitness"), "not a .csv or .tsv table"),
    ],
)
def test_bad_variant_files_exit_1_and_write_nothing(tmp_path, capsys, name, content, options, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out" / "scores.csv"
    assert run("score", "--model", "nowhere", "--wild-type", WILD, path, "-o", out, *options) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert WILD not in printed.err and printed.out == ""
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("mutant", "words"),
    [("A5G", "has Y at position 5"), ("nothing.txt", "cannot be read"), ("A99G", "outside"), (".", "folder")],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, mutant, words):
    monkeypatch.chdir(tmp_path)
    assert run("score", "--model", "nowhere", "--wild-type", WILD, mutant, "-o", "s.csv") == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_wild_types(model, tmp_path, capsys):
    out = tmp_path / "s.csv"
    several = str(DATA / "valid_orphan_25.fasta")
    for given, words in [
        (several, "this file has more"),
        (str(tmp_path / "no.fasta"), "No such file"),
        ("MK#L", "No such file"),
        ("MKJJ1", "No such file"),
    ]:
        assert run("score", "--model", model, "--wild-type", given, "M1A", "-o", out) == 1
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_outputs_are_not_replaced_unasked(model, tmp_path, capsys):
    out = tmp_path / "s.csv"
    out.write_text("mine")
    assert run("score", "--model", model, "--wild-type", WILD, "T3S", "-o", out) == 1
    assert "exists already" in capsys.readouterr().err and out.read_text() == "mine"
    assert run("score", "--model", model, "--wild-type", WILD, "T3S", "-o", out, "--force") == 0
    assert out.read_text().startswith("mutant,score\n")


def test_wrong_use_exits_2(capsys):
    for argv in (
        ["score", "T3S"],
        ["scan"],
        ["score", "T3S", "--wild-type", WILD, "-o", "-", "--strategy", "magic"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        assert "-h" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- scan


def test_scan_writes_table_and_picture(model, tmp_path, capsys):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(f">p1 $x^2$ <b>\n{WILD.lower()}*\n")
    out = tmp_path / "scan.csv"
    assert run("scan", fasta, "--model", model, "-o", out) == 0
    table = rows(out)
    assert len(table) == len(WILD) * 19
    assert {r["id"] for r in table} == {"p1"}
    assert all(r["wild_type"] == WILD[int(r["position"]) - 1] != r["mutant"] for r in table)
    scores = load(model).scan(WILD, homologs="none")
    for r in table[::17]:
        cell = scores[int(r["position"]) - 1, "ACDEFGHIKLMNPQRSTVWY".index(r["mutant"])]
        assert float(r["score"]) == pytest.approx(cell, abs=1e-4)
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    assert "stop codon" in capsys.readouterr().err


def test_several_records_are_numbered_never_named(model, tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">../../evil\nMKTA\n>../../evil\nMKV\n")
    out = tmp_path / "out" / "scan.csv"
    picture = tmp_path / "out" / "map.svg"
    assert (
        run("scan", fasta, "--model", model, "--strategy", "wt-marginals", "-o", out, "--picture", picture)
        == 0
    )
    assert sorted(p.name for p in out.parent.iterdir()) == ["map-1.svg", "map-2.svg", "scan.csv"]
    assert [r["id"] for r in rows(out)] == ["../../evil"] * 19 * 7


def test_a_picture_marks_how_deep_each_column_is(tmp_path, monkeypatch):
    """A strip under the letters, and only with homologs."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    depth = np.array([0.0, 1.0, 500.0, 2.0])
    for given in (None, depth):
        scores = np.zeros((4, 20))
        draw_scan(tmp_path / "p.png", scores, "ACDE", letters="ACDEFGHIKLMNPQRSTVWY", title="t", depth=given)
    without, strip = (figure.axes[0] for figure in drawn)
    assert len(without.images) == 1 and len(strip.images) == 2
    np.testing.assert_array_equal(strip.images[1].get_array(), depth[None])
    shades = strip.images[1].to_rgba(depth)[:, 0]
    assert shades[0] > shades[1] > shades[3] > shades[2], "deeper is darker"
    assert strip.get_yticklabels()[-1].get_text() == "homologs"


def test_scan_to_standard_output_draws_nothing(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nMK\n")))
    assert run("scan", "-", "--model", model, "-o", "-") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 19
    assert list(tmp_path.iterdir()) == []


def test_a_bad_record_after_good_ones_leaves_nothing(model, tmp_path, capsys):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKT\n>b\nMK1T\n")
    assert run("scan", fasta, "--model", model, "-o", tmp_path / "out" / "scan.csv") == 1
    message = capsys.readouterr().err
    assert f"{fasta}:3: record 'b': illegal residue at position 3" in message
    assert not any((tmp_path / "out").glob("*")) and not any((tmp_path / "out").glob(".*"))


def test_a_picture_that_cannot_be_drawn_leaves_no_table(model, tmp_path, monkeypatch, capsys):
    import bioseq.commands.heatmap

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bioseq.commands.heatmap, "draw_scan", full)
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKT\n")
    out = tmp_path / "out"
    assert run("scan", fasta, "--model", model, "-o", out / "scan.csv") == 1
    assert "No space left" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_bad_picture_names(model, tmp_path, capsys):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKT\n")
    assert (
        run("scan", fasta, "--model", model, "-o", tmp_path / "s.csv", "--picture", tmp_path / "p.bmp") == 1
    )
    assert "Use .png" in capsys.readouterr().err
    (tmp_path / "s.png").write_text("mine")
    assert run("scan", fasta, "--model", model, "-o", tmp_path / "s.csv") == 1
    assert "s.png exists already" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()
    assert run("scan", fasta, "--model", model, "-o", tmp_path / "s.csv", "--no-picture") == 0


def test_long_sequences_are_refused_or_windowed(model, tmp_path, capsys):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\n" + "MKTAYIAKQR" * 103 + "\n")
    out = tmp_path / "s.csv"
    base = ("scan", fasta, "--model", model, "--strategy", "wt-marginals", "-o", out, "--no-picture")
    assert run(*base) == 1
    assert "1030 residues; the limit is 1022" in capsys.readouterr().err
    assert run(*base, "--long-sequences", "window") == 0
    assert "2 windows of 1022" in capsys.readouterr().err
    assert len(rows(out)) == 1030 * 19


# ------------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("length", [1, 37, 250, 1100])
def test_heat_maps_of_all_lengths_hold_colour(tmp_path, length):
    from matplotlib.image import imread

    rng = np.random.default_rng(0)
    letters = "ACDEFGHIKLMNPQRSTVWY"
    sequence = "".join(rng.choice(list(letters + "X"), length))
    scores = -np.abs(rng.normal(size=(length, 20))).astype(np.float32)
    scores[0, 0] = np.nan
    draw_scan(tmp_path / "a.png", scores, sequence, letters=letters, title="a")
    image = imread(tmp_path / "a.png")[..., :3]
    red = (image[..., 0] > image[..., 2] + 0.3).mean()
    blue = (image[..., 2] > image[..., 0] + 0.3).mean()
    # All scores are negative: the map is red, and the blue of the colour bar alone is little.
    assert red > 0.05 and blue < red / 2
