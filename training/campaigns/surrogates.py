"""Models of an objective over variants: ridge, Gaussian process, forest; and their contest by grouped cross-validation.

The kernels see a variant as its mutations X (sparse [N, 20 S]) and compare mutations by a block for each site,
M = own residue + BLOSUM62 similarity + same site. The additive part is X M X'; the other is a squared exponential of the
distance that M defines, for epistasis. The zero-shot score and the number of mutations enter as linear terms of the
mean with wide priors. Amplitudes and noise come from the marginal likelihood (Rasmussen & Williams 2006, ch. 5).
scikit-learn's regressor would build dense features of 20 S columns; the two formulas needed stand here instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.stats import norm, rankdata
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import GroupKFold

from bioseq.homologs.matrix import BLOSUM62
from bioseq.ranking import spearman

CODES = 20
MARGIN = 0.05  # of Spearman: held-out ranks say little of which variants are the very best


def _similar() -> np.ndarray:
    scores = BLOSUM62.astype(float)
    root = np.sqrt(np.diag(scores))
    values, vectors = np.linalg.eigh(scores / np.outer(root, root))
    return (vectors * np.maximum(values, 1e-3)) @ vectors.T


SIMILAR = _similar()


@dataclass
class View:
    """Variants as the surrogates see them. `linear` float [N, 2]: zero-shot score and number of mutations, scaled."""

    codes: np.ndarray
    X: sparse.csr_matrix
    linear: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> View:
        return View(self.codes[rows], self.X[rows], self.linear[rows])


@dataclass
class Eyes:
    """Makes views of one campaign's variants. `prior` float [S, 20] at the space's sites."""

    wild: np.ndarray
    prior: np.ndarray
    centre: float = 0.0
    scale: float = 1.0

    def score(self, codes: np.ndarray) -> np.ndarray:
        return sum((self.prior[s][codes[:, s]] for s in range(codes.shape[1])), np.zeros(len(codes)))

    def look(self, codes: np.ndarray) -> View:
        rows, sites = np.nonzero(codes != self.wild)
        at = sites * CODES + codes[rows, sites]
        X = sparse.csr_matrix((np.ones(len(rows)), (rows, at)), shape=(len(codes), CODES * codes.shape[1]))
        count = np.asarray(X.sum(1)).ravel()
        return View(codes, X, np.c_[(self.score(codes) - self.centre) / self.scale, (count - 3) / 3])

    def fit_scale(self, codes: np.ndarray) -> None:
        scores = self.score(codes)
        self.centre, self.scale = float(scores.mean()), float(scores.std()) or 1.0

    def blocks(self, own: float, alike: float, site: float) -> sparse.csr_matrix:
        blocks = []
        for w in self.wild:
            c = SIMILAR - SIMILAR[[w]] - SIMILAR[:, [w]] + SIMILAR[w, w]
            blocks.append(own * np.eye(CODES) + alike * c / 2 + site)
        return sparse.block_diag(blocks, format="csr")


class Surrogate(Protocol):
    name: str
    noise_sd: float

    def fit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None: ...
    def refit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None: ...
    def mean(self, view: View) -> np.ndarray: ...
    def sd(self, view: View) -> np.ndarray: ...
    def draws(self, view: View, count: int, rng: np.random.Generator) -> np.ndarray: ...


class Warp:
    """Values as normal scores of their ranks, and back: linear between the values seen, and beyond them as steep as
    between the outer tenth."""

    def __init__(self, y: np.ndarray):
        scores = norm.ppf((rankdata(y) - 0.5) / len(y))
        self.y, at = np.unique(y, return_index=True)
        self.z = scores[at]

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return np.interp(y, self.y, self.z)

    def back(self, z: np.ndarray) -> np.ndarray:
        y, k = np.interp(z, self.z, self.y), max(1, len(self.y) // 10)
        if len(self.y) == 1:
            return y
        for end, inner, beyond in ((0, k, np.minimum), (-1, -1 - k, np.maximum)):
            slope = (self.y[end] - self.y[inner]) / (self.z[end] - self.z[inner])
            y = y + slope * beyond(z - self.z[end], 0)
        return y


class Warped:
    """A Gaussian process of the values' normal scores, for objectives that are skewed or in two heaps."""

    def __init__(self, inner: Gaussian):
        self.inner, self.name, self.noise_sd = inner, f"{inner.name} of ranks", 0.0

    def fit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None:
        self.warp = Warp(y)
        self.inner.fit(view, self.warp(y), noise)

    def refit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None:
        self.warp = Warp(y)
        self.inner.refit(view, self.warp(y), noise)

    def mean(self, view: View) -> np.ndarray:
        return self.warp.back(self.inner.mean(view))

    def sd(self, view: View) -> np.ndarray:
        """Half of the distance of the quantiles one standard deviation to both sides, the noise of a well among it."""
        mean, sd = self.inner.mean(view), np.hypot(self.inner.sd(view), self.inner.noise_sd)
        return (self.warp.back(mean + sd) - self.warp.back(mean - sd)) / 2 + 1e-9

    def draws(self, view: View, count: int, rng: np.random.Generator) -> np.ndarray:
        return self.warp.back(self.inner.draws(view, count, rng))


