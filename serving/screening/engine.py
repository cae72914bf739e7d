"""What computes a shard. The seam is internal: the command line and job specs always get the `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bioseq.bundles.manifest import Manifest, fits
from bioseq.errors import ArtefactError, BioseqError, NotFoundError, SequenceError, SpecError
from bioseq.homologs.search import fresh_protein
from bioseq.specs.screen import ScreenSpec
from serving.screening.isolation import Screened, isolate
from serving.screening.stored import Stored, rows_of
from serving.screening.tables.columns import HeadColumns


class Engine(Protocol):
    def run(self, sequences: Sequence[str], embed: Sequence[bool]) -> list[Screened]:
        """Results in order. Must be a pure function of its input: a shard computed twice gives equal bytes."""
        ...


class EngineFactory(Protocol):
    """Describes an engine without building it, and builds it inside a worker. Must pickle."""

    @property
    def heads(self) -> tuple[HeadColumns, ...]: ...

    @property
    def alphabet(self) -> str: ...

    @property
    def width(self) -> int:
        """Of an embedding."""

    @property
    def budget(self) -> int:
        """Tokens of one forward pass."""

    @property
    def memory_bytes(self) -> int:
        """About what one engine takes."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""

    def identity(self) -> dict[str, Any]:
        """Model, heads and arithmetic, for the manifest: plain data, equal only for equal results."""
        ...

    def cards(self) -> dict[str, str]:
        """Name -> model card, for the report."""
        ...

    def build(self) -> Engine: ...


# -------------------------------------------------------------------------------------------------- Predictor


@dataclass(frozen=True)
class _HeadSource:
    ref: str
    path: str
    hash: str


@dataclass(frozen=True)
class PredictorFactory:
    """The real engine: a backbone and heads by path and hash, loaded in each worker."""

    model: str
    model_ref: str
    model_name: str
    model_version: int | None
    model_hash: str
    sources: tuple[_HeadSource, ...]
    heads: tuple[HeadColumns, ...]
    alphabet: str
    width: int
    max_residues: int
    memory_bytes: int
    dtype: str
    device: str
    threads: int
    budget: int
    long_sequences: str
    homologs: str  # folder of the reference set that the backbone reads, or none
    homologs_hash: str
    vectors: str  # folder of a vector store, or ""
    vectors_rows: int  # that it held when the run began

    def identity(self) -> dict[str, Any]:
        return {
            "model": {"name": self.model_name, "version": self.model_version, "hash": self.model_hash},
            "heads": [
                {"name": h.name, "version": h.version, "hash": h.hash, "task": h.task} for h in self.heads
            ],
            "engine": {
                "dtype": self.dtype,
                "device": self.device,
                "threads": self.threads,
                "batch_tokens": self.budget,
                **({"homologs": self.homologs_hash} if self.homologs != "none" else {}),
            },
            **({"vectors": {"store": self.vectors, "rows": self.vectors_rows}} if self.vectors else {}),
        }

    def cards(self) -> dict[str, str]:
        found = {}
        for name, path in [
            (self.model_name, self.model),
            *((h.name, s.path) for h, s in zip(self.heads, self.sources)),
        ]:
            card = Path(path) / "card.md"
            found[name] = card.read_text("utf-8") if card.is_file() else "No model card."
        return found

    def build(self) -> PredictorEngine:
        return PredictorEngine(self)


