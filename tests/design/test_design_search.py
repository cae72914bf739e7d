"""Designs satisfy what was asked, are better than chance, repeat, go on after a kill, and refuse bad input."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.campaigns.campaign import Campaign, Settings
from bioseq.campaigns.ingest import ingest
from bioseq.cli import main
from bioseq.design.constraints import encode, read_constraints
from bioseq.design.evolve import Scored, diverse, evolve, generation, weights
from bioseq.design.run import run
from bioseq.design.scoring import Scorer, ZeroShot
from bioseq.errors import BioseqError, ExpressionError, InputError, SpecError, TableError
from bioseq.sequences.mutations import apply, parse
from bioseq.specs.design import DesignSpec

WILD = "MKTAYIAKQRQISFVKSHFSRQNLT"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    save_backbone(folder, encoder, name="tiny", card="# tiny\n", evidence={}, licence="CC0-1.0")
    return str(folder)


@pytest.fixture
def quick(bundle: str) -> dict[str, Any]:
    return {"model": bundle, "homologs": "none", "number": 6, "generations": 4, "batch": 30, "threads": 1}


def constraints(tmp_path: Path, text: str) -> str:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    return str(path)


def search(table: np.ndarray, seed: int, generations: int = 8) -> Scored:
    c = read_constraints(WILD, None)
    c.most = 4
    scorer = Scorer([ZeroShot(table, c.wild)], "zero_shot", None, (), 1.0, c.wild)
    found = evolve(
        generations, 40, seed, weights(np.zeros((len(WILD), 20)), c, 1.0), c, scorer, lambda n, make: make()
    )
    assert found is not None
    return found


def test_the_search_climbs_where_random_mutations_do_not() -> None:
    """Uniform proposals: what is found is the search's own."""
    table = np.random.default_rng(1).normal(size=(len(WILD), 20))
    best = np.sort(table.max(1))[-4:].sum()  # the highest possible with four mutations
    found = search(table, 0, generations=20)
    c = read_constraints(WILD, None)
    drawn = [generation(0, seed, 40, None, weights(np.zeros_like(table), c, 1.0), c) for seed in range(20)]
    by_chance = ZeroShot(table, c.wild).columns(np.concatenate(drawn))["zero_shot"][0].max()
    assert found.scores.bound.max() > 0.8 * best > by_chance
    assert len({row.tobytes() for row in found.codes}) == len(found.codes)


def test_designs_satisfy_every_constraint(quick: dict[str, Any], tmp_path: Path) -> None:
    training = tmp_path / "measured.csv"
    training.write_text("variant\nK2A:T3S\nQ9A\n")
    path = constraints(
        tmp_path,
        """
fixed = [1, "5-7"]
only = ["1-15", 23, 25]
allowed = {9 = "AY"}
forbidden = {"*" = "CP", 2 = "R"}
mutations = [2, 4]
keep = ["QISF"]
avoid = ["NL[ST]"]
training = "measured.csv"
from_training = [1, 3]
""",
    )
    rows = bioseq.design(WILD, constraints=path, **quick)
    assert len(rows) == 6
    measured = [apply(WILD, parse(v, WILD)) for v in ("K2A:T3S", "Q9A")]
    seen = []
    for row in rows:
        text = row["sequence"]
        assert apply(WILD, parse(row["variant"], WILD)) == text
        changed = [i + 1 for i, (a, b) in enumerate(zip(WILD, text)) if a != b]
        assert 2 <= len(changed) <= 4 and row["mutations"] == len(changed)
        assert set(changed) <= {*range(1, 16), 23, 25} - {1, 5, 6, 7}
        assert text[8] in "QAY" and "QISF" in text and "NLT" not in text and "NLS" not in text
        assert not any(text[i - 1] in "CP" for i in changed) and not (2 in changed and text[1] == "R")
        nearest = min(sum(a != b for a, b in zip(text, m)) for m in measured)
        assert 1 <= nearest <= 3 and row["from_training"] == nearest
        assert all(sum(a != b for a, b in zip(text, s)) >= 2 for s in seen)
        seen.append(text)
    assert [r["bound"] for r in rows] == sorted((r["bound"] for r in rows), reverse=True)


