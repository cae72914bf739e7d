"""From the option `homologs` to what is found: what is searched, and for which sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bioseq.errors import SpecError
from bioseq.heads.features import kept
from bioseq.homologs.alignment import alignment_bytes, parse_alignment
from bioseq.homologs.door import Homologs
from bioseq.homologs.profile import Profile, profile
from bioseq.homologs.reference import ReferenceSet
from bioseq.homologs.search import clean
from bioseq.homologs.settings import SearchSettings
from bioseq.homologs.transfer import without
from bioseq.inference.evidence import Found, check_same
from bioseq.inference.query import Query
from bioseq.inference.variants import Model, give, reads_homologs
from bioseq.sequences.fasta import Record

if TYPE_CHECKING:
    from bioseq.heads.head import Head

NEAR_COPIES = 0.95
HomologsOption = str | Path | ReferenceSet | Profile | Found


def find_homologs(
    model: Model,
    sequences: Sequence[str | Record],
    homologs: HomologsOption,
    alignment: str | Path | None = None,
    *,
    auto: str,
    variants: bool = False,
    threads: int | None = None,
) -> list[Found] | None:
    """The homologs of each sequence, or None where none are asked for.

    `homologs` is none, default, a reference set (its folder), the profile of one sequence, or auto: then it is
    `auto`, and none for another alphabet than that of proteins, or for a model that reads homologs itself.
    `alignment` is a file of the homologs of one sequence. For `variants` hits above 95 % identity are left out, of
    a search and of an alignment: they only tell the wild type again, and a score must not depend on whether the
    protein itself is among its homologs. A ready profile is taken as it is.
    Raises `SpecError`, and what a search or the reading of an alignment raises.
    """
    proteins = model.alphabet.name == "protein"
    if not proteins and (alignment is not None or str(homologs) not in ("auto", "none")):
        raise SpecError(
            f"{model.name} reads {model.alphabet.name}; homologs are searched for proteins.", field="homologs"
        )
    if alignment is not None:
        if homologs != "auto":
            raise SpecError("give either homologs or an alignment.", field="alignment")
        query, name = _only(sequences), Path(alignment).name
        return [found_in(alignment_bytes(alignment), query, name, variants=variants)]
    if isinstance(homologs, Profile):
        homologs = Found(homologs, "the given profile")
    if isinstance(homologs, Found):
        check_same(homologs.profile, clean(_only(sequences)))
        return [homologs]
    if homologs == "auto":
        # a backbone that reads homologs has them in its own probabilities
        homologs = auto if proteins and not reads_homologs(model) else "none"
    if homologs == "none":
        return None
    settings = SearchSettings(exclude_above_identity=NEAR_COPIES if variants else None)
    room = Homologs(homologs, settings=settings, threads=threads)
    return [Found(found, room.reference.name) for found in room.profiles(sequences)]


def found_in(
    text: bytes, query: str | Record, name: str = "the alignment", *, variants: bool = False
) -> Found:
    """The homologs in an alignment of the query. Raises `AlignmentError` and `SequenceError`."""
    hits = parse_alignment(text, query, name)
    if variants:
        hits = without(hits, None, above_identity=NEAR_COPIES)
    return Found(profile(hits), name)


def find_one(
    model: Model, sequence: str | Record, homologs: HomologsOption, alignment: str | Path | None
) -> Found | None:
    """The homologs of a sequence whose variants are scored: by default those in the shipped reference set."""
    found = find_homologs(model, [sequence], homologs, alignment, auto="default", variants=True)
    return None if found is None else found[0]


def let_read(
    model: Model,
    heads: Mapping[str, Head],
    queries: Sequence[Query],
    homologs: HomologsOption = "auto",
    alignment: str | Path | None = None,
) -> None:
    """Which homologs a backbone that reads them has for these queries: auto its own set's, none, those in another set,
    ready ones, or those of a user's `alignment` of the one sequence. An alignment is read by heads that read profiles
    too. Hits above 95 % identity are left out, as in their own searches. Raises `SpecError` where nothing reads what
    is given, and what `find_homologs` raises."""
    if alignment is None and isinstance(homologs, str) and homologs in ("auto", "none"):
        for query in queries:
            query.reads = homologs == "auto"
        return
    reads = reads_homologs(model)
    profiled = [h for q in queries for h in q.heads if alignment and "profile" in heads[h].blocks]
    if not (reads or profiled):
        raise SpecError(
            f"{model.name} does not read homologs"
            + (", nor do these heads read profiles." if any(q.heads for q in queries) else "."),
            field="alignment" if alignment else "homologs",
            hint="Leave them out; score, scan and logits take homologs with any backbone.",
        )
    texts = [model.alphabet.decode(q.ids) for q in queries]
    found = find_homologs(model, texts, homologs, alignment, auto="none", variants=True)
    for query, one in zip(queries, found or (), strict=True):
        if reads:
            give(query, one)
        query.told = {
            name: heads[name].find(kept([query.sequence], [len(query.ids)]), [one.profile])
            for name in profiled
        }


def _only(sequences: Sequence[str | Record]) -> str | Record:
    if len(sequences) != 1:
        raise SpecError(
            f"{len(sequences)} sequences were given; an alignment or ready homologs belong to one.",
            field="homologs",
        )
    return sequences[0]
