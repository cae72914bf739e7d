"""Surrogates and simulations on small synthetic landscapes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from bioseq.errors import TableError
from training.campaigns.choosing import Method, _front
from training.campaigns.command import main
from training.campaigns.simulate import Setting, curves, paired, replay
from training.campaigns.surrogates import SIMILAR, Eyes, Forest, Gaussian, View, Warp, Warped, compete

GRID = np.array(list(itertools.product(range(20), repeat=2)), np.uint8)[1:]


@pytest.fixture(scope="module")
def landscape() -> tuple[Eyes, View, np.ndarray]:
    rng = np.random.default_rng(1)
    effect = rng.multivariate_normal(np.zeros(20), SIMILAR, size=2)
    y = effect[0][GRID[:, 0]] + effect[1][GRID[:, 1]] + effect[0][GRID[:, 0]] * effect[1][GRID[:, 1]]
    eyes = Eyes(np.zeros(2, np.uint8), effect + rng.normal(size=(2, 20)))
    eyes.fit_scale(GRID)
    return eyes, eyes.look(GRID), y


def test_the_process_learns_and_its_draws_agree_with_its_mean(
    landscape: tuple[Eyes, View, np.ndarray],
) -> None:
    eyes, pool, y = landscape
    train = np.random.default_rng(0).permutation(len(y))[:120]
    rest = np.setdiff1d(np.arange(len(y)), train)
    model = Gaussian(eyes, epistasis=True)
    model.fit(pool[train], y[train], np.ones(120))
    assert np.corrcoef(model.mean(pool[rest]), y[rest])[0, 1] > 0.7
    draws = model.draws(pool[rest[:50]], 3000, np.random.default_rng(0))
    assert np.allclose(draws.mean(0), model.mean(pool[rest[:50]]), atol=0.1 * y.std())
    assert np.allclose(draws.std(0), model.sd(pool[rest[:50]]), rtol=0.15, atol=0.02)


def test_contest_keeps_families_together_and_covers(landscape: tuple[Eyes, View, np.ndarray]) -> None:
    eyes, pool, y = landscape
    train = np.random.default_rng(0).permutation(len(y))[:120]
    contest = compete(
        pool[train],
        y[train],
        np.ones(120),
        [Gaussian(eyes, epistasis=True), Gaussian(eyes, epistasis=False), Forest(eyes, 0)],
    )
    assert set(contest.scores) == {"gaussian process", "augmented ridge", "forest"}
    assert 0.5 < contest.coverage <= 1.0


def test_the_process_of_ranks_sees_order_alone_and_answers_in_values(
    landscape: tuple[Eyes, View, np.ndarray],
) -> None:
    eyes, pool, y = landscape
    train, rest = np.arange(0, len(y), 3), np.arange(1, len(y), 3)
    found = []
    for values in (y, np.exp(2 * y)):  # the same order
        model = Warped(Gaussian(eyes, epistasis=True))
        model.fit(pool[train], values[train], np.ones(len(train)))
        found.append(model.mean(pool[rest]))
        assert np.corrcoef(model.mean(pool[train]), values[train])[0, 1] > 0.8
        assert (model.sd(pool[rest]) > 0).all()
    assert np.array_equal(np.argsort(found[0], kind="stable"), np.argsort(found[1], kind="stable"))
    warp = Warp(np.array([1.0, 2, 2, 5]))
    assert np.allclose(warp.back(warp(np.array([1.0, 2, 5]))), [1, 2, 5])
    assert warp.back(np.array([9.0]))[0] > 5 and warp.back(np.array([-9.0]))[0] < 1
    assert Warp(np.full(3, 7.0)).back(np.array([-1.0, 4])).tolist() == [7, 7]  # a fold of one value


def test_pareto_front() -> None:
    goals = np.array([[3.0, 2, 1, 0], [0, 2, 1, 3]])
    rng = np.random.default_rng(0)
    assert {_front(goals, np.zeros(4, bool), rng) for _ in range(50)} == {0, 1, 3}
    assert _front(goals[:1], np.array([True, False, False, False]), rng) == 1


def test_simulation_beats_random_and_repeats(landscape: tuple[Eyes, View, np.ndarray]) -> None:
    eyes, pool, y = landscape
    setting = Setting(3, 16, noise=0.1, failed=0.1)
    first = replay(eyes, pool, y, setting, 0, "campaign", Method())
    assert [r.tolist() for r in first] == [
        r.tolist() for r in replay(eyes, pool, y, setting, 0, "campaign", Method())
    ]
    together = np.concatenate(first)
    assert len(set(together.tolist())) == len(together) < 48
    gain = [
        curves(replay(eyes, pool, y, setting, s, "campaign"), y)["best"][-1]
        - curves(replay(eyes, pool, y, setting, s, "random"), y)["best"][-1]
        for s in range(4)
    ]
    assert np.mean(gain) > 0


def test_paired_interval() -> None:
    mean, low, high = paired(np.arange(20.0), np.arange(20.0) - 1)
    assert mean == low == high == 1
    assert paired(np.ones(1), np.zeros(1)) == [1, None, None]


def test_simulate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wt.fasta").write_text(">w\nMKT\n")
    letters = "ACDEFGHI"
    rows = [f"K2{a}:T3{b},{i % 7}" for i, (a, b) in enumerate(itertools.product(letters, letters))]
    (tmp_path / "t.csv").write_text("\n".join(["variant,fitness", *rows]) + "\n")
    base = ["simulate", str(tmp_path / "t.csv"), "--wild-type", str(tmp_path / "wt.fasta"), "--no-prior"]
    assert main([*base, "--rounds", "2", "--batch", "8", "--seeds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["campaign"]["best"]) == 2 and "campaign - random" in found
    (tmp_path / "t.csv").write_text("\n".join(["variant,fitness", *rows, "K2A,high"]) + "\n")
    with pytest.raises(TableError, match="line 66, column 'fitness'"):
        main(base)
