"""What a file's own split of variants decides: the wild type, what stays together, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bioseq.errors import TableError
from training.tables.labels import TEST, TRAIN, VALID, Labels, read_labels
from training.tables.splits import make_split
from training.tables.variants import find_variants

WILD = "MKTAYIAKQRQISFVKSHFSRQ"


def _table(path: Path, rows: list[tuple[str, str]], weight: str | None = None) -> Labels:
    lines = [f"{s},{i % 7},{part},{0}" for i, (s, part) in enumerate(rows)]
    path.write_text("sequence,y,set,w\n" + "\n".join(lines) + "\n")
    return read_labels(path, ["y"], weight=weight)


def _changed(sequence: str, changes: dict[int, str]) -> str:
    letters = list(sequence)
    for at, letter in changes.items():
        letters[at] = letter
    return "".join(letters)


def _rows(singles: int, doubles: int) -> list[tuple[str, str]]:
    """Single mutants to train on, and more rows to test on that all mutate positions 3 and 4 to W, and one more."""
    letters, rows = "ACDEFGHIKLMNPQRSTVWY", [(WILD, "train")]
    for at in range(len(WILD)):
        for letter in letters:
            if letter != WILD[at] and len(rows) <= singles:
                rows.append((_changed(WILD, {at: letter}), "train"))
    both = _changed(WILD, {3: "W", 4: "W"})
    for at in range(5, len(WILD)):
        for letter in letters:
            if letter != WILD[at] and len(rows) <= singles + doubles:
                rows.append((_changed(both, {at: letter}), "test"))
    return rows


def test_test_rows_have_no_say_in_the_wild_type(tmp_path: Path) -> None:
    labels = _table(tmp_path / "t.csv", _rows(120, 200))
    found = find_variants(labels)
    assert found is not None and found.wild_type == WILD and "outside the test part" in found.note
    whole = find_variants(replace(labels, part=None))
    assert whole is not None and whole.wild_type == _changed(WILD, {3: "W", 4: "W"})


def test_validation_keeps_positions_together_where_the_test_does(tmp_path: Path) -> None:
    labels = _table(tmp_path / "t.csv", _rows(300, 100))
    split = make_split(labels, measure=False)
    assert (
        split.how["kept_apart"] == "numbers of mutations"
        and "set of mutated positions" in split.how["validation"]
    )
    assert split.variants is not None
    sets = split.variants.site_sets
    assert not set(sets[split.part == TRAIN]) & set(sets[split.part == VALID])
    rows = np.flatnonzero(split.part != TEST)
    assert np.array_equal(split.resampled(rows), sets[rows])


def test_one_row_of_many_mutations_does_not_hide_what_is_kept_apart(tmp_path: Path) -> None:
    rows = _rows(200, 100)
    rows.append((_changed(WILD, dict.fromkeys(range(8), "W")), "train"))
    split = make_split(_table(tmp_path / "t.csv", rows), measure=False)
    assert split.how["kept_apart"] == "numbers of mutations"


def test_weights_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    labels = _table(tmp_path / "t.csv", _rows(100, 60), weight="w")
    with pytest.raises(TableError, match="every training row has a weight of 0"):
        make_split(labels, measure=False)


def test_one_family_is_dealt_to_folds_by_row(tmp_path: Path) -> None:
    """All validation and training rows in one group: nothing to keep together, and the card says so."""
    labels = _table(tmp_path / "t.csv", _rows(100, 60))
    labels = replace(
        labels, part=None, cluster=["one"] * len(labels), wild_type=None, sequences=_ragged(labels)
    )
    split = make_split(labels, measure=False)
    rows = np.flatnonzero(split.part != TEST)
    folds, by = split.folds(rows)
    assert len(folds) == 5 and by.startswith("row, as all of them are one group")
    assert sorted(np.concatenate([valid for _, valid in folds]).tolist()) == list(range(len(rows)))


def _ragged(labels: Labels) -> list[str]:
    return [s + "A" * (i % 5) for i, s in enumerate(labels.sequences)]


def test_a_split_by_positions_counts_them_and_warns_of_few(tmp_path: Path) -> None:
    from bioseq.specs.finetune import SplitSettings

    labels = replace(_table(tmp_path / "t.csv", _rows(300, 1)), part=None, wild_type=WILD)
    own = make_split(labels, SplitSettings(kind="position"), measure=False)
    assert own.how["families"]["test"] == len(set(own.groups[own.part == TEST])) < 10
    # the same in a file's own split, whose intervals then resample positions, not rows
    told = make_split(replace(labels, part=own.part.clip(0)), measure=False)
    assert told.how["kept_apart"] == "mutated positions"
    groups, _ = told.tested(told.places(TEST))
    assert len(np.unique(groups)) == own.how["families"]["test"] < len(groups)
    for split in (own, told):
        assert any("mutated positions; with fewer than 10" in w for w in split.warnings)


def test_a_library_of_four_sites_is_resampled_by_row(tmp_path: Path) -> None:
    rows = {WILD: "train"}
    rng = np.random.default_rng(0)
    while len(rows) < 300:
        s = _changed(
            WILD,
            {
                at: str(rng.choice(list("ACDEFGHIKL")))
                for at in rng.permutation([2, 5, 9, 14])[: rng.integers(1, 5)]
            },
        )
        rows[s] = "train" if sum(a != b for a, b in zip(s, WILD)) <= 2 else "test"
    split = make_split(_table(tmp_path / "t.csv", list(rows.items())), measure=False)
    assert split.kind == "mutations"
    groups, by = split.tested(split.places(TEST))
    assert len(np.unique(groups)) == len(groups) and by.startswith("row")


def test_labels_that_fall_with_fitness_make_no_head_and_no_zero_shot_score_worse() -> None:
    """The sign of the zero-shot score is that of the rows fitted on; the test part has no say in it."""
    from bioseq.heads.features import Context, compute
    from training.finetune.evaluation.baselines import sequence_baselines
    from training.finetune.metrics import main_score
    from training.finetune.models.frozen import AUGMENTED, fit_frozen
    from training.finetune.models.rows import Held, Rows
    from training.tables.dealing import grouped_folds

    rng = np.random.default_rng(0)
    sequences = sorted(
        {
            _changed(WILD, dict(zip(rng.choice(22, 2, replace=False).tolist(), rng.choice(list("ACDEW"), 2))))
            for _ in range(120)
        }
    )
    context = Context(WILD, tuple(range(22)), rng.normal(size=(22, 20)).astype(np.float32))
    truth = compute("masked_marginal", sequences, context)
    nothing = np.zeros((len(sequences), 1), np.float32)
    found = {}
    for sign in (1.0, -1.0):
        y = (sign * truth + rng.normal(0, 0.3, truth.shape)).astype(np.float64)
        rows = Rows(
            nothing[:60], sequences[:60], y[:60], np.ones(60), grouped_folds(np.arange(60)), True, context
        )
        held = Held(nothing[60:], sequences[60:])
        fit = fit_frozen("regression", rows, 1, models=("linear",), sets=(AUGMENTED[1],))
        head = main_score("regression", y[60:], fit.outputs(held.matrix(AUGMENTED[1], context, rows.trained)))
        others = sequence_baselines("regression", rows, held, 1)
        found[sign] = head, main_score("regression", y[60:], others["zero_shot"])
    assert min(*found[1.0], *found[-1.0]) > 0.8
    # where train and test disagree, the sign is that of the training rows
    rows = replace(rows, y=-rows.y)
    assert (
        main_score("regression", y[60:], sequence_baselines("regression", rows, held, 1)["zero_shot"]) < -0.8
    )


def test_the_loss_of_all_members_at_once_is_the_sum_of_each_alone() -> None:
    import torch

    from training.finetune.models.linear import mean_loss, task_loss
    from training.finetune.models.network import _squares

    out, y, weight = torch.randn(5, 12, 2), torch.randn(12, 2), torch.rand(12)
    y[::3, 0] = torch.nan
    each = [mean_loss(task_loss("regression", o, y, weight, torch.ones(1))) for o in out]
    torch.testing.assert_close(_squares(out, y, weight), torch.stack(each).sum())
