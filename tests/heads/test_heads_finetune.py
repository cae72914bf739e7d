"""From a table to a bundle, for every task: what it promises on reload, in predictions, beside baselines."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from heads_tables import sequences, table, write_table

from bioseq.bundles.bundle import open_bundle
from bioseq.bundles.registry import Registry
from bioseq.errors import BundleError, OutputError, RegistryError, SpecError, TableError
from bioseq.heads.head import Head
from bioseq.inference.loading import load
from bioseq.specs.finetune import FinetuneSpec, SplitSettings

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
from training.finetune.run import finetune


def run(tmp_path, backbone, targets, rows=None, **options):
    path = write_table(tmp_path / "labels.csv", rows or table(150))
    settings = {
        "features": ("composition",),
        "models": ("linear",),
        "bootstrap": 40,
        "neighbours": 50,
        "homologs": "none",
    } | options
    settings.setdefault("output", str(tmp_path / "head"))
    spec = FinetuneSpec(
        labels=str(path), targets=targets, base=str(backbone), threads=1, licence="CC0-1.0", **settings
    )
    return finetune(spec)


CASES = {
    "regression": ("k",),
    "several": ("k", "w"),
    "binary": ("many_k",),
    "multiclass": ("kind",),
    "multilabel": ("many_k", "many_w"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_predicts_in_the_documented_form(tmp_path, backbone, model, case):
    bundle = run(tmp_path, backbone, CASES[case])
    model.heads.clear()
    model.load_head("head", Head.load(bundle))
    fresh = sequences(6, seed=99)
    predictions = [p["head"] for p in model.predict(fresh, ["head"])]
    for p in predictions:
        assert set(p) == {
            "task", "value", "interval", "probabilities", "ood", "ood_percentile", "head", "version"
        }  # fmt: skip
        assert p["ood"] >= 0 and 0 <= p["ood_percentile"] <= 1
        json.dumps(p, allow_nan=False)
    one = predictions[0]
    if case == "regression":
        assert one["interval"][0] < one["value"] < one["interval"][1] and one["probabilities"] is None
    elif case == "several":
        assert set(one["value"]) == set(one["interval"]) == {"k", "w"}
    elif case == "multilabel":
        limits = dict(zip(("many_k", "many_w"), bundle.calibration()["thresholds"]))
        assert one["value"] == [n for n, p in one["probabilities"].items() if p >= limits[n]]
    else:
        assert one["value"] in one["probabilities"]
        assert sum(one["probabilities"].values()) == pytest.approx(1)
    evidence = bundle.evidence()
    assert set(evidence["gains"]) == set(evidence["baselines"])
    assert evidence["beats_baseline"] == all(g["low"] > 0 for g in evidence["gains"].values())
    assert evidence["too_few_groups"] is None
    assert {"majority", "composition_dipeptides"} <= set(evidence["baselines"])
    assert any(name.startswith("nearest_") for name in evidence["baselines"])
    low, high = evidence["intervals"][evidence["main"]]
    assert low <= evidence["metrics"][evidence["main"]] <= high
    assert evidence["metrics"][evidence["main"]] > 0.6  # the labels follow from the composition
    assert bundle.card().startswith("# head")


def test_a_reloaded_head_gives_the_same_bits_and_any_batch_the_same_numbers(tmp_path, backbone):
    bundle = run(tmp_path, backbone, ("k",), features=None, models=("mlp",))
    fresh = sequences(8, seed=5)
    first = load(backbone, threads=1)
    a = first.predict(fresh, [str(bundle.path)])
    second = load(backbone, threads=1)
    assert second.predict(fresh, [str(bundle.path)]) == a
    alone = [second.predict([s], [str(bundle.path)])[0][str(bundle.path)]["value"] for s in fresh]
    np.testing.assert_allclose(alone, [p[str(bundle.path)]["value"] for p in a], rtol=1e-5)


def test_the_cards_numbers_are_those_of_the_bundle_on_disk(tmp_path, backbone, model):
    rows = table(150)
    bundle = run(tmp_path, backbone, ("k",), rows)
    test = [r for r in rows if r["set"] == "test"]
    model.heads.clear()
    model.load_head("head", Head.load(bundle))
    got = [p["head"] for p in model.predict([r["sequence"] for r in test], ["head"])]
    from bioseq.ranking import spearman

    truth = np.array([r["k"] for r in test])
    assert spearman(truth, [p["value"] for p in got]) == pytest.approx(
        bundle.evidence()["metrics"]["spearman"], abs=1e-4
    )
    inside = np.mean([p["interval"][0] <= t <= p["interval"][1] for p, t in zip(got, truth)])
    assert inside == pytest.approx(bundle.evidence()["calibration"]["coverage"]["k"], abs=1e-4)


def test_nearest_gives_a_training_protein_itself_first(tmp_path, backbone, model):
    rows = table(150)
    bundle = run(tmp_path, backbone, ("k",), rows)
    name = str(bundle.path)
    ids = Head.load(bundle).neighbour_ids
    known = [r for r in rows if r["id"] in ids][:5]
    plain = model.predict([r["sequence"] for r in known], [name])
    answers = model.predict([r["sequence"] for r in known], [name], nearest=3)
    found = [a[name].pop("nearest") for a in answers]
    assert answers == plain
    assert [f[0]["id"] for f in found] == [r["id"] for r in known]
    assert all(f[0]["similarity"] > 0.999 and len(f) == 3 for f in found)
    assert {n["id"] for f in found for n in f} <= {
        r["id"] for r in rows if r["set"] != "test"
    }  # few validation rows: fitted on both
    with pytest.raises(SpecError, match="nearest"):
        model.predict(["ACDEF"], [name], nearest=-1)


def test_shuffled_and_odd_proteins_lie_further_out(tmp_path, backbone, model):
    head = Head.load(run(tmp_path, backbone, ("k",)))
    usual, odd = sequences(40, seed=7), ["P" * 30, "GC" * 20, "HHHHHHHHHHHHHHHHHHHH"]
    inside = head.ood.score(model.embed(usual), usual)
    outside = head.ood.score(model.embed(odd), odd)
    assert outside.min() > np.quantile(inside, 0.9)
    assert head.ood.percentile(outside).min() > 0.9


def test_missing_labels_are_masked_not_zero(tmp_path, backbone):
    rows = table(150)
    for i, r in enumerate(rows):
        r["w" if i % 2 else "k"] = "" if i % 3 == 0 else r["w" if i % 2 else "k"]
    evidence = run(tmp_path, backbone, ("k", "w"), rows).evidence()
    assert evidence["per_target"]["k"]["spearman"] > 0.6 and evidence["per_target"]["w"]["spearman"] > 0.6


def test_a_weak_head_says_so_first_and_is_not_registered(tmp_path, backbone, monkeypatch):
    from training.finetune.evaluation import report

    oracle = {r["sequence"]: [r["k"]] for r in table(150)}

    def baselines(task, rows, held, *_):
        return {"oracle": np.array([oracle[s] for s in held.sequences])}

    monkeypatch.setattr(report.baselines, "sequence_baselines", baselines)
    with pytest.raises(RegistryError, match="not registered"):
        run(tmp_path, backbone, ("k",), register="weak")
    bundle = open_bundle(tmp_path / "head")
    assert bundle.card().splitlines()[2].startswith("> **Weak.**")
    assert bundle.evidence()["beats_baseline"] is False
    with pytest.raises(RegistryError):
        Registry(tmp_path / "home").register(bundle.path, "weak")
    assert not Registry(tmp_path / "home").heads_for(open_bundle(backbone).manifest)


@pytest.mark.parametrize("families", [1, 5, 6])
def test_a_test_part_of_few_families_passes_no_head(tmp_path, backbone, families):
    """Labels that follow from the composition, so that the head is far above every baseline but the composition's."""
    rows = table(120)
    test = [r for r in rows if r["set"] == "test"]
    for i, r in enumerate(test):
        r["cluster"] = f"t{i % families}"
    evidence = run(tmp_path, backbone, ("k",), rows, output=str(tmp_path / "few")).evidence()
    assert evidence["resampled"]["groups"] == families
    if families < 6:
        assert not evidence["beats_baseline"] and f"{families} group" in evidence["too_few_groups"]
        card = (tmp_path / "few" / "card.md").read_text()
        assert card.splitlines()[2].startswith("> **Weak.**") and "at least 6" in card.splitlines()[2]
    else:
        assert evidence["too_few_groups"] is None


