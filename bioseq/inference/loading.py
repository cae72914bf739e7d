"""From a name to a `Predictor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bioseq.errors import BundleError

if TYPE_CHECKING:
    from bioseq.bundles.registry import Registry
    from bioseq.homologs.reference import ReferenceSet
    from bioseq.inference.predictor import Predictor


def load(
    name_or_path: str | Path = "default",
    *,
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    budget: int | None = None,
    registry: Registry | None = None,
    homologs: str | Path | ReferenceSet = "auto",
) -> Predictor:
    """A predictor for a registry name (`default`, `NAME`, `NAME@V`), a backbone bundle's directory, or a
    directory in the Hugging Face layout of a family that bioseq knows (docs/backbones.md).

    `dtype` is the arithmetic: float32, bfloat16, or int8 (linear layers, on a CPU with AVX512_VNNI or AMX). `device` is auto, cpu, cuda or cuda:N; `threads` fixes
    torch's thread count; `budget` is tokens a batch. `homologs` is for a backbone that reads them: "auto" (the
    shipped reference set), the folder of the set it was trained with, or "none". Raises `NotFoundError`,
    `BundleError`, `CheckpointError`, and `ReferenceSetError` for another set.
    """
    from bioseq.backbones.contacts import ContactHead
    from bioseq.backbones.families import alphabet_of, open_checkpoint
    from bioseq.bundles.bundle import is_checkpoint, open_bundle
    from bioseq.homologs.reading import own_set
    from bioseq.inference.predictor import Predictor
    from bioseq.inference.reading import HomologReader, check_unread

    path = Path(name_or_path)
    is_path = isinstance(name_or_path, Path) or "/" in str(name_or_path) or path.is_dir()
    if is_path and is_checkpoint(path):
        check_unread(homologs, str(name_or_path))
        checkpoint = open_checkpoint(path)
        predictor = Predictor(
            checkpoint.encoder,
            name=path.name,
            weights_hash=checkpoint.weights_hash,
            alphabet=alphabet_of(checkpoint.alphabet, checkpoint.config),
            dtype=dtype,
            device=device,
            threads=threads,
            budget=budget,
            registry=registry,
        )
        predictor.contact_head = ContactHead.of(checkpoint.extras, checkpoint.config.n_layers)
        return predictor
    from bioseq.backbones.storage import load_backbone, weights_hash
    from bioseq.bundles.registry import Registry
    from bioseq.inference.evidence import Mixture

    registry = registry or Registry()
    bundle = open_bundle(path) if is_path else registry.resolve(str(name_or_path), kind="backbone")
    if bundle.manifest.kind != "backbone":
        raise BundleError(
            f"{name_or_path} is a head, not a backbone.",
            hint=f"Load its backbone and call predict(..., heads=[{str(name_or_path)!r}]).",
        )
    encoder = load_backbone(bundle)
    reader = None
    if encoder.config.reads_homologs:
        if homologs != "none":
            reader = HomologReader(own_set(bundle.manifest.extra, homologs), threads=threads)
    else:
        check_unread(homologs, str(name_or_path))
    predictor = Predictor(
        encoder,
        reader=reader,
        name=bundle.manifest.name,
        version=bundle.manifest.version,
        content_hash=bundle.manifest.content_hash,
        weights_hash=weights_hash(bundle),
        alphabet=alphabet_of(bundle.manifest.alphabet, encoder.config),
        dtype=dtype,
        device=device,
        threads=threads,
        budget=budget,
        registry=registry,
        mixture=Mixture.of(bundle),
    )
    predictor.contact_head = ContactHead.of(bundle.read_tensors("hf_extra."), encoder.config.n_layers)
    return predictor