class Gaussian:
    """A Gaussian process; `epistasis` adds the squared exponential, without it this is augmented ridge regression."""

    def __init__(self, eyes: Eyes, *, epistasis: bool, prior: bool = True):
        self.name = "gaussian process" if epistasis else "augmented ridge"
        self.M = eyes.blocks(0.5, 1.0, 0.3) if epistasis else eyes.blocks(1.0, 0.0, 0.0)
        self.epistasis, self.columns = epistasis, [0, 1] if prior else [1]
        self.chosen, self.noise_sd = (0.0, 1.0, 0.1), 0.0

    def _parts(self, a: View, b: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        add = np.asarray(a.X @ (self.M @ b.X.T).toarray())
        ka = np.asarray((a.X @ self.M).multiply(a.X).sum(1)).ravel()
        kb = np.asarray((b.X @ self.M).multiply(b.X).sum(1)).ravel()
        square = np.maximum(ka[:, None] + kb - 2 * add, 0) if self.epistasis else np.zeros((1, 1))
        return add, square, a.linear[:, self.columns] @ b.linear[:, self.columns].T

    def _kernel(
        self, parts: tuple[np.ndarray, np.ndarray, np.ndarray], share: float, length: float
    ) -> np.ndarray:
        add, square, linear = parts
        kernel = (1 - share) * add / 2 + linear + 1.0
        if share:
            kernel += 2 * share * np.exp(-square / (2 * length**2))
        return kernel

    def fit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None:
        """`noise` float [n]: variance of each value relative to a single well's (1 for one replicate)."""
        parts = self._parts(view, view)
        target = (y - y.mean()) / (y.std() or 1.0)
        found = []
        shapes = (
            [(s, w) for s in (0.3, 0.6, 0.9) for w in (1.0, 2.0, 4.0)] if self.epistasis else [(0.0, 1.0)]
        )
        for share, length in shapes:
            kernel = self._kernel(parts, share, length)
            for level in (0.02, 0.1, 0.3, 1.0, 3.0):
                factor = cholesky(kernel + np.diag(level * noise + 1e-8), lower=True, check_finite=False)
                white = solve_triangular(factor, target, lower=True, check_finite=False)
                likelihood = -np.log(np.diag(factor)).sum() - 0.5 * len(y) * np.log(white @ white)
                found.append((likelihood, (share, length, level)))
        self.chosen = max(found)[1]
        self.refit(view, y, noise, parts)

    def refit(
        self,
        view: View,
        y: np.ndarray,
        noise: np.ndarray,
        parts: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """With the shape chosen before."""
        share, length, level = self.chosen
        kernel = self._kernel(parts or self._parts(view, view), share, length)
        self.centre, self.scale, self.view = float(y.mean()), float(y.std()) or 1.0, view
        target = (y - self.centre) / self.scale
        self.factor = cholesky(kernel + np.diag(level * noise + 1e-8), lower=True, check_finite=False)
        self.weights = cho_solve((self.factor, True), target, check_finite=False)
        self.amplitude = float(np.sqrt(max(target @ self.weights / len(y), 1e-6)))
        self.noise_sd = self.amplitude * self.scale * float(np.sqrt(level))

    def mean(self, view: View) -> np.ndarray:
        share, length, _ = self.chosen
        out = [
            self._kernel(self._parts(view[at], self.view), share, length) @ self.weights
            for at in (slice(i, i + 8192) for i in range(0, len(view), 8192))
        ]
        return np.concatenate(out) * self.scale + self.centre

    def _joint(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        share, length, _ = self.chosen
        cross = self._kernel(self._parts(view, self.view), share, length)
        half = solve_triangular(self.factor, cross.T, lower=True, check_finite=False)
        covariance = self._kernel(self._parts(view, view), share, length) - half.T @ half
        return cross @ self.weights, covariance

    def sd(self, view: View) -> np.ndarray:
        out = [np.diag(self._joint(view[slice(i, i + 1024)])[1]) for i in range(0, len(view), 1024)]
        return np.sqrt(np.maximum(np.concatenate(out), 1e-9)) * self.amplitude * self.scale

    def draws(self, view: View, count: int, rng: np.random.Generator) -> np.ndarray:
        """float [count, N] from the joint posterior."""
        mean, covariance = self._joint(view)
        factor = cholesky(covariance + 1e-5 * np.eye(len(view)), lower=True, check_finite=False)
        spread = (factor @ rng.standard_normal((len(view), count))).T * self.amplitude
        return (mean + spread) * self.scale + self.centre


class Forest:
    """Extremely randomised trees on summaries of the mutations and, with few sites, residue properties by site."""

    name = "forest"

    def __init__(self, eyes: Eyes, seed: int):
        values, vectors = np.linalg.eigh(SIMILAR)
        self.properties = vectors[:, -5:] * np.sqrt(values[-5:])
        self.eyes, self.seed, self.noise_sd = eyes, seed, 0.0

    def _features(self, view: View) -> np.ndarray:
        by_site = self.properties[view.codes]  # [N, S, 5]
        moved = by_site - self.properties[self.eyes.wild]
        single = np.stack([self.eyes.prior[s][view.codes[:, s]] for s in range(view.codes.shape[1])], 1)
        parts = [view.linear, single.min(1)[:, None], moved.sum(1), np.abs(moved).sum(1)]
        if view.codes.shape[1] <= 12:
            parts.append(by_site.reshape(len(view), -1))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def fit(self, view: View, y: np.ndarray, noise: np.ndarray) -> None:
        self.trees = ExtraTreesRegressor(
            60, min_samples_leaf=2, max_features=0.5, bootstrap=True, random_state=self.seed, n_jobs=1
        )
        self.trees.fit(self._features(view), y, sample_weight=1 / noise)
        self.noise_sd = float(np.std(y - self.trees.predict(self._features(view))))

    refit = fit

    def _each(self, view: View) -> np.ndarray:
        features = self._features(view)
        return np.stack([tree.predict(features) for tree in self.trees.estimators_])

    def mean(self, view: View) -> np.ndarray:
        return np.concatenate(
            [
                self.trees.predict(self._features(view[slice(i, i + 20_000)]))
                for i in range(0, len(view), 20_000)
            ]
        )

    def sd(self, view: View) -> np.ndarray:
        return self._each(view).std(0) + 1e-9

    def draws(self, view: View, count: int, rng: np.random.Generator) -> np.ndarray:
        """Means of five trees drawn at random: single trees are too rough."""
        each = self._each(view)
        return np.stack([each[rng.integers(len(each), size=5)].mean(0) for _ in range(count)])


def families(view: View) -> np.ndarray:
    """Each variant's commonest mutation: variants that share it are held out together."""
    common = np.asarray(view.X.sum(0)).ravel()
    out = np.full(len(view), -1)
    for i in range(len(view)):
        own = view.X.indices[view.X.indptr[i] : view.X.indptr[i + 1]]
        if len(own):
            out[i] = own[np.argmax(common[own])]
    return out


@dataclass
class Contest:
    """`scores`: Spearman of held-out families by surrogate. `predicted`, `sd` [n] of the winner, held out."""

    winner: Surrogate
    scores: dict[str, float]
    predicted: np.ndarray
    sd: np.ndarray
    coverage: float  # of 80 % intervals


def compete(view: View, y: np.ndarray, noise: np.ndarray, entrants: list[Surrogate]) -> Contest:
    """Fits every entrant to all data and, in the shape chosen there, to five parts of it. The first entrant stays unless
    another is better by MARGIN."""
    groups = families(view)
    folds = min(5, len(set(groups.tolist())))
    results = []
    for model in entrants:
        model.fit(view, y, noise)
        predicted, sd = np.full(len(y), y.mean()), np.full(len(y), y.std() + 1e-9)
        if folds > 1 and (len(entrants) > 1 or len(y) >= 5):
            for train, test in GroupKFold(folds).split(y, groups=groups):
                model.refit(view[train], y[train], noise[train])
                predicted[test] = model.mean(view[test])
                sd[test] = np.hypot(model.sd(view[test]), model.noise_sd)
            model.refit(view, y, noise)
        rho = spearman(predicted, y)
        results.append((float(rho) if np.isfinite(rho) else 0.0, model, predicted, sd))
    best = results[0]
    for other in results[1:]:
        if other[0] > best[0] + MARGIN:
            best = other
    covered = float((np.abs(best[2] - y) <= 1.2816 * best[3]).mean())
    return Contest(best[1], {m.name: round(s, 4) for s, m, *_ in results}, best[2], best[3], covered)