def test_a_good_head_is_registered_and_served_by_name(tmp_path, backbone, monkeypatch):
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    bundle = run(tmp_path, backbone, ("k",), register="lysine", accept_weak=True)
    assert load(backbone).predict(["ACDEFGHIKK"], ["lysine"])[0]["lysine"]["head"] == "lysine"
    assert bundle.manifest.base_hash == load(backbone).content_hash
    assert bundle.manifest.base_weights_hash == load(backbone).weights_hash


def test_few_validation_rows_choose_by_cross_validation(tmp_path, backbone):
    evidence = run(tmp_path, backbone, ("k",), table(80)).evidence()
    assert evidence["calibration"]["rows"] == 64  # all training and validation rows, out of fold


def test_baselines_are_fitted_on_the_rows_that_the_head_was_fitted_on(tmp_path, backbone, monkeypatch):
    """After folds the head takes the validation rows too; a baseline without them would be an easy one."""
    from training.finetune.evaluation import baselines

    seen, real = [], baselines.sequence_baselines

    def spy(task, rows, held, *a, **k):
        out = real(task, rows, held, *a, **k)
        seen.append((len(rows.trained), float(out["majority"][0, 0]), float(rows.y[rows.trained].mean())))
        return out

    monkeypatch.setattr(baselines, "sequence_baselines", spy)
    evidence = run(tmp_path, backbone, ("k",), table(80)).evidence()
    assert seen[0][0] == 64 and seen[0][1] == pytest.approx(seen[0][2])
    assert "64" in str(evidence["trained_on"])


