"""A prepared corpus: memory-mapped token shards with a manifest.

Layout of the folder (format 1):

    manifest.json            counts, sha256 of every file, alphabet, sources, what was left out
    lengths.npy              int32 [N], residues of each record
    offsets.npy              int64 [N+1], first residue of each record in the shards laid end to end
    tokens-00000.bin ...     uint8, residues' token ids, no special tokens; no record crosses a shard
    cluster_order.npy        int64 [N], records cluster by cluster      } with clusters only
    cluster_starts.npy       int64 [C+1], each cluster's begin in it    }
    homologs/...             what the homologs of each record say, if they were searched (`training.corpus.homologs`)
    sets/NAME.tokens.bin, sets/NAME.lengths.npy     held-out sets, for perplexity; never trained on

Nothing in it depends on time or host: the same sources and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import InputError
from training.corpus.homologs import Evidence, open_evidence

FORMAT = 1


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass
class Corpus:
    """An open corpus. Arrays are memory-mapped; see the module's docstring for shapes."""

    path: Path
    manifest: dict[str, Any]
    lengths: np.ndarray
    offsets: np.ndarray
    cluster_order: np.ndarray | None
    cluster_starts: np.ndarray | None
    _shards: list[np.ndarray]
    _firsts: np.ndarray
    evidence: Evidence | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def hash(self) -> str:
        """One hash over all files' hashes: what a model's card names as its training data."""
        return "sha256:" + self.manifest["hash"]

    def residues(self, record: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of (a stretch of) a record, uint8, a view of the mapped file."""
        shard = int(np.searchsorted(self._firsts, record, side="right")) - 1
        begin = int(self.offsets[record] - self.offsets[self._firsts[shard]]) + start
        size = int(self.lengths[record]) - start if length is None else length
        return self._shards[shard][begin : begin + size]

    def sets(self) -> dict[str, list[np.ndarray]]:
        """The held-out sets: name -> residues' ids of each record."""
        found = {}
        for name in self.manifest["sets"]:
            lengths = np.load(self.path / "sets" / f"{name}.lengths.npy")
            tokens = np.fromfile(self.path / "sets" / f"{name}.tokens.bin", dtype=np.uint8)
            found[name] = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return found

    def frequencies(self) -> np.ndarray:
        """Share of each token id among the training residues, float64 [V]."""
        counts = np.array(self.manifest["token_counts"], dtype=np.float64)
        return counts / counts.sum()


def read_records(folder: Path) -> Iterator[np.ndarray]:
    """The records of a corpus that is being written, from its shards and lengths."""
    lengths = np.load(folder / "lengths.npy")
    at = 0
    for file in sorted(folder.glob("tokens-*.bin")):
        tokens = np.memmap(file, dtype=np.uint8, mode="r")
        begin = 0
        while begin < len(tokens):
            yield np.array(tokens[begin : begin + lengths[at]])
            begin, at = begin + int(lengths[at]), at + 1


def hash_of(files: dict[str, dict[str, Any]]) -> str:
    """Hash over sorted (name, sha256) pairs."""
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_corpus(path: str | Path, *, verify: bool = True) -> Corpus:
    """Open and, with `verify`, read every file once and compare its hash.

    Raises `InputError`: no corpus there, another format, a file that is missing, cut or changed, no record.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} is not a prepared corpus: manifest.json: {error.strerror}.",
            hint="Make one with bioseq pretrain prepare.",
        ) from error
    except ValueError as error:
        raise InputError(f"{path / 'manifest.json'} is damaged: {error}.") from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path / 'manifest.json'}: format {manifest.get('format')!r}; {FORMAT} is known.")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise InputError(f"{file} is missing or not {entry['bytes']} bytes long, as the manifest says.")
        if verify and sha256(file) != entry["sha256"]:
            raise InputError(
                f"{file} does not match its hash in manifest.json.", hint="Prepare the corpus again."
            )
    if hash_of(manifest["files"]) != manifest["hash"]:
        raise InputError(f"{path / 'manifest.json'}: the hash does not match the files it lists.")
    if manifest["records"] == 0:
        raise InputError(f"the corpus {path} is empty.", hint="Prepare one with at least one sequence.")
    clustered = "cluster_order.npy" in manifest["files"]
    offsets = np.load(path / "offsets.npy", mmap_mode="r")
    return Corpus(
        path=path,
        manifest=manifest,
        lengths=np.load(path / "lengths.npy", mmap_mode="r"),
        offsets=offsets,
        cluster_order=np.load(path / "cluster_order.npy", mmap_mode="r") if clustered else None,
        cluster_starts=np.load(path / "cluster_starts.npy", mmap_mode="r") if clustered else None,
        _shards=[np.memmap(path / s["file"], dtype=np.uint8, mode="r") for s in manifest["shards"]],
        _firsts=np.array([s["first"] for s in manifest["shards"]], dtype=np.int64),
        evidence=open_evidence(path, manifest, offsets),
    )
