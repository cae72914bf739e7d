"""Search for homologs: many queries at once against one reference set.

Each round is `mmseqs search`; from the second on the query is the profile of the round before. The rounds are run
one by one, so that hits above `exclude_above_identity` are out before the next profile is made. MMseqs2 treats
each query on its own and its E-values come from the reference set's size, so an answer depends neither on the
other queries of a batch nor on the number of threads; hits of equal score go by their place in the set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bioseq.errors import BioseqError, OutputError, SequenceError, SequenceTooLongError
from bioseq.homologs.cache import SearchCache
from bioseq.homologs.database import OTHER, Database, open_database
from bioseq.homologs.hits import Hits, Rows, encode, no_hits, read_rows, to_hits, write_rows
from bioseq.homologs.mmseqs import PROTEINS, default_threads, run_mmseqs, scratch_folder
from bioseq.homologs.reference import LONGEST, ReferenceSet
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.alphabet import protein
from bioseq.sequences.fasta import Record

CHUNK = 2000  # queries of one call of MMseqs2
_PROFILE_E = (
    1e-3  # largest E-value of a hit that goes into the next round's profile: MMseqs2's own limit there
)
_MOST_CANDIDATES = 20_000


def clean(sequence: str | Record, index: int | None = None) -> str:
    """A query as it is searched: upper case, X for masks and for J. Raises `SequenceError`."""
    record = sequence if isinstance(sequence, Record) else None
    text = record.sequence if record else str(sequence)
    alphabet = protein()
    try:
        ids = alphabet.encode(text, masks=True).ids
    except SequenceError as error:
        raise error.at(index=index, record=record.id if record else None) from None
    if len(ids) > LONGEST:
        raise SequenceTooLongError(
            f"{len(ids)} residues; a search takes at most {LONGEST}.",
            index=index,
            hint="Cut it into domains.",
        )
    table = bytes(ord(t) if len(t) == 1 else ord("X") for t in alphabet.tokens)
    return ids.tobytes().translate(table + bytes(256 - len(table))).decode()


def search(
    sequences: Iterable[str | Record],
    reference: ReferenceSet,
    settings: SearchSettings | None = None,
    *,
    threads: int | None = None,
    cache: SearchCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout: float | None = None,
    quiet: bool = False,
    places: bool = False,
) -> list[Hits]:
    """The homologs of each sequence, in input order. `X` and "<mask>" are hidden residues; a query of nothing else
    has none.

    With `places` the hits say which residue of theirs is aligned; such searches are not cached.
    `progress(done, total)` is called after every 2,000 queries; `timeout` is in seconds for one MMseqs2 run.
    Raises `SequenceError`, `SearchError`, `ReferenceSetError`, `OutputError`, `MissingExtraError`.
    """
    settings = settings or SearchSettings()
    cache = None if places else cache
    queries = [clean(s, i) for i, s in enumerate(sequences)]
    found: dict[str, Hits] = {}
    for query in dict.fromkeys(queries):
        if not (encode(query) < OTHER).any():
            found[query] = no_hits(query, places=places)
        elif cache is not None and (kept := cache.get(reference, settings, query)) is not None:
            found[query] = kept
    missing = [q for q in dict.fromkeys(queries) if q not in found]
    if missing:
        database = open_database(reference, quiet=quiet)
        for start in range(0, len(missing), CHUNK):
            some = missing[start : start + CHUNK]
            try:
                answers = _search_chunk(
                    some, database, settings, threads or default_threads(), timeout, places=places
                )
            except (BioseqError, OSError) as error:
                database.check()  # says so where the database was removed meanwhile
                if isinstance(error, OSError):
                    raise OutputError(
                        f"a search cannot use its temporary files: {error.strerror or error}.",
                        hint="Free some space, or set TMPDIR to another disk.",
                    ) from error
                raise
            found.update(zip(some, answers, strict=True))
            if cache is not None:
                cache.put(reference, settings, answers)
            if progress is not None:
                progress(start + len(some), len(missing))
    return [found[q] for q in queries]


def fresh_protein() -> str:
    """A shuffled protein, which no cache of searches knows: whether searches work at all is tried with it."""
    letters = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQ"
    return "".join(random.sample(letters, len(letters)))


def _search_chunk(
    queries: list[str],
    database: Database,
    settings: SearchSettings,
    threads: int,
    timeout: float | None,
    *,
    places: bool = False,
    candidates: int | None = None,
) -> list[Hits]:
    """One part of the queries. Where near copies that are left out take half of a query's `candidates`, it is
    searched again with four times as many: else they would hide the homologs behind them."""
    candidates = candidates or settings.max_hits
    crowded = np.zeros(len(queries), dtype=bool)
    codes = [encode(q) for q in queries]
    with scratch_folder() as folder:
        (folder / "q.fasta").write_text("".join(f">{i}\n{q}\n" for i, q in enumerate(queries)))
        run_mmseqs(["createdb", "q.fasta", "q", "--shuffle", "0", *PROTEINS], folder=folder, timeout=timeout)
        source = "q"
        for turn in range(1, settings.iterations + 1):
            last = turn == settings.iterations
            result = folder / f"r{turn}"
            run_mmseqs(
                ["search", source, database.target, result.name, f"t{turn}", "-a", "-s", settings.sensitivity]
                + ["-e", settings.e_value if last else min(_PROFILE_E, settings.e_value)]
                + ["--max-seqs", candidates]
                + (["--db-load-mode", "2"] if database.indexed else []),
                folder=folder,
                threads=threads,
                timeout=timeout,
            )
            rows = read_rows(result, codes, database)
            keep = _allowed(rows, settings)
            if settings.exclude_above_identity is not None:
                copies = rows.identity > settings.exclude_above_identity
                found = np.bincount(rows.owner, minlength=len(queries))
                out = np.bincount(rows.owner[copies], minlength=len(queries))
                crowded |= (found >= candidates) & (2 * out >= candidates)
            if not last:
                kept = folder / f"k{turn}"
                write_rows(kept, rows, keep, len(queries), result)
                run_mmseqs(
                    ["result2profile", "q", database.target, kept.name, f"p{turn}"]
                    + (["--db-load-mode", "2"] if database.indexed else []),
                    folder=folder,
                    threads=threads,
                    timeout=timeout,
                )
                source = f"p{turn}"
        answers = to_hits(rows, queries, keep, database, settings.max_hits, places=places)
    if crowded.any() and candidates < _MOST_CANDIDATES:
        again = np.flatnonzero(crowded).tolist()
        wider = _search_chunk(
            [queries[i] for i in again],
            database,
            settings,
            threads,
            timeout,
            places=places,
            candidates=4 * candidates,
        )
        for i, hits in zip(again, wider, strict=True):
            answers[i] = hits
    return answers


def _allowed(rows: Rows, settings: SearchSettings) -> np.ndarray:
    keep = (rows.coverage >= settings.min_coverage) & (rows.identity >= settings.min_identity)
    if settings.exclude_above_identity is not None:
        keep &= rows.identity <= settings.exclude_above_identity
    return keep


def best(hits: Sequence[Hits]) -> list[Hits]:
    """Only the best hit of each query, where there is one."""
    return [h.select(np.arange(len(h)) < 1) for h in hits]