def one_protein(n: int = 160) -> list[dict]:
    wild = "MKTAYIAKQRQISFVKSHFSRQ"
    rng = np.random.default_rng(0)
    gain = rng.normal(size=(4, 20))
    rows = {}
    while len(rows) < n:
        s, y = list(wild), 0.0
        for j, site in enumerate((3, 7, 11, 15)):
            a = rng.integers(20)
            s[site] = "ACDEFGHIKLMNPQRSTVWY"[a]
            y += gain[j, a]
        rows["".join(s)] = y + rng.normal(0, 0.1)
    return [
        {
            "sequence": s,
            "y": y,
            "set": "train" if i < n * 0.7 else "test",
            "validation": str(n * 0.5 < i < n * 0.7),
        }
        for i, (s, y) in enumerate(rows.items())
    ]


def test_variants_of_one_protein_use_sites_and_masked_marginals_and_refuse_other_lengths(
    tmp_path, backbone, model
):
    bundle = run(tmp_path, backbone, ("y",), one_protein(), features=("onehot", "masked_marginal"))
    evidence, head = bundle.evidence(), Head.load(bundle)
    assert "onehot" in evidence["baselines"] and evidence["metrics"]["spearman"] > 0.8
    assert head.context.sites == (3, 7, 11, 15) and head.context.odds.shape == (22, 20)
    model.heads.clear()
    model.load_head("head", head)
    from bioseq.errors import SequenceError

    with pytest.raises(SequenceError, match="22 residues"):
        model.predict(["MKTAYIAK"], ["head"])


def test_the_zero_shot_score_stays_a_baseline_when_features_are_named(tmp_path, backbone):
    evidence = run(tmp_path, backbone, ("y",), one_protein(80), features=("onehot",)).evidence()
    assert "zero_shot" in evidence["baselines"] and "masked_marginal" not in evidence["chosen"]["blocks"]


