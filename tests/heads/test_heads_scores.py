"""Metrics, calibration and splits against scikit-learn, scipy and first principles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from heads_tables import sequences, table, write_table

from bioseq import ranking
from bioseq.errors import TableError
from bioseq.heads.calibration import sigmoid, softmax
from bioseq.homologs import clusters
from bioseq.specs.finetune import SplitSettings
from training.finetune import metrics
from training.finetune.evaluation import calibrate
from training.tables import splits
from training.tables.dealing import deal, grouped_folds, position_folds
from training.tables.labels import TEST, TRAIN, VALID, read_labels
from training.tables.variants import differences

RNG = np.random.default_rng(0)
TRUTH = RNG.integers(0, 2, 300)
SCORE = np.round(RNG.normal(size=300) + TRUTH, 1)  # rounded: many ties


def test_ranking_scores_equal_scipy_and_sklearn():
    stats, sk = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    values = np.round(RNG.normal(size=300), 1)
    assert ranking.spearman(values, SCORE) == pytest.approx(stats.spearmanr(values, SCORE).statistic)
    got = metrics.regression(values, SCORE)
    assert got["spearman"] == pytest.approx(ranking.spearman(values, SCORE))
    assert got["ndcg"] == pytest.approx(sk.ndcg_score([values - values.min()], [SCORE]))
    assert got["rmse"] == pytest.approx(np.sqrt(((values - SCORE) ** 2).mean()))
    own = metrics.binary(TRUTH.astype(float), SCORE)
    assert own["auroc"] == pytest.approx(sk.roc_auc_score(TRUTH, SCORE))
    assert own["average_precision"] == pytest.approx(sk.average_precision_score(TRUTH, SCORE))
    assert metrics.main_score("binary", TRUTH[:, None].astype(float), SCORE[:, None]) == own["auroc"]
    assert np.isnan(metrics.auroc(np.ones(5), np.arange(5)))
    assert np.isnan(metrics.spearman(np.ones(5), np.arange(5)))


def test_class_scores_equal_sklearn():
    sk = pytest.importorskip("sklearn.metrics")
    truth, called = RNG.integers(0, 3, 200), RNG.integers(0, 3, 200)
    probabilities = np.eye(3)[called] * 0.8 + 0.1
    got = metrics.multiclass(truth.astype(float), probabilities / probabilities.sum(1, keepdims=True))
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(truth, called))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(truth, called, average="macro"))
    assert got["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, called))
    own = metrics.binary(TRUTH.astype(float), sigmoid(SCORE), 0.6)
    assert own["f1"] == pytest.approx(sk.f1_score(TRUTH, sigmoid(SCORE) >= 0.6))
    assert own["mcc"] == pytest.approx(sk.matthews_corrcoef(TRUTH, sigmoid(SCORE) >= 0.6))


def test_missing_labels_do_not_count():
    truth = TRUTH.astype(float)
    holes = truth.copy()
    holes[::3] = np.nan
    keep = ~np.isnan(holes)
    assert metrics.binary(holes, SCORE) == metrics.binary(truth[keep], SCORE[keep])


def test_bootstrap_interval_covers_a_mean():
    hits = 0
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=80)
        low, high = metrics.bootstrap(np.arange(80), lambda r, x=x: {"m": float(x[r].mean())}, rounds=200)[
            "m"
        ]
        hits += low <= 0 <= high
    assert 48 <= hits <= 60


def test_conformal_intervals_cover_what_they_say():
    covered = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        radius = calibrate.conformal_radius(rng.standard_t(3, size=199), 0.9)
        covered.append(np.mean(np.abs(rng.standard_t(3, size=2000)) <= radius))
    assert 0.88 <= np.mean(covered) <= 0.93
    assert calibrate.conformal_radius(np.arange(5), 0.9) == np.inf


def test_platt_and_temperature_mend_wrong_confidence():
    rng = np.random.default_rng(1)
    z = rng.normal(size=4000)
    truth = (rng.random(4000) < sigmoid(z)).astype(float)
    a, b = calibrate.fit_platt(5 * z + 2, truth)
    assert a == pytest.approx(0.2, abs=0.02) and b == pytest.approx(-0.4, abs=0.1)
    before = calibrate.reliability(truth, sigmoid(5 * z + 2)).ece
    after = calibrate.reliability(truth, sigmoid(a * (5 * z + 2) + b)).ece
    assert after < 0.03 < before
    logits = rng.normal(size=(4000, 3))
    classes = np.array([rng.choice(3, p=p) for p in softmax(logits)])
    temperature, biases = calibrate.fit_temperature(4 * logits, classes.astype(float))
    assert temperature == pytest.approx(0.25, abs=0.03) and max(map(abs, biases)) < 0.15


def test_biases_undo_what_class_weights_did():
    rng = np.random.default_rng(2)
    shift = np.array([0.0, 1.5, 3.0])  # what training with class weights adds to the rare classes' logits
    logits = rng.normal(size=(4000, 3)) * 1.5
    classes = np.array([rng.choice(3, p=p) for p in softmax(logits)], float)
    temperature, biases = calibrate.fit_temperature(logits + shift, classes)
    np.testing.assert_allclose(biases, shift.mean() - shift, atol=0.15)
    p = softmax((logits + shift) * temperature + biases)
    np.testing.assert_allclose(p.mean(0), np.bincount(classes.astype(int)) / 4000, atol=0.005)


def test_f1_threshold_is_the_best_of_all():
    p, truth = sigmoid(SCORE), TRUTH.astype(float)
    best = max(metrics.binary(truth, p, t)["f1"] for t in np.unique(p))
    found = calibrate.f1_threshold(truth, p)
    assert metrics.binary(truth, p, found)["f1"] == pytest.approx(best)


# ------------------------------------------------------------------------------------------------- splits


def families(n: int, size: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Unrelated parents with `size` children each at about 80 % identity."""
    rng = np.random.default_rng(seed)
    out, family = [], []
    for f, parent in enumerate(sequences(n, seed, 90, 120)):
        for _ in range(size):
            child = list(parent)
            for at in rng.choice(len(child), len(child) // 5, replace=False):
                child[at] = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"))
            out.append("".join(child))
            family.append(f)
    return out, family


def family_table(tmp_path):
    found, family = families(15, 4)
    rows = [{"sequence": s, "y": i % 7, "family": f} for i, (s, f) in enumerate(zip(found, family))]
    return read_labels(write_table(tmp_path / "t.csv", rows), ["y"], task="regression"), np.array(family)


@pytest.mark.parametrize("mmseqs", [True, False])
def test_cluster_split_keeps_families_whole_and_says_how(tmp_path, monkeypatch, mmseqs):
    if not mmseqs:
        monkeypatch.setattr(clusters, "find_mmseqs", lambda: None)
    elif clusters.find_mmseqs() is None:
        pytest.skip("MMseqs2 is not installed")
    labels, family = family_table(tmp_path)
    split = splits.make_split(labels, SplitSettings(kind="cluster"), seed=1)
    assert all(len(set(split.part[family == f])) == 1 for f in range(15))
    assert {TRAIN, VALID, TEST} == set(split.part.tolist())
    assert ("MMseqs2" in split.how["groups"] and "not installed" not in split.how["groups"]) == mmseqs
    assert split.how["leakage"]["share_over_50"] == 0.0
    again = splits.make_split(labels, SplitSettings(kind="cluster"), seed=1)
    assert (again.part == split.part).all()


def test_random_split_measures_and_names_its_leakage(tmp_path):
    labels, _ = family_table(tmp_path)
    split = splits.make_split(labels, SplitSettings(kind="random"))
    assert split.how["leakage"]["share_over_30"] > 0.5
    assert any("30 % identity" in w for w in split.warnings)


def variants(tmp_path):
    wild = "ACDEFGHIKLMNPQRSTVWY"
    rng = np.random.default_rng(0)
    rows = {wild: 1.0}
    while len(rows) < 200:
        s = list(wild)
        for at in rng.choice(20, rng.integers(1, 5), replace=False):
            s[at] = rng.choice(list(wild))
        rows["".join(s)] = float(rng.normal())
    path = write_table(tmp_path / "v.csv", [{"sequence": s, "y": y} for s, y in rows.items()])
    return read_labels(path, ["y"], wild_type=wild), wild


def test_mutational_distance_split(tmp_path):
    labels, wild = variants(tmp_path)
    split = splits.make_split(labels)
    distance = differences(labels.sequences, wild).sum(1)
    assert split.how["kind"] == "mutations"
    assert distance[split.part == TEST].min() == 3 and distance[split.part != TEST].max() == 2


@pytest.mark.parametrize("mode", ["contiguous", "modulo"])
def test_position_split_shares_no_mutated_position(tmp_path, mode):
    labels, wild = variants(tmp_path)
    split = splits.make_split(labels, SplitSettings(kind="position", position_mode=mode, valid=0.3, test=0.3))
    places = [np.flatnonzero(d) for d in differences(labels.sequences, wild)]
    of = {p: {int(x) for i in split.places(p) for x in places[i]} for p in (TRAIN, VALID, TEST)}
    assert not (of[TRAIN] & of[TEST] or of[TRAIN] & of[VALID] or of[VALID] & of[TEST])
    assert split.how["left_out"] == int((split.part == -1).sum()) > 0
    if mode == "contiguous":
        assert max(of[TRAIN]) < min(of[TEST])


def test_a_table_too_small_to_split_is_refused(tmp_path):
    path = write_table(tmp_path / "t.csv", table(9))
    with pytest.raises(TableError, match="at least"):
        splits.make_split(read_labels(path, ["k"]))


def test_held_out_rows_and_dealt_validation(tmp_path):
    rows = [
        {**r, "cluster": f"c{i // 3}", "set": "valid" if i >= 40 else "train"}
        for i, r in enumerate(table(60))
    ]
    labels = read_labels(write_table(tmp_path / "t.csv", rows), ["k"])
    split = splits.make_split(labels, measure=False)
    assert (split.part[40:] == TEST).all() and "held_out" in split.how
    assert all(len({int(split.part[i]) for i in range(40) if i // 3 == c}) == 1 for c in range(13))


def test_large_families_train_and_each_held_out_part_has_many(tmp_path):
    sizes = [400, 300, 200] + [1] * 100
    groups = np.repeat(np.arange(len(sizes)), sizes)
    part = deal(groups, 0.15, 0.15, np.random.default_rng(0), np.zeros(1000, int))
    for p in (VALID, TEST):
        families = np.unique(groups[part == p], return_counts=True)[1]
        assert len(families) >= 10 and families.max() <= 0.5 * (part == p).sum()
    even = deal(np.repeat(np.arange(200), 5), 0.15, 0.15, np.random.default_rng(0), np.zeros(1000, int))
    assert [(even == p).sum() for p in (TRAIN, VALID, TEST)] == [700, 150, 150]
    few = deal(np.repeat(np.arange(5), 20), 0.15, 0.15, np.random.default_rng(0), np.zeros(100, int))
    assert {TRAIN, VALID, TEST} == set(few.tolist())


def test_few_families_in_a_part_are_counted_and_warned_of(tmp_path):
    labels, _ = family_table(tmp_path)
    split = splits.make_split(labels, SplitSettings(kind="cluster"), seed=1)
    assert sum(split.how["families"].values()) == 15
    assert any("fewer than 10" in w for w in split.warnings)


def test_folds_keep_together_what_the_split_keeps_together(tmp_path):
    groups = np.repeat(np.arange(12), 5)
    for train, valid in grouped_folds(groups):
        assert not set(groups[train]) & set(groups[valid])
    labels, wild = variants(tmp_path)
    split = splits.make_split(labels, SplitSettings(kind="position", valid=0.3, test=0.3))
    rows = np.concatenate([split.places(TRAIN), split.places(VALID)])
    folds, by = split.folds(rows)
    differs = differences([labels.sequences[i] for i in rows], wild)
    assert by == "mutated position" and len(folds) > 1
    for train, valid in folds:
        assert not (differs[train].any(0) & differs[valid].any(0)).any()
    split = splits.make_split(labels, SplitSettings(kind="mutations", train_mutations=3))
    rows = np.flatnonzero(split.part != TEST)
    folds, by = split.folds(rows)
    order = differences([labels.sequences[i] for i in rows], wild).sum(1)
    assert by == "number of mutations"
    assert all(not set(order[train]) & set(order[valid]) for train, valid in folds)
    assert position_folds(differs[:0]) == []


def scan_table(tmp_path, *, singles: bool, given: bool):
    """Variants of one protein as plain sequences with a value, and nothing else said."""
    wild = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ"
    rng = np.random.default_rng(3)
    rows = {wild: 1.0}
    while len(rows) < 300:
        s = list(wild)
        for at in rng.choice(56, 1 if singles else rng.integers(1, 5), replace=False):
            s[at] = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"))
        rows["".join(s)] = float(rng.normal())
    path = write_table(tmp_path / "v.csv", [{"sequence": s, "fitness": y} for s, y in rows.items()])
    return read_labels(path, ["fitness"], wild_type=wild if given else None), wild


@pytest.mark.parametrize("given", [True, False])
def test_single_mutants_are_split_by_position_and_at_random_beside(tmp_path, given):
    labels, wild = scan_table(tmp_path, singles=True, given=given)
    split = splits.make_split(labels)
    assert (split.how["kind"], split.how["mode"], split.also) == ("position", "modulo", ("random",))
    assert split.variants is not None and split.variants.wild_type == wild
    assert ("consensus" in split.how["table"]) == (not given)


def test_variants_of_several_orders_are_split_by_order_without_a_word(tmp_path):
    labels, wild = scan_table(tmp_path, singles=False, given=False)
    split = splits.make_split(labels)
    order = differences(labels.sequences, wild).sum(1)
    assert split.how["kind"] == "mutations"
    assert order[split.part == TEST].min() > order[split.part == TRAIN].max()


def test_four_sites_of_one_protein_fall_to_all_parts(tmp_path):
    """The form of GB1: most rows have three or four mutations, so two would leave hardly any to train on."""
    wild = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
    rng = np.random.default_rng(0)
    rows = set()
    while len(rows) < 600:
        s = list(wild)
        for site in (38, 39, 40, 53):
            s[site] = "ACDEFGHIKLMNPQRSTVWY"[rng.integers(20)]
        rows.add("".join(s))
    path = write_table(
        tmp_path / "g.csv", [{"sequence": s, "fitness": i % 17} for i, s in enumerate(sorted(rows))]
    )
    split = splits.make_split(read_labels(path, ["fitness"]))
    assert min((split.part == p).sum() for p in (TRAIN, VALID, TEST)) >= 10


@pytest.mark.parametrize("few", [True, False])
def test_a_default_split_leaves_enough_rows_to_test(tmp_path, few):
    """The modulo split tests on the seventh site, of which one table holds eight variants alone."""
    wild, letters = "MKTAYIAKQRQISFVKSHFS", "ACDEFGHIKLMNPQRSTVWY"
    rows = [wild]
    for site in range(12 if few else 20):
        rows += [wild[:site] + a + wild[site + 1 :] for a in letters if a != wild[site]][
            : 8 if few and site == 6 else 19
        ]
    path = write_table(tmp_path / "g.csv", [{"sequence": s, "y": i % 17} for i, s in enumerate(rows)])
    labels = read_labels(path, ["y"], wild_type=wild)
    split = splits.make_split(labels)
    if few:
        assert split.how["kind"] == "random" and (split.part == TEST).sum() >= 30
        assert "8 rows in the test part" in split.warnings[0]
    else:
        assert (split.how["kind"], split.also) == ("position", ("random",))


@pytest.mark.parametrize("apart", ["numbers of mutations", "mutated positions", "nothing but rows"])
def test_folds_of_a_files_own_split_keep_apart_what_it_keeps_apart(tmp_path, apart):
    labels, wild = scan_table(tmp_path, singles=apart != "numbers of mutations", given=True)
    differs = differences(labels.sequences, wild)
    if apart == "numbers of mutations":
        test = differs.sum(1) > 2
    elif apart == "mutated positions":
        test = differs[:, 40:].any(1)
    else:
        test = np.arange(len(labels)) % 4 == 0
    labels = replace(labels, part=np.where(test, TEST, TRAIN))
    split = splits.make_split(labels)
    assert split.how["kind"] == "column" and split.how["kept_apart"] == apart
    rows = np.flatnonzero(split.part != TEST)
    folds, by = split.folds(rows)
    for train, valid in folds:
        a, b = differs[rows[train]], differs[rows[valid]]
        if apart == "numbers of mutations":
            assert not set(a.sum(1)) & set(b.sum(1)) or not (
                {x.tobytes() for x in a} & {x.tobytes() for x in b}
            )
        elif apart == "mutated positions":
            assert by == "mutated position" and not (a.any(0) & b.any(0)).any()
    assert (by == "row") == (apart == "nothing but rows")
    assert any("close neighbours" in w for w in split.warnings) == (apart == "nothing but rows")


def test_position_folds_that_would_measure_hardly_a_row_keep_sets_of_positions_together(tmp_path):
    labels, wild = scan_table(tmp_path, singles=False, given=True)
    differs = differences(labels.sequences, wild)
    few = np.flatnonzero(~differs[:, 40:].any(1) & (differs.sum(1) == 4))[:24]
    test = np.flatnonzero(differs[:, 40:].any(1) & ~differs[:, :40].any(1))
    part = np.full(len(labels), -1)
    part[few], part[test] = TRAIN, TEST
    labels = replace(labels, part=part).take(np.concatenate([few, test]))
    split = splits.make_split(labels)
    rows = np.arange(len(few))
    folds, by = split.folds(rows)
    assert split.how["kept_apart"] == "mutated positions" and by == "set of mutated positions"
    assert sorted(np.concatenate([valid for _, valid in folds]).tolist()) == rows.tolist()


def test_unrelated_peptides_of_one_length_are_not_variants(tmp_path):
    rng = np.random.default_rng(0)
    peptides = {"".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 9)) for _ in range(200)}
    path = write_table(
        tmp_path / "p.csv", [{"sequence": s, "y": i % 13} for i, s in enumerate(sorted(peptides))]
    )
    split = splits.make_split(read_labels(path, ["y"]))
    assert split.variants is None and split.how["kind"] in ("cluster", "random")


def test_normalised_intervals_cover_and_are_narrower_where_members_agree():
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    head = SimpleNamespace(task="regression")
    sigma = rng.uniform(0.2, 2.0, 1500)[:, None]
    truth, spread = rng.normal(size=(1500, 1)) * sigma, sigma * rng.uniform(0.8, 1.2, (1500, 1))
    found = calibrate.calibrate(head, np.zeros((1500, 1)), truth, 0.9, spread)
    assert "spread" in found
    from bioseq.heads.calibration import half_widths

    fresh = rng.uniform(0.2, 2.0, 4000)[:, None]
    half = half_widths(fresh, found)
    inside = np.abs(rng.normal(size=(4000, 1)) * fresh) <= half
    assert 0.88 <= inside.mean() <= 0.92
    sure = fresh[:, 0] < 0.8
    assert (
        half[sure].mean() < 0.6 * half[~sure].mean()
        and abs(inside[sure].mean() - inside[~sure].mean()) < 0.06
    )
    constant = calibrate.calibrate(head, np.zeros((1500, 1)), truth, 0.9, rng.uniform(1, 2, (1500, 1)))
    assert "spread" not in constant or half_widths(fresh, constant).std() < half.std()


def test_the_bootstrap_draws_families_not_rows():
    x = np.repeat(np.random.default_rng(1).normal(size=20), 10)
    rows = metrics.bootstrap(np.arange(200), lambda r: {"m": float(x[r].mean())})["m"]
    families = metrics.bootstrap(np.repeat(np.arange(20), 10), lambda r: {"m": float(x[r].mean())})["m"]
    assert families[1] - families[0] > 2 * (rows[1] - rows[0])
