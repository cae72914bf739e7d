"""bioseq: protein language models to pretrain, fine-tune, serve and screen with.

>>> import bioseq
>>> model = bioseq.load("default")             # doctest: +SKIP
>>> model.embed(["MKTAYIAKQR"]).shape          # doctest: +SKIP
(1, 320)

Names are resolved on first use: importing bioseq loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bioseq.version import __version__

if TYPE_CHECKING:
    from bioseq import design, homologs, vectors
    from bioseq.bundles.registry import Registry
    from bioseq.campaigns.verbs import campaign
    from bioseq.client.sync import connect
    from bioseq.errors import BioseqError
    from bioseq.inference.loading import load
    from bioseq.inference.predictor import Predictor
    from bioseq.sequences.alphabet import Alphabet
    from bioseq.sequences.fasta import Record, read_fasta

_HOMES = {
    "Alphabet": "bioseq.sequences.alphabet",
    "BioseqError": "bioseq.errors",
    "Predictor": "bioseq.inference.predictor",
    "Record": "bioseq.sequences.fasta",
    "Registry": "bioseq.bundles.registry",
    "campaign": "bioseq.campaigns.verbs",
    "connect": "bioseq.client.sync",
    "load": "bioseq.inference.loading",
    "read_fasta": "bioseq.sequences.fasta",
}
__all__ = [
    "Alphabet",
    "BioseqError",
    "Predictor",
    "Record",
    "Registry",
    "__version__",
    "campaign",
    "connect",
    "design",
    "homologs",
    "load",
    "read_fasta",
    "vectors",
]


def __getattr__(name: str) -> Any:
    if name in ("design", "homologs", "vectors"):  # rooms, which are callable
        return importlib.import_module(f"bioseq.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bioseq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
