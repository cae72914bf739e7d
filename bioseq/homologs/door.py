"""The Python door: one reference set, one way of searching it.

>>> import bioseq
>>> found = bioseq.homologs("default")         # doctest: +SKIP
>>> found.search(["MKTAYIAKQR"])[0].ids        # doctest: +SKIP
>>> found.profile("MKTAYIAKQR").neff           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from bioseq.homologs.cache import SearchCache
from bioseq.homologs.hits import Hits
from bioseq.homologs.profile import Profile, profile
from bioseq.homologs.reference import ReferenceSet, open_reference
from bioseq.homologs.search import CHUNK, clean, search
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.fasta import Record


class Homologs:
    """Searches in one reference set. Errors are those of `open_reference` and `search`."""

    def __init__(
        self,
        reference: str | Path | ReferenceSet = "default",
        *,
        settings: SearchSettings | None = None,
        threads: int | None = None,
        cache: bool = True,
        quiet: bool = False,
    ):
        self.reference = open_reference(reference)
        self.settings = settings or SearchSettings()
        self.threads, self.quiet = threads, quiet
        self._cache = SearchCache() if cache else None

    def __repr__(self) -> str:
        return f"Homologs({self.reference!r})"

    def search(
        self, sequences: Iterable[str | Record], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Hits]:
        """The hits of each sequence, in input order; X and "<mask>" are hidden from the search."""
        return search(
            sequences,
            self.reference,
            self.settings,
            threads=self.threads,
            cache=self._cache,
            progress=progress,
            quiet=self.quiet,
        )

    def align(self, sequence: str | Record) -> Hits:
        """The hits of one sequence, on its columns: `aligned` [N, L]. `alignment.write_a3m` writes them."""
        return self.search([sequence])[0]

    def profiles(
        self, sequences: Iterable[str | Record], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Profile]:
        texts = [clean(s, i) for i, s in enumerate(sequences)]
        out: list[Profile] = []
        for start in range(0, len(texts), CHUNK):  # alignments are large; only those of one part are held

            def tell(done: int, _: int, start: int = start) -> None:
                if progress is not None:
                    progress(start + done, len(texts))

            out += [profile(hits) for hits in self.search(texts[start : start + CHUNK], progress=tell)]
        return out

    def profile(self, sequence: str | Record) -> Profile:
        return self.profiles([sequence])[0]
