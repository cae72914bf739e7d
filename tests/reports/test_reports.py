"""Reports: one file, nothing from elsewhere, nothing of what users supply becomes HTML."""

import re

import pytest

import bioseq
from bioseq.bundles.registry import Registry
from bioseq.cli import main
from bioseq.errors import BundleError
from bioseq.heads.report import head_report
from bioseq.reports.page import Picture, Section, page

EVIL = "<script>alert(1)</script>"
PROTEIN = "MKTLLLTLVVVTIVCLDLGYTRICFNHQSSQPQTTKTCSPGESSCYNKQWSDFRGTIIERGCGCPTVKPGIKLSCCESEVCNN"


def offline(text):
    """A whole page that asks for nothing."""
    assert text.startswith("<!doctype html>") and "<script" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    for tag in ("table", "details", "figure", "div", "tr"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>"), tag
    return text


def test_what_comes_in_is_text():
    picture = Picture(b"\x89PNG", EVIL, EVIL)
    section = Section(EVIL, [EVIL], [picture], [EVIL], [[EVIL, 1234, 0.123456, None]], fixed=EVIL)
    text = offline(page(EVIL, lead=EVIL, tiles=[(1234, EVIL)], sections=[section, Section("b", folded=True)]))
    assert text.count("&lt;script&gt;") == 11 and "1,234" in text and "0.1235" in text and "<details>" in text


def test_a_shipped_heads_report_says_what_its_evidence_says():
    bundle = Registry().resolve("localization")
    text, evidence = offline(head_report(bundle)), bundle.evidence()
    assert f"{evidence['metrics']['macro_auroc']:.3f} on rows that it did not train on" in text
    assert "labels of the homologs in the training data" in text and f"{evidence['rows']['train']:,}" in text
    assert "49% of the test sequences" in text and text.count("data:image/png") == 2
    assert all(label in text for label in bundle.manifest.labels) and len(text) < 5 << 20
    offline(head_report(Registry().resolve("secondary_structure")))
    with pytest.raises(BundleError, match="reports are of heads"):
        head_report(Registry().resolve("default"))


def test_the_command_writes_it_and_replaces_nothing_unasked(tmp_path, capsys):
    out = str(tmp_path / "r.html")
    assert main(["models", "report", "localization", "-o", out]) == 0
    offline((tmp_path / "r.html").read_text())
    assert main(["models", "report", "localization", "-o", out]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["models", "report", "localization", "-o", out, "--force"]) == 0


def test_a_scans_report_has_the_heat_map_and_a_line_a_residue(tmp_path):
    (tmp_path / "in.fasta").write_text(f">{EVIL.replace(' ', '_')}\n{PROTEIN}\n>two\nMKTAYIAK\n")
    words = [
        "scan",
        tmp_path / "in.fasta",
        "-o",
        tmp_path / "s.csv",
        "--no-picture",
        "--homologs",
        "none",
        "--report",
        tmp_path / "s.html",
    ]
    assert main([*map(str, words), "--strategy", "wt-marginals"]) == 0
    text = offline((tmp_path / "s.html").read_text())
    assert text.count("data:image/png") == 2 and text.count("<tr>") == len(PROTEIN) + 8 + 2
    scores = bioseq.load("default", threads=1).scan("MKTAYIAK", strategy="wt-marginals", homologs="none")
    best = "ACDEFGHIKLMNPQRSTVWY"[scores[3].argsort()[-1]]
    assert f"{best} {scores[3].max():.2f}" in text or best == "A"
    assert "No homologs were sought" in text and "&lt;script&gt;" in text
