"""The shipped reference set of homologs: one representative a cluster of the Swiss-Prot training file.

    python -m training.release.make_reference --data DIR

writes `bioseq/homologs/default/`. The clusters held out of the training file (`remote`, `orphan`) are not in it.
`development_clusters` names those on which the choices of the room are made; they are in the shipped set, and out of
the one that the choices are measured against.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bioseq.homologs.reference import SHIPPED, build_reference
from bioseq.sequences.fasta import Record, read_fasta

TRAIN = "swissprot_train.fasta.gz"
LONGEST = 1500  # residues; longer representatives (2,088 of 114,603) would double the room that they take
LIMIT = 24 << 20  # bytes in the package
LICENCE = "CC-BY-4.0"
SOURCE = "UniProtKB/Swiss-Prot, release of January 2014 (Debian package metastudent-data 2.0.1)"
CITATION = "The UniProt Consortium, Nucleic Acids Res. 42:D191 (2014), doi 10.1093/nar/gkt1140"
SELECTION = "one representative a cluster at 30 % identity and 80 % coverage, at most 1500 residues"


def representatives(train: Path) -> tuple[list[Record], Counter[str]]:
    """(representatives of at most 1,500 residues in the file's order, size of every cluster). The representative is the
    record whose accession is the cluster's name, in the header as `cluster=NAME`."""
    sizes: Counter[str] = Counter()
    found = []
    with_header = _clusters(train)
    for record in read_fasta(train):
        cluster = next(with_header)
        sizes[cluster] += 1
        if record.id == cluster and len(record.sequence) <= LONGEST:
            found.append(record)
    return found, sizes


def _clusters(train: Path) -> Iterator[str]:
    with gzip.open(train, "rt") as handle:
        for line in handle:
            if line.startswith(">"):
                yield line.split("cluster=", 1)[1].split()[0]


def development_clusters(found: list[Record], sizes: Counter[str], count: int = 1000) -> set[str]:
    """Clusters of at most 20 members, the first by the SHA-256 of their name."""
    small = [r.id for r in found if sizes[r.id] <= 20]
    return set(sorted(small, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the shipped reference set of homologs from the data.")
    parser.add_argument("--data", required=True, type=Path, help=f"folder that holds {TRAIN}")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--force", action="store_true", help="replace it")
    args = parser.parse_args()
    found, _ = representatives(args.data / TRAIN)
    made = build_reference(
        found,
        args.out,
        name="default",
        licence=LICENCE,
        source=SOURCE,
        citation=CITATION,
        selection=SELECTION,
        pack="xz",
        force=args.force,
    )
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {len(made)} sequences, {size} bytes, {made.hash}")
    if size > LIMIT:
        raise SystemExit(f"{size} bytes are over the limit of {LIMIT}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
