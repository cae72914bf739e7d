"""Dealing rows to train, validation and test so that the test tells how well a head will do on new proteins.

Homologous proteins on both sides of a split make a head look better than it is. So the default deals whole clusters of
similar sequences, and variants of one protein by distance from the wild type or by position. A random split is made
when it is asked for, or where no other leaves enough rows, and every split reports the similarity that it left between
the sides. Cross-validation and the bootstrap keep together what the split keeps together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from bioseq.errors import TableError
from bioseq.homologs.clusters import cluster, leakage
from bioseq.specs.finetune import SplitKind, SplitSettings
from training.tables.dealing import Folds, deal, families, grouped_folds, position_folds, strata
from training.tables.labels import TEST, TRAIN, VALID, Labels
from training.tables.variants import Variants, find_variants, kept_apart

FEW_FAMILIES = 10
FEW_SITES = 8  # a library over at most so many positions is about residues, not about other positions
FOLDS = 5
ROW, FIRST, GIVEN = "row", "first mutated position", "the file's cluster column"
SETS = "set of mutated positions"
TEST_ROWS, TEST_SHARE = (
    30,
    0.05,
)  # a default split of variants leaves as many to test, or the next kind is taken


@dataclass(frozen=True)
class Split:
    """`part` int [N] of TRAIN, VALID, TEST (-1: left out). `how` tells the way, its settings and the leakage.
    `groups` int [N]: rows that belong together when rows are resampled. `variants` if the table holds variants of one
    protein; `also` other kinds of split worth reporting."""

    part: np.ndarray
    groups: np.ndarray
    how: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    variants: Variants | None = None
    also: tuple[SplitKind, ...] = ()

    def places(self, part: int) -> np.ndarray:
        return np.flatnonzero(self.part == part)

    @property
    def kind(self) -> str:
        """What the split keeps apart; a file's own split of variants is looked at for it."""
        kind: str = self.how["kind"]
        if kind == "column" and self.variants is not None:
            kind = kept_apart(self.variants, self.part) or kind
        return kind

    @property
    def given(self) -> bool:
        """Whether the file says what belongs together, which then holds whatever else the split keeps apart."""
        return self.how.get("groups") == GIVEN

    def resampled(self, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` are resampled together: `groups`, or of variants that mutate the same positions, where the
        split keeps positions or numbers of mutations apart."""
        if self.variants is not None and not self.given and self.kind in ("position", "mutations"):
            return self.variants.site_sets[rows]
        return self.groups[rows]

    def tested(self, rows: np.ndarray) -> tuple[np.ndarray, str]:
        """(which of the test part's `rows` are resampled together for the interval of a score, by what)."""
        kind, variants = self.kind, None if self.given else self.variants
        if variants is not None and kind == "mutations" and len(variants.sites) <= FEW_SITES:
            # its sets of positions are all there are, too few to resample, and new variants have the same ones
            return np.arange(len(rows)), f"row, as the table varies at {len(variants.sites)} positions alone"
        if variants is not None and kind == "mutations":
            return self.resampled(rows), SETS
        return self.groups[rows], self.how.get("groups", ROW)

    def folds(self, rows: np.ndarray, *, seed: int = 0) -> tuple[Folds, str]:
        """(folds over `rows`, as places in `rows`; by what they are grouped): by what the split itself groups by, or by
        rows where that puts all of them together."""
        found, way = self._folds(rows, seed)
        if found:
            return found, way
        alone = f"row, as all of them are one group by {way}"
        return grouped_folds(np.arange(len(rows)), FOLDS, seed), alone

    def _folds(self, rows: np.ndarray, seed: int) -> tuple[Folds, str]:
        kind = ROW if self.given else self.kind
        if kind == "position" and self.variants is not None:
            contiguous = self.how.get("mode") == "contiguous"
            found = position_folds(self.variants.differs[rows], FOLDS, contiguous=contiguous)
            if sum(len(valid) for _, valid in found) >= len(rows) / 2:
                return found, "mutated position"
            # most rows mutate positions of several folds, and would be measured in none
        if kind == "mutations" and self.variants is not None:
            folds = grouped_folds(self.variants.order[rows], FOLDS, seed)
            folds = [f for f in folds if min(map(len, f)) >= 10]
            # Of two folds one trains on the single substitutions alone: too few to say what all would.
            if len(folds) >= 3:
                return folds, "number of mutations"
        if kind in ("position", "mutations") and self.variants is not None:
            return grouped_folds(self.variants.site_sets[rows], FOLDS, seed), SETS
        return grouped_folds(self.groups[rows], FOLDS, seed), self.how.get("groups", ROW)

    def families_in(self, rows: np.ndarray) -> int:
        return len(np.unique(self.groups[rows]))


def make_split(
    labels: Labels, settings: SplitSettings | None = None, *, seed: int = 0, measure: bool = True
) -> Split:
    """Deal the rows. Raises `TableError` if a part would be too small to train, choose or test.

    Without a kind the first of these that leaves enough rows is taken: the file's own split; for variants of one
    protein by order (several orders) or position (with a random split beside it); else by sequence cluster; else at
    random. With `column` and no test rows, the file's validation rows are the held-out part, and a
    validation part is dealt from its training rows. `measure` searches for leakage.
    """
    settings = settings or SplitSettings()
    variants = find_variants(labels)
    if settings.kind is not None:
        return _split(labels, variants, settings.kind, settings, seed, measure)
    if labels.part is not None:
        return _split(labels, variants, "column", settings, seed, measure)
    if variants is None:
        kinds: list[SplitKind]
        kinds, mode = ["cluster", "random"], settings.position_mode
    elif variants.singles_only:
        kinds, mode = ["position", "random"], settings.position_mode or "modulo"
    else:
        kinds, mode = ["mutations", "position", "random"], settings.position_mode or "modulo"
    settings = replace(settings, position_mode=mode)
    skipped: list[str] = []
    while True:
        kind = kinds.pop(0)
        try:
            split = _split(labels, variants, kind, settings, seed, measure)
            if variants is not None and kind != "random":
                _enough_to_test(split)
        except TableError as error:
            if not kinds:
                raise
            skipped.append(f"a split by {kind} is not possible: {error}")
            continue
        also: tuple[SplitKind, ...] = ("random",) if kind == "position" else ()
        return replace(split, warnings=(*skipped, *split.warnings), also=also)


def _enough_to_test(split: Split) -> None:
    """Raise `TableError` where a split that nobody asked for leaves too few rows to tell one head from another."""
    n, count = len(split.part), int((split.part == TEST).sum())
    least = min(max(TEST_ROWS, TEST_SHARE * n), n / 10)  # of small tables a random split would leave few more
    if count < least:
        raise TableError(f"{count} rows in the test part; at least {least:.0f} are wanted of {n}.")


def _split(
    labels: Labels, variants: Variants | None, kind: str, settings: SplitSettings, seed: int, measure: bool
) -> Split:
    rng = np.random.default_rng(seed)
    n = len(labels)
    how: dict[str, Any] = {"kind": kind, "seed": seed}
    if variants is not None:
        how["table"] = variants.note
    groups = np.arange(n)
    if kind == "column":
        if labels.part is None:
            raise TableError("the file has no `set` column.", hint="Choose another split.")
        groups, how["groups"] = _groups(labels, variants, settings.identity, measure)
        part = _by_column(labels, variants, groups, settings, rng, how)
        if variants is not None:
            apart = kept_apart(variants, part)
            how["kept_apart"] = {"mutations": "numbers of mutations", "position": "mutated positions"}.get(
                apart or "", "nothing but rows"
            )
            if apart == "position" and how["groups"] != GIVEN:
                groups, how["groups"] = variants.first_sites, FIRST
    elif kind == "cluster":
        groups, way = _clusters(labels, settings.identity)
        how |= {"clusters": int(groups.max()) + 1, "groups": way, "identity": settings.identity}
        part = deal(groups, settings.valid, settings.test, rng, strata(labels))
    elif kind == "random":
        groups, how["groups"] = _groups(labels, variants, settings.identity, measure)
        part = deal(np.arange(n), settings.valid, settings.test, rng, strata(labels))
    elif kind in ("mutations", "position"):
        if variants is None:
            raise TableError(
                f"a split by {kind} needs variants of one protein.",
                hint="Give the wild type with --wild-type.",
            )
        if kind == "mutations":
            told = _clusters(labels, settings.identity) if _told(labels) else None
            part = _by_mutations(variants, settings, rng, how, told)
        else:
            part = _by_position(variants, settings, how)
            groups, how["groups"] = variants.first_sites, FIRST
        if _told(labels):
            groups, how["groups"] = _clusters(labels, settings.identity)
    else:
        raise TableError(f"unknown split {kind!r}.")
    how |= {name: int((part == p).sum()) for name, p in (("train", TRAIN), ("valid", VALID), ("test", TEST))}
    _enough(labels, part)
    warnings = []
    if how.get("groups", ROW) != ROW:
        how["families"] = families(groups, part)
        one, several, others = (
            ("mutated position", "mutated positions", "positions")
            if how["groups"] == FIRST
            else ("family of similar sequences", "families of similar sequences", "proteins")
        )
        for name, count in how["families"].items():
            if count < FEW_FAMILIES <= how[name]:
                warnings.append(
                    f"the {name} part holds {count} {one if count == 1 else several}; with fewer than {FEW_FAMILIES} its "
                    f"figures say little about other {others}."
                )
    if measure and variants is None:
        how["leakage"] = leakage(
            labels.sequences,
            np.flatnonzero(part == TRAIN),
            np.flatnonzero(part == TEST),
            seed=seed,
            alphabet=labels.alphabet,
        )
        level = "30" if "share_over_30" in how["leakage"] else "50"
        over = how["leakage"].get(f"share_over_{level}", 0.0)
        if kind == "random" or over > 0.1:
            warnings.append(
                f"{over:.0%} of the test sequences have a training sequence of at least {level} % identity "
                f"({how['leakage'].get('way', '')}): expect worse results on new proteins."
            )
    elif variants is not None and (kind == "random" or how.get("kept_apart") == "nothing but rows"):
        warnings.append(
            f"a {'random split' if kind == 'random' else 'split'} of variants of one protein by rows alone: test variants "
            "have close neighbours in train."
        )
    return Split(part, groups, how, tuple(warnings), variants)


def _clusters(labels: Labels, identity: float) -> tuple[np.ndarray, str]:
    if labels.cluster:
        return np.unique(labels.cluster, return_inverse=True)[1], GIVEN
    return cluster(labels.sequences, identity=identity, alphabet=labels.alphabet)


def _told(labels: Labels) -> bool:
    """Whether the file has clusters that tell its rows apart; all variants of one protein may share one."""
    return len(set(labels.cluster or ())) > 1


def _groups(
    labels: Labels, variants: Variants | None, identity: float, measure: bool
) -> tuple[np.ndarray, str]:
    """What belongs together where the split itself does not say: clusters, or each variant alone."""
    if _told(labels) or (variants is None and (labels.cluster or measure)):
        return _clusters(labels, identity)
    return np.arange(len(labels)), ROW


def _by_column(
    labels: Labels,
    variants: Variants | None,
    groups: np.ndarray,
    settings: SplitSettings,
    rng: np.random.Generator,
    how: dict[str, Any],
) -> np.ndarray:
    assert labels.part is not None
    part = labels.part.copy()
    if not (part == TEST).any():
        part[part == VALID] = TEST
        how["held_out"] = "the file's validation rows (it has no test rows)"
    if not (part == VALID).any() and (part == TRAIN).any():
        rows = np.flatnonzero(part == TRAIN)
        if variants is not None and how["groups"] != GIVEN and kept_apart(variants, part):
            chosen, way = _validation((variants.site_sets, SETS), rows, settings.valid, rng)
        else:
            dealt = deal(groups[rows], settings.valid, 1e-9, rng, strata(labels.take(rows)))
            chosen, way = rows[dealt == VALID], how["groups"]
        part[chosen] = VALID
        how["validation"] = f"{settings.valid:g} of the training rows, by {way}"
    return part


def _validation(
    kept: tuple[np.ndarray, str], rows: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """About `share` of `rows` to choose on, and by what they were drawn: whole groups (sets of mutated positions, or
    the file's clusters), so that they are no near copies of training rows, or rows where there are few groups."""
    sets = kept[0][rows]
    if len(np.unique(sets)) < FEW_FAMILIES:
        return rng.permutation(rows)[: round(share * len(rows))], "row"
    draw = GroupShuffleSplit(1, test_size=share, random_state=int(rng.integers(2**31)))
    return rows[next(draw.split(rows, groups=sets))[1]], kept[1]


def _by_mutations(
    variants: Variants,
    settings: SplitSettings,
    rng: np.random.Generator,
    how: dict[str, Any],
    told: tuple[np.ndarray, str] | None,
) -> np.ndarray:
    order, limit = variants.order, settings.train_mutations
    if limit is None:
        n = len(order)

        def fits(m: int) -> bool:
            near = int((order <= m).sum())
            return near >= max(50, n / 10) and n - near >= min(max(TEST_ROWS, TEST_SHARE * n), n / 10)

        possible = [m for m in range(1, int(order.max())) if fits(m)]
        if not possible:
            raise TableError("no number of mutations leaves enough rows on both sides.")
        limit = 2 if 2 in possible else possible[0]
    how["train_mutations"] = limit
    part = np.where(order <= limit, TRAIN, TEST)
    near = np.flatnonzero(part == TRAIN)
    chosen, way = _validation(told or (variants.site_sets, SETS), near, settings.valid, rng)
    part[chosen] = VALID
    how["validation"] = f"{settings.valid:g} of the rows of at most {limit} mutations, by {way}"
    return part


def _by_position(variants: Variants, settings: SplitSettings, how: dict[str, Any]) -> np.ndarray:
    """Positions that vary are dealt; a variant belongs to the part that holds all its positions, the wild type
    to train; variants across parts are left out (-1)."""
    sites = variants.sites
    count = len(sites)
    if count < 3:
        raise TableError(f"{count} varied positions cannot be dealt to three parts.")
    mode = settings.position_mode or "contiguous"
    place = np.arange(count)
    if mode == "contiguous":
        n_test, n_valid = max(1, round(settings.test * count)), max(1, round(settings.valid * count))
        part_of = np.select(
            [place >= count - n_test, place >= count - n_test - n_valid], [TEST, VALID], TRAIN
        )
    else:
        every = max(3, round(1 / max(settings.test, settings.valid)))
        part_of = np.select([place % every == every - 1, place % every == every // 2], [TEST, VALID], TRAIN)
    varied = np.array(sites)
    hit = np.stack([variants.differs[:, varied[part_of == p]].any(1) for p in (TRAIN, VALID, TEST)])
    part = np.where(hit.sum(0) > 1, -1, np.where(hit.any(0), hit.argmax(0), TRAIN))
    how |= {"mode": mode, "left_out": int((part == -1).sum())}
    return part


def _enough(labels: Labels, part: np.ndarray) -> None:
    for name, p, least in (("training", TRAIN, 10), ("validation", VALID, 3), ("test", TEST, 3)):
        count = int((part == p).sum())
        if count < least:
            raise TableError(
                f"{count} rows in the {name} part; at least {least} are needed of {len(labels)}.",
                hint="Label more rows, or choose another split.",
            )
    for j, name in enumerate(labels.targets):
        for where, p in (("validation", VALID), ("test", TEST)):
            if labels.task != "per_residue" and np.isnan(labels.y[part == p, j]).all():
                raise TableError(f"column {name!r} has no label in the {where} part.")
    train = part == TRAIN
    if not labels.weights[train].any():
        raise TableError(
            "every training row has a weight of 0: nothing can be learnt.", hint="Give weights above 0."
        )
    if labels.task in ("binary", "multiclass"):
        seen = labels.y[train, 0]
        if len(np.unique(seen[~np.isnan(seen)])) < 2:
            raise TableError("the training part has one class only: nothing can be learnt.")