def test_few_variants_keep_the_augmented_model_unless_another_is_clearly_better():
    """Labels that follow the zero-shot score: with 24 of them, noise decides among the other candidates."""
    from bioseq.heads.features import Context, compute
    from training.finetune.models.frozen import AUGMENTED, fit_frozen
    from training.finetune.models.rows import Rows
    from training.tables.dealing import grouped_folds

    rng = np.random.default_rng(0)
    wild = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60))
    odds = rng.normal(size=(60, 20)).astype(np.float32)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        texts = []
        for _ in range(24):
            s = list(wild)
            for at in rng.choice(60, 3, replace=False):
                s[at] = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"))
            texts.append("".join(s))
        context = Context(wild, tuple(range(60)), odds)
        y = compute("masked_marginal", texts, context) + rng.normal(0, 0.8, (24, 1))
        rows = Rows(
            rng.normal(size=(24, 8)).astype(np.float32), texts, y, np.ones(24),
            grouped_folds(np.arange(24), seed=seed), True, context,
        )  # fmt: skip
        best = fit_frozen("regression", rows, 1, models=("linear",))
        assert ("linear", best.blocks) == AUGMENTED
    strong = Rows(y.astype(np.float32), texts, y, np.ones(24), rows.folds, True, context)
    assert "embedding" in fit_frozen("regression", strong, 1, models=("linear",)).blocks


def test_networks_need_rows_for_each_site_of_a_protein():
    from bioseq.heads.features import Context
    from training.finetune.models.frozen import candidates
    from training.finetune.models.rows import Rows

    def models(n: int, sites: int) -> set[str]:
        context = Context("A" * 50, tuple(range(sites)), np.zeros((50, 20), np.float32))
        rows = Rows(
            np.zeros((n, 4), np.float32), ["A" * 50] * n, np.zeros((n, 1)), np.ones(n), [], True, context
        )
        return {m for m, _ in candidates(rows, ("linear", "mlp"), None)}

    assert models(100, 4) == {"linear", "mlp"} and models(100, 40) == {"linear"}


def test_onehot_columns_share_one_scale_in_linear_models():
    from training.finetune.models.linear import standardise

    x = np.zeros((40, 4), np.float32)
    x[0, 0] = x[:20, 1] = 1
    x[:, 3] = np.arange(40)
    even = standardise(x, [3, 1], [1.0, 1.0], [True, False]).scale
    assert even[0] == even[1] > 0 and even[2] == 0
    plain = standardise(x, [3, 1], [1.0, 1.0]).scale
    assert plain[0] > 2 * plain[1] and plain[3] == even[3]


def test_the_members_of_a_ridge_spread_around_it_and_average_to_it():
    from training.finetune.models.frozen import _Trial
    from training.finetune.models.rows import Rows
    from training.tables.dealing import grouped_folds

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    y = x[:, :1] + rng.normal(size=(60, 1))
    rows = Rows(x, ["A"] * 60, y, np.ones(60), grouped_folds(np.arange(60)), True)
    trial = _Trial("regression", rows, 1, ("embedding",), "auto", 0)
    every = np.arange(60)
    (standard, *_), fitted = trial._path(every, (0.1,))
    members = trial._bagged(every, 0.1)[1].members(torch.from_numpy(standard(x)))
    np.testing.assert_allclose(members.mean(0), fitted[0][1](torch.from_numpy(standard(x))), atol=1e-5)
    assert members.std(0).min() > 1e-4
    # fitted again on all rows the penalty stays what it was for a fold's rows, 0.8 of them
    final, like = trial.on_all(("linear", 0.1))[1], trial._path(every, (0.08,))[1][0][1]
    z = torch.from_numpy(standard(x))
    np.testing.assert_allclose(final.members(z).mean(0), like(z), atol=1e-5)


