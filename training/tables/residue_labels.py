"""Per-residue labels: FASTA of states, and of a mask, joined to the sequences by id (FLIP's form).

A fault of the labels is a `TableError` with the one-based records of the sequence file, one of a file a `FastaError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bioseq.errors import TableError
from bioseq.sequences.alphabet import Alphabet, protein
from bioseq.sequences.fasta import Record, read_fasta
from training.tables.columns import fail, file_hash
from training.tables.labels import Labels, clean_sequences, merge_duplicates, read_parts


def _by_id(path: str | Path, ids: Sequence[str], what: str) -> list[Record]:
    found = {record.id: record for record in read_fasta(path, allow_empty=True)}
    fail(
        f"{what} {path} lacks records of the sequence file",
        [i for i, n in enumerate(ids, 1) if n not in found],
    )
    return [found[name] for name in ids]


def read_residues(
    path: str | Path,
    labels_path: str | Path,
    mask_path: str | Path | None = None,
    *,
    max_residues: int | None = None,
    alphabet: Alphabet | None = None,
) -> Labels:
    """Per-residue labels from three FASTA files joined by id; rows are records of the sequence file."""
    records = list(read_fasta(path, allow_empty=True))
    ids = [record.id or f"record{i}" for i, record in enumerate(records, 1)]
    fail(
        "the same id twice",
        [i for i, n in enumerate(ids, 1) if ids.index(n) != i - 1] if len(set(ids)) < len(ids) else [],
    )
    sequences = clean_sequences([record.sequence for record in records], alphabet or protein(), max_residues)
    marked = _by_id(labels_path, ids, "the label file")
    states = [record.sequence for record in marked]
    fail(
        "residue labels do not match the sequence's length",
        [i for i, (s, t) in enumerate(zip(sequences, states), 1) if len(s) != len(t)],
    )
    classes = tuple(sorted(set("".join(states))))
    if len(classes) < 2:
        raise TableError("the residue labels have one class only: nothing can be learnt.")
    table = np.full(256, -1, dtype=np.int64)
    for i, letter in enumerate(classes):
        table[ord(letter) & 255] = i
    residues = [table[np.frombuffer(t.encode("latin-1", "replace"), np.uint8)] for t in states]
    if mask_path is not None:
        masks = [record.sequence for record in _by_id(mask_path, ids, "the mask file")]
        fail(
            "the mask does not match the sequence's length",
            [i for i, (s, m) in enumerate(zip(sequences, masks), 1) if len(s) != len(m)],
        )
        fail("the mask holds other than 0 and 1", [i for i, m in enumerate(masks, 1) if set(m) - {"0", "1"}])
        residues = [
            np.where(np.frombuffer(m.encode(), np.uint8) == ord("1"), r, -1) for m, r in zip(masks, residues)
        ]
    words = [dict(w.split("=", 1) for w in r.description.split() if "=" in w) for r in marked]
    words = [{k.lower(): v for k, v in w.items()} for w in words]
    sets = [w.get("set", "") for w in words]
    labels = Labels(
        task="per_residue",
        targets=(),
        classes=classes,
        sequences=sequences,
        ids=ids,
        rows=np.arange(1, len(ids) + 1),
        y=np.zeros((len(ids), 0)),
        weights=np.ones(len(ids)),
        residues=residues,
        part=read_parts(sets, [w.get("validation", "") for w in words]) if any(sets) else None,
        data_hash=file_hash(path, labels_path, mask_path),
        alphabet=(alphabet or protein()).name,
    )
    return merge_duplicates(labels)