class PredictorEngine:
    """`Predictor` behind the seam. Refuses files that are no longer those the run began with."""

    def __init__(self, factory: PredictorFactory):
        import bioseq
        from bioseq.bundles.registry import Registry
        from bioseq.heads.head import Head
        from bioseq.homologs.reference import open_reference
        from bioseq.inference.reading import HomologReader

        self.factory = factory
        registry = Registry()
        model = Path(factory.model) if Path(factory.model).is_dir() else factory.model_ref
        self.predictor = bioseq.load(
            model,
            dtype=factory.dtype,
            device=factory.device,
            threads=factory.threads,
            budget=factory.budget,
            registry=registry,
            homologs="none",
        )
        if factory.homologs != "none":
            reference = open_reference(factory.homologs)
            if reference.hash != factory.homologs_hash:
                raise ArtefactError(
                    f"the reference set {reference.name} changed while the run was going.", hint=_PUT_BACK
                )
            self.predictor.reader = HomologReader(reference, threads=factory.threads)
        if self.predictor.content_hash != factory.model_hash:
            raise ArtefactError(
                f"the model {factory.model_name} changed while the run was going.", hint=_PUT_BACK
            )
        for source, head in zip(factory.sources, factory.heads):
            bundle = registry.resolve(source.path if Path(source.path).is_dir() else source.ref)
            if bundle.manifest.content_hash != source.hash:
                raise ArtefactError(f"the head {head.name} changed while the run was going.", hint=_PUT_BACK)
            self.predictor.load_head(head.name, Head.load(bundle))
        self.stored = None
        if factory.vectors:
            policy: Any = factory.long_sequences
            self.stored = Stored(self.predictor, factory.vectors, factory.vectors_rows, policy)

    def run(self, sequences: Sequence[str], embed: Sequence[bool]) -> list[Screened]:
        from bioseq.backbones.pooling import EmbedOptions

        names = tuple(h.name for h in self.factory.heads)
        results: dict[int, Screened] = {}
        queries: dict[int, Any] = {}
        for i, (sequence, wanted) in enumerate(zip(sequences, embed)):
            try:
                self._judge(sequence)
                queries[i] = self.predictor.prepare(
                    sequence,
                    embed=EmbedOptions() if wanted or self.stored else None,
                    heads=names,
                    long_sequences=self.factory.long_sequences,  # type: ignore[arg-type]
                )
            except SequenceError as error:
                results[i] = Screened(error=f"{error.code}: {error.bare}")

        def compute(places: list[int]) -> list[Screened]:
            chosen = [queries[i] for i in places]
            found = self.predictor.run(chosen) if self.stored is None else self.stored.run(chosen)
            made = [self._result(sequences[i], result) for i, result in zip(places, found, strict=True)]
            return [r if embed[i] else replace(r, embedding=None) for i, r in zip(places, made)]

        if queries:
            results |= isolate(compute, list(queries), self._search)
        return [results[i] for i in range(len(sequences))]

    def _search(self) -> None:
        """Search for a protein that no cache knows, as `run` does. Raises where searches fail as such."""
        probe = fresh_protein()
        for head in self.predictor.heads.values():
            if head.reads_homologs:
                head.find([probe])
        if self.predictor.reader is not None:
            self.predictor.reader.read([self.predictor.prepare(probe)], self.predictor.alphabet)

    def _judge(self, sequence: str) -> None:
        """Raise `SequenceError` now for a sequence that a head of one wild type's variants cannot judge: from
        inside a batch it would cost the batch several forward passes to find it."""
        from bioseq.heads import features
        from bioseq.heads.features import clean

        for head in self.predictor.heads.values():
            if head.context.wild_type:
                for block in set(head.blocks) & set(features.SITE_BLOCKS):
                    features.compute(block, [clean(sequence)], head.context)

    def _result(self, sequence: str, result: Any) -> Screened:
        cells: dict[str, Any] = {}
        try:
            for head in self.factory.heads:
                cells |= head.cells(result.predictions[head.name])
        except BioseqError as error:
            return Screened(error=f"{error.code}: {error.message}")
        # What the alphabet did to the letters is in the index already, record by record
        told = self.predictor.alphabet.encode(sequence).notes if result.notes else ()
        note = "; ".join(n for n in result.told if n not in told)
        return Screened(cells, note=note or None, embedding=result.embedding)


# As in `bioseq.inference.predictor`, whose import would bring torch into the driver; a test holds the two equal
BUDGETS = {"cpu": 1024, "cuda": 65536}

_PUT_BACK = "Put the old one back and give the same command again, or start a new run folder."