def test_columns_that_no_row_has_change_nothing():
    from training.finetune.models.linear import fit_ridge

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 7)), rng.normal(size=(50, 1))
    wide = np.zeros((50, 12))
    wide[:, [0, 2, 3, 5, 8, 9, 11]] = x
    penalties = (1e-3, 1.0)
    for (_, a), (_, b), l2 in zip(
        fit_ridge(x, y, np.ones(50), penalties), fit_ridge(wide, y, np.ones(50), penalties), penalties
    ):
        weights = b.layers[0][0][0, :, 0].numpy()
        np.testing.assert_allclose(weights[wide.any(0)], a.layers[0][0][0, :, 0].numpy(), atol=1e-6)
        assert not weights[~wide.any(0)].any()
        from sklearn.linear_model import Ridge

        np.testing.assert_allclose(
            a.layers[0][0][0, :, 0].numpy(), Ridge(alpha=l2 * 50).fit(x, y).coef_.ravel(), atol=1e-6
        )


def test_same_spec_same_bytes(tmp_path, backbone):
    a = run(
        tmp_path, backbone, ("many_k",), output=str(tmp_path / "a"), name="same", models=("linear", "mlp")
    )
    b = run(
        tmp_path, backbone, ("many_k",), output=str(tmp_path / "b"), name="same", models=("linear", "mlp")
    )
    assert a.manifest.files["model.safetensors"] == b.manifest.files["model.safetensors"]
    assert a.manifest.files["calibration.json"] == b.manifest.files["calibration.json"]


def test_nothing_is_written_on_bad_input_nor_over_something(tmp_path, backbone):
    rows = table(60)
    rows[4]["k"] = "high"
    with pytest.raises(TableError, match=r"row 5;"):
        run(tmp_path, backbone, ("k",), rows)
    assert not (tmp_path / "head").exists()
    (tmp_path / "head").mkdir()
    with pytest.raises(OutputError, match="--force"):
        run(tmp_path, backbone, ("k",))


def test_a_head_of_another_backbone_is_refused(tmp_path, backbone):
    import torch

    from bioseq.backbones.storage import load_backbone, save_backbone

    bundle = run(tmp_path, backbone, ("k",))
    other = load_backbone(open_bundle(backbone))
    with torch.no_grad():
        other.final_norm.bias += 1
    save_backbone(tmp_path / "other", other, name="other", card="# o", evidence={}, licence="CC0-1.0")
    with pytest.raises(BundleError, match="made for"):
        load(tmp_path / "other").predict(["ACDEF"], [str(bundle.path)])


def test_spec_round_trip_and_faults():
    spec = FinetuneSpec(
        labels="t.csv", targets=("a",), output="o", split=SplitSettings(kind="cluster"), lr=1e-3
    )
    assert FinetuneSpec.from_dict(json.loads(spec.to_json())) == spec
    for bad, word in (
        ({"targets": ()}, "targets"),
        ({"targets": ("a", "a")}, "twice"),
        ({"level": 1.0}, "level"),
        ({"features": ("nope",)}, "nope"),
        ({"residue_labels": "x", "task": "binary"}, "task"),
        ({"split": {"kind": "column", "valid": 2.0}}, "split"),
        ({"unknown": 1}, "unknown"),
    ):
        with pytest.raises(SpecError, match=word):
            FinetuneSpec.from_dict({**spec.to_dict(), **bad})


def residue_files(tmp_path, n=60):
    rng = np.random.default_rng(0)
    found = sequences(n, 3, 25, 40)
    states = ["".join("H" if c in "AELKMQR" else "E" if c in "VIYFWT" else "C" for c in s) for s in found]
    parts = ["SET=test" if i >= n * 0.8 else f"SET=train VALIDATION={i >= n * 0.6}" for i in range(n)]
    masks = ["".join(rng.choice(list("01"), len(s), p=[0.1, 0.9])) for s in found]
    names = ("sequences", "labels", "mask")
    for name, rows in zip(names, (found, states, masks)):
        text = "".join(f">p{i} {parts[i] if name == 'labels' else ''}\n{r}\n" for i, r in enumerate(rows))
        (tmp_path / f"{name}.fasta").write_text(text)
    return [str(tmp_path / f"{name}.fasta") for name in names]