def test_a_run_repeats_to_the_byte_and_another_seed_differs(quick: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(DesignSpec(wild_type=WILD, seed=seed, **quick), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no working folder is left


@pytest.mark.parametrize("method", ["evolve", "gibbs"])
def test_a_killed_process_goes_on_to_the_same_bytes(bundle: str, tmp_path: Path, method: str) -> None:
    """It is killed when its first part is there, whatever it does then."""
    out, whole = tmp_path / "designs.csv", tmp_path / "whole.csv"
    more = ["--generations", "60", "--batch", "20"] if method == "evolve" else ["--steps", "30"]
    base = [
        "design", "--wild-type", WILD, "--model", bundle, "--homologs", "none", "--number", "90", "--distance", "1",
        "--method", method, "--threads", "1", *more,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(bioseq.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-m", "bioseq", *base, "-o", str(out)], stderr=subprocess.DEVNULL, env=env
    ) as process:
        work = tmp_path / "designs.csv.work"
        while process.poll() is None and not list(work.glob("[gc]*.npz")):
            pass
        process.send_signal(signal.SIGKILL)
    if not out.exists():  # the machine may be so slow that the process had ended
        assert work.is_dir()
        parts = {p.name: p.read_bytes() for p in work.glob("*.npz")}
        assert main([*base[:-1], "7", "-o", str(out)]) == 1  # other options do not go on with it
        assert {p.name: p.read_bytes() for p in work.glob("*.npz")} == parts and not out.exists()
        assert main([*base, "-o", str(out)]) == 0
    assert main([*base, "-o", str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes() and not work.exists()


def test_what_is_kept_is_not_computed_again() -> None:
    c = read_constraints(WILD, None)
    scorer = Scorer([ZeroShot(np.zeros((len(WILD), 20)), c.wild)], "zero_shot", None, (), 1.0, c.wild)
    weight = weights(np.zeros((len(WILD), 20)), c, 1.0)
    kept: dict[int, Scored] = {}
    made: list[int] = []

    def keep(number: int, make: Any) -> Scored:
        if number not in kept:
            made.append(number)
            kept[number] = make()
        return kept[number]

    first = evolve(3, 10, 0, weight, c, scorer, keep)
    again = evolve(5, 10, 0, weight, c, scorer, keep)
    assert made == [0, 1, 2, 3, 4] and first is not None and again is not None
    np.testing.assert_array_equal(again.codes[: len(first.codes)], first.codes)


def test_a_lower_bound_prefers_the_certain_one_on_both_sides() -> None:
    c = read_constraints(WILD, None)

    class Unsure:
        def columns(self, codes: np.ndarray) -> Any:
            n = len(codes)
            return {"a": (np.ones(n), np.arange(n, dtype=float)), "b": (np.zeros(n), np.zeros(n))}

    codes = np.tile(c.wild, (3, 1))
    up = Scorer([Unsure()], "a", None, (), 1.0, c.wild).score(codes)
    np.testing.assert_allclose(up.bound, [1, 0, -1], atol=1e-6)
    down = Scorer([Unsure()], "b - a", None, (), 1.0, c.wild).score(codes)
    np.testing.assert_allclose(down.bound, [-1, -2, -3], atol=1e-6)
    mean = Scorer([Unsure()], "a", None, (), 0.0, c.wild).score(codes)
    np.testing.assert_allclose(mean.bound, 1, atol=1e-6)
    kept = Scorer([Unsure()], "a", "a > 0.5", (), 0.0, c.wild).score(codes)
    assert np.isfinite(kept.bound).tolist() == [True, False, False]
    undefined = Scorer([Unsure()], "1 / b", None, (), 0.0, c.wild).score(codes)
    assert not np.isfinite(undefined.bound).any()


def test_diverse_designs_leave_out_neighbours_and_known_ones() -> None:
    c = read_constraints(WILD, None)
    texts = ["A" + WILD[1:], "AA" + WILD[2:], "CC" + WILD[2:], WILD[:-2] + "AA"]
    codes = np.array([encode(t) for t in texts])
    scorer = Scorer([ZeroShot(np.zeros((len(WILD), 20)), c.wild)], "0 - mutations", None, (), 1.0, c.wild)
    found = Scored.of(codes, c, scorer)
    assert diverse(found, 9, 2, codes[:0]) == [0, 2, 3]
    assert diverse(found, 9, 2, codes[:1]) == [1, 2, 3]
    assert diverse(found, 1, 2, codes[:0]) == [0]


def test_a_campaign_scores_its_sites_and_measured_variants_are_no_designs(tmp_path: Path) -> None:
    settings = Settings(wild_type=WILD, objectives=("activity",), mutations=3, sites=tuple(range(2, 12)))
    rng = np.random.default_rng(0)
    campaign = Campaign.create(tmp_path / "c", settings, prior=rng.normal(size=(len(WILD), 20)))
    with pytest.raises(InputError, match="0 measured variants"):
        bioseq.design(WILD, "campaign.activity", campaign=str(tmp_path / "c"))
    letters = "ACDEFGHIKL"
    lines = ["variant,activity"]
    for i, new in enumerate(letters * 4):
        place = 2 + i % 10
        other = letters[(i * 7 + 3) % 10]
        old, two = WILD[place - 1], 2 + (i + 3) % 10
        if new == old or other == WILD[two - 1] or place >= two:
            continue
        lines.append(f"{old}{place}{new}:{WILD[two - 1]}{two}{other},{ord(new) + ord(other)}")
    ingest(campaign, ("\n".join(dict.fromkeys(lines)) + "\n").encode())
    given = {"campaign": str(tmp_path / "c"), "number": 10, "generations": 6, "batch": 40}
    rows = bioseq.design(WILD, "activity", **given)  # needs no model: the campaign has the scores
    measured = {line.split(",")[0] for line in lines[1:]}
    assert len(rows) == 10 and not measured & {r["variant"] for r in rows}
    assert all(r["sd"] > 0 and r["bound"] < r["objective"] for r in rows)
    places = {m.position for r in rows for m in parse(r["variant"], WILD).changes}
    assert places <= set(range(2, 12))
    with pytest.raises(InputError, match="another wild type"):
        bioseq.design(WILD[:-1], "activity", **given)


def test_gibbs_draws_a_library_that_temperature_widens(quick: dict[str, Any], tmp_path: Path) -> None:
    path = constraints(tmp_path, 'fixed = [1]\nmutations = [1, 6]\nforbidden = {"*" = "C"}\n')
    given = quick | {"method": "gibbs", "constraints": path, "distance": 1, "number": 20, "steps": 12}
    cold = bioseq.design(WILD, temperature=0.05, **given)
    warm = bioseq.design(WILD, temperature=5.0, **given)
    for row in warm:
        assert row["sequence"][0] == "M" and 1 <= row["mutations"] <= 6
        assert not any(m.mutant == "C" for m in parse(row["variant"], WILD).changes)
    assert len({r["sequence"] for r in warm}) == len(warm) == 20
    both = [np.mean([r["zero_shot"] for r in rows]) for rows in (cold, warm)]
    assert both[0] > both[1]


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("fixed = [99]", SpecError, "site 99 is outside"),
        ('only = ["20-30"]', SpecError, "site 30 is outside"),
        ("fixed = [0]", SpecError, "site 0 is outside"),
        ("fixes = [1]", SpecError, "unknown constraint"),
        ("fixed = [1,,2]", SpecError, "line 1, column"),
        ('allowed = {3 = "B"}', SpecError, "residues at 3"),
        ("mutations = [5, 2]", SpecError, "fewest and the most"),
        ("mutations = [true, 2]", SpecError, "fewest and the most"),
        ('fixed = ["1-25"]', InputError, "no design is left"),
        ("only = [3]\nmutations = [2, 4]", InputError, "no design is left"),
        ('keep = ["WWW"]', SpecError, "does not have"),
        ('avoid = ["N(P"]', SpecError, "not a motif"),
        ("length = [100, 200]", SpecError, "wild type has 25"),
        ('training = "absent.csv"\nfrom_training = [1, 2]', SpecError, "is not there"),
        ('training = "bad.csv"\nfrom_training = [1, 2]', TableError, "line 3, column 'variant'"),
        ("from_training = [1, 2]", SpecError, "belong together"),
    ],
)
def test_bad_constraints_are_named_and_nothing_is_written(
    quick: dict[str, Any], tmp_path: Path, text: str, kind: type[BioseqError], told: str
) -> None:
    (tmp_path / "bad.csv").write_text("variant\nK2A\nA2K\n")
    path = constraints(tmp_path, text)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=told):
        run(DesignSpec(wild_type=WILD, constraints=path, **quick), tmp_path / "out.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bad_expressions_and_impossible_wishes(quick: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with pytest.raises(ExpressionError, match=r"column 1 .*unknown column 'stability'"):
        run(DesignSpec(wild_type=WILD, objective="stability", **quick), out)
    with pytest.raises(InputError, match=r"none of .* satisfies"):
        run(DesignSpec(wild_type=WILD, where="mutations > 30", **quick), out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(BioseqError, match="exists already"):
        run(DesignSpec(wild_type=WILD, **quick), out)
    assert out.read_text() == "mine"
    for field, value in (("number", 0), ("temperature", 0.0), ("caution", -1.0), ("batch", 0)):
        with pytest.raises(SpecError, match=field):
            DesignSpec(wild_type=WILD, **quick | {field: value})


def test_generations_are_functions_of_what_was_scored() -> None:
    c = read_constraints(WILD, None)
    weight = weights(np.zeros((len(WILD), 20)), c, 1.0)
    one, two = (generation(0, 5, 20, None, weight, c) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (generation(0, 6, 20, None, weight, c) != one).any() and len(np.unique(one, axis=0)) == 20


def test_the_command_writes_a_table(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d.csv"
    base = ["design", "--wild-type", WILD, "--model", bundle, "--homologs", "none", "-o", str(out)]
    assert main([*base, "--number", "5", "--generations", "2", "--batch", "20"]) == 0
    with open(out) as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 5 and [r["rank"] for r in rows] == list("12345")
    assert "5 designs" in capsys.readouterr().err
    assert main(["design", "-o", str(out)]) == 1 and "--wild-type" in capsys.readouterr().err


def test_a_shipped_head_scores_designs_as_it_scores_proteins(tmp_path: Path) -> None:
    """A real head, its homologs searched for each design: the table's columns are its own predictions."""
    rows = bioseq.design(
        WILD * 2, "target_class.kinase - 0.001 * mutations", heads=["target_class"], where="target_class.ood < 1000",
        homologs="none", generations=2, batch=6, number=3, threads=1,
    )  # fmt: skip
    told = bioseq.load("default").predict(
        [r["sequence"] for r in rows], ["target_class"], long_sequences="window"
    )
    assert len(rows) == 3
    for row, predicted in zip(rows, (p["target_class"] for p in told), strict=True):
        for label, p in predicted["probabilities"].items():
            assert row[f"target_class.{label}"] == pytest.approx(p, rel=1e-4)
        assert row["target_class.ood"] == pytest.approx(predicted["ood"], rel=1e-4)
        assert row["sd"] > 0 and row["bound"] == pytest.approx(row["objective"] - row["sd"], rel=1e-4)
    with pytest.raises(ExpressionError, match="kinaze"):
        bioseq.design(WILD, "target_class.kinaze", heads=["target_class"], homologs="none", threads=1)
