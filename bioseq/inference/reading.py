"""Homologs for a backbone that reads them, fetched for all queries of a run at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bioseq.errors import SpecError
from bioseq.homologs.door import Homologs
from bioseq.homologs.reading import READING, evidence
from bioseq.homologs.reference import ReferenceSet
from bioseq.inference.query import Query
from bioseq.progress import Progress
from bioseq.sequences.alphabet import Alphabet


class HomologReader:
    """Searches queries in the reference set that the backbone was trained with. Masked residues are hidden from the
    search too; searches made before are taken from the cache."""

    def __init__(self, reference: ReferenceSet, *, threads: int | None = None):
        self.reference = reference
        self._door = Homologs(reference, settings=READING, threads=threads, quiet=True)

    def read(self, queries: Sequence[Query], alphabet: Alphabet, *, progress: bool = False) -> None:
        """Fill in `evidence` and `homologs` of the queries that read and have none yet. Parts of a query take them
        from it: one search for all contexts of a wild type."""
        asking = [q for q in queries if q.reads and q.evidence is None]
        wholes = {id(w): w for w in (q.part_of or q for q in asking) if w.evidence is None}
        waiting = list(wholes.values())
        texts = [alphabet.decode(q.ids).replace("<mask>", "X") for q in waiting]
        with Progress(len(texts), "searching homologs", unit="sequences", enabled=progress) as bar:
            tell = (lambda done, _: bar.add(done - bar.done)) if progress else None
            profiles = self._door.profiles(texts, progress=tell)
        for query, found in zip(waiting, profiles, strict=True):
            query.evidence, query.homologs = evidence(found), found.n_homologs
        for query in asking:
            whole = query.part_of
            if whole is not None and whole.evidence is not None:
                query.evidence = whole.evidence[query.start : query.start + len(query.ids)]
                query.homologs = whole.homologs


def check_unread(homologs: str | Path | ReferenceSet, name: str) -> None:
    """Raise `SpecError` where a set is named for a backbone that does not read homologs."""
    if homologs not in ("auto", "none"):
        raise SpecError(f"{name} does not read homologs.", field="homologs", hint="Leave it out.")