def test_residue_heads(tmp_path, backbone, model):
    files = residue_files(tmp_path)
    spec = FinetuneSpec(
        labels=files[0], residue_labels=files[1], residue_mask=files[2], output=str(tmp_path / "head"),
        base=str(backbone), bootstrap=40, neighbours=20, threads=1, homologs="none",
    )  # fmt: skip
    bundle = finetune(spec)
    assert bundle.evidence()["metrics"]["accuracy"] > 0.65
    model.heads.clear()
    model.load_head("head", Head.load(bundle))
    fresh = sequences(5, 77, 5, 60)
    together = [p["head"] for p in model.predict(fresh, ["head"])]
    for s, p in zip(fresh, together):
        assert len(p["value"]) == len(s) == len(p["probabilities"]) and p["labels"] == ["C", "E", "H"]
        assert math.isclose(sum(p["probabilities"][0]), 1, rel_tol=1e-6)
        alone = model.predict([s], ["head"])[0]["head"]
        np.testing.assert_allclose(alone["probabilities"], p["probabilities"], atol=1e-5)


def test_the_command_writes_and_predict_reads(tmp_path, backbone):
    from bioseq.cli import main

    path = write_table(tmp_path / "t.csv", table(120))
    head = tmp_path / "lysine"
    arguments = ["--targets", "k", "--base", backbone, "--features", "composition", "--models", "linear"]
    arguments += ["--homologs", "none"]
    assert (
        main(
            [
                "finetune",
                str(path),
                *map(str, arguments),
                "--threads",
                "1",
                "--unit",
                "share",
                "-o",
                str(head),
            ]
        )
        == 0
    )
    report = (tmp_path / "lysine.html").read_text()
    assert (
        "Head lysine" in report and "on rows that it did not train on" in report and "<script" not in report
    )
    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">q{i}\n{s}\n" for i, s in enumerate(sequences(4, 8))))
    common = ["predict", str(fasta), "--heads", str(head), "--model", str(backbone), "--threads", "1"]
    out = tmp_path / "p.csv"
    assert main([*common, "-o", str(out), "--nearest", "2"]) == 0
    lines = out.read_text().splitlines()
    assert lines[0].startswith("id,head,version,task,value,low,high,ood") and len(lines) == 5
    assert main([*common, "-o", str(tmp_path / "p.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["q0", "q1", "q2", "q3"] and rows[0]["task"] == "regression"
    assert main([*common, "-o", str(tmp_path / "p.parquet")]) == 0
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "p.parquet").num_rows == 4
    bad = tmp_path / "bad.fasta"
    bad.write_text(">ok\nACDEF\n>wrong\nAC1\n")
    assert main(["predict", str(bad), *common[2:], "-o", str(tmp_path / "bad.csv")]) == 1
    assert not (tmp_path / "bad.csv").exists()


def test_rows_without_embedding_train_the_sequence_features(tmp_path, backbone):
    bundle = run(tmp_path, backbone, ("many_k", "many_w"), models=("mlp",), max_embedded=30)
    evidence, head = bundle.evidence(), Head.load(bundle)
    assert evidence["rows"]["train"] == 90 and set(head.neighbour_ids) <= {f"p{i}" for i in range(90)}
    assert len(head.neighbour_ids) == 30 and evidence["metrics"]["macro_auroc"] > 0.8
    assert any("30 of the training rows were embedded" in note for note in evidence["notes"])


@pytest.mark.parametrize("size", ["small", "medium", "full"])
def test_the_shipped_heads_have_valid_specs(tmp_path, size):
    from training.release.make_heads import NAMES, spec

    made = [spec(name, tmp_path, tmp_path / "out", "default", size) for name in NAMES]
    assert [s.name for s in made] == ["localization", "target_class", "secondary_structure"]
    assert [s.output for s in made] == [str(tmp_path / "out" / name) for name in NAMES]
    assert all(FinetuneSpec.from_dict(s.to_dict()) == s for s in made)