def predictor_factory(spec: ScreenSpec, *, device: str) -> PredictorFactory:
    """Resolve names to bundles, reading manifests only. Raises `NotFoundError`, `BundleError`, `SpecError`."""
    from bioseq.bundles.registry import Registry
    from bioseq.errors import BundleError

    registry = Registry()
    bundle = registry.resolve(spec.model)
    manifest = bundle.manifest
    if manifest.kind != "backbone":
        raise BundleError(f"{spec.model} is a {manifest.kind}, not a backbone.", hint="Give it as --heads.")
    sources: list[_HeadSource] = []
    heads: list[HeadColumns] = []
    for ref in spec.heads:
        try:
            head = registry.resolve(ref)
        except NotFoundError as error:
            known = ", ".join(e.name for e in registry.heads_for(manifest)) or "none"
            raise NotFoundError(
                f"there is no head {ref!r}.", code=error.code, hint=f"Heads of {manifest.name}: {known}."
            ) from None
        m = head.manifest
        if m.kind != "head":
            raise BundleError(f"{ref} is a {m.kind}, not a head.")
        if not fits(m, manifest):
            raise BundleError(
                f"the head {ref} belongs to another backbone ({m.base_weights_hash or m.base_hash}) than {manifest.name} "
                f"({manifest.weights_hash or manifest.content_hash}).",
                hint="Name its backbone with --model.",
            )
        name = m.name if m.name not in {h.name for h in heads} else f"{m.name}@{m.version}"
        heads.append(
            HeadColumns(
                name,
                m.task or "",
                tuple(m.labels),
                m.version,
                m.content_hash,
                m.units,
                m.per_residue,
                "homologs/manifest.json" in m.files,
            )
        )
        sources.append(_HeadSource(f"{m.name}@{m.version}", str(head.path.absolute()), m.content_hash))
    if len({h.name for h in heads}) < len(heads):
        raise SpecError("two heads have the same name and version.", field="heads")
    homologs, homologs_hash = _homologs(spec, manifest)
    vectors = "" if spec.vectors is None else str(Path(spec.vectors).absolute())
    size = sum(
        f.stat().st_size
        for b in (bundle.path, *(Path(s.path) for s in sources))
        for f in b.rglob("*.safetensors")
    )
    residues = int(manifest.architecture.get("max_residues", 1022))
    return PredictorFactory(
        model=str(bundle.path.absolute()),
        model_ref=f"{manifest.name}@{manifest.version}",
        model_name=manifest.name,
        model_version=manifest.version,
        model_hash=manifest.content_hash,
        sources=tuple(sources),
        heads=tuple(heads),
        alphabet=manifest.alphabet,
        width=int(manifest.architecture.get("d_model", 0)),
        max_residues=residues,
        memory_bytes=2 * size + (600 << 20),
        dtype=spec.dtype,
        device=device,
        threads=spec.threads,
        budget=max(spec.batch_tokens or BUDGETS.get(device, 1024), residues + 2),
        long_sequences=spec.long_sequences,
        homologs=homologs,
        homologs_hash=homologs_hash,
        vectors=vectors,
        vectors_rows=rows_of(vectors, Path(spec.output)) if vectors else 0,
    )


def _homologs(spec: ScreenSpec, manifest: Manifest) -> tuple[str, str]:
    """The reference set that the backbone reads and its hash, or none. Raises `SpecError` and `ReferenceSetError`."""
    from bioseq.homologs.reading import own_set
    from bioseq.homologs.reference import open_reference

    if not manifest.architecture.get("reads_homologs"):
        if spec.homologs not in ("auto", "none"):
            raise SpecError(
                f"{manifest.name} does not read homologs.", field="homologs", hint="Leave them out."
            )
        return "none", ""
    if spec.homologs == "none":
        return "none", ""
    reference = own_set(manifest.extra) if spec.homologs == "auto" else open_reference(spec.homologs)
    shipped = spec.homologs in ("auto", "default")
    return "default" if shipped else str(reference.folder.absolute()), reference.hash
