"""What a model looks at: contacts between residues, and how much each residue moves a head's answer.

Attribution by occlusion: residue i is masked, the sequence is run again, and the attribution of i is the answer for the whole
sequence minus the answer without i (Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2). The answer is the predicted value in the
label's unit, or the log-odds of a class. Only the backbone sees the mask: what a head reads beside the embedding (composition,
homologs) stays that of the whole sequence, so an attribution says what the embedding of a residue contributes.

Legend: L residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from bioseq.backbones.contacts import ContactHead, contact_map, needed_bytes
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.padded.config import PaddedConfig
from bioseq.errors import BioseqError, ResourceError, SpecError
from bioseq.heads.features import kept
from bioseq.heads.head import Head
from bioseq.inference.query import Query, Result
from bioseq.progress import Progress
from bioseq.sequences.alphabet import Alphabet
from bioseq.sequences.fasta import Record

MOST_BYTES = 4 << 30  # of attention maps at a time
_LEAST = 1e-6  # of a probability, so that its log-odds are finite
_AT_A_TIME = 256  # masked copies


class Model(Protocol):
    """What is asked of a `Predictor`."""

    name: str
    alphabet: Alphabet
    encoder: Any
    device: torch.device
    heads: dict[str, Head]
    contact_head: ContactHead | None

    def prepare(self, sequence: str | Record, *, heads: Any = (), index: int | None = None) -> Query: ...
    def run(self, queries: list[Query], *, progress: Progress | None = None) -> list[Result]: ...


def contacts(model: Model, seqs: Iterable[str | Record], *, progress: bool = False) -> list[np.ndarray]:
    """Probabilities that two residues touch (C-beta within 8 A), a list of float32 [L_i, L_i]. Raises `BioseqError` for a
    backbone without a contact head, `ResourceError` for a sequence whose attention maps are too large."""
    encoder, head = model.encoder, model.contact_head
    if (
        head is None
        or not isinstance(encoder, PackedEncoder)
        or head.weight.shape[1] != encoder.config.n_heads
    ):
        raise BioseqError(
            f"{model.name} has no contact head.",
            hint="ESM-2 checkpoints carry one (contact_head.*): import such a checkpoint and name it.",
        )
    if isinstance(seqs, str):
        raise SpecError("give a list of sequences, not one string.", field="seqs")
    queries = [model.prepare(s, index=i) for i, s in enumerate(seqs)]
    for i, query in enumerate(queries):
        if (size := needed_bytes(encoder, len(query.ids))) > MOST_BYTES:
            raise ResourceError(
                f"sequence {i + 1}: the attention maps of {len(query.ids)} residues need {size / (1 << 30):.1f} GiB; "
                f"the limit is {MOST_BYTES >> 30} GiB.",
                hint="Give the domains of the protein apart.",
            )
    found = []
    with Progress(len(queries), "contacts", unit="sequences", enabled=progress) as bar:
        for query in queries:
            ids = np.concatenate(([model.alphabet.cls_id], query.ids, [model.alphabet.eos_id])).astype(
                np.int64
            )
            found.append(contact_map(encoder, torch.from_numpy(ids).to(model.device), head).cpu().numpy())
            bar.add(1)
    return found


@dataclass(frozen=True)
class Attribution:
    """`values` float32 [L]: how much each residue adds to the answer for `label` (a class, or a target of a regression).
    `answer` is that for the whole sequence: in the label's unit, or log-odds (`unit`)."""

    head: str
    label: str
    answer: float
    unit: str
    values: np.ndarray


def attribute(
    model: Model, sequence: str | Record, head: str, *, label: str | None = None, progress: bool = False
) -> Attribution:
    """How much each residue adds to what a head says. `label`: a class or target; by default the most probable class, or
    the first target. Costs one pass a residue. Raises `SpecError` for a head that answers by residue and a label that
    it does not have, what `masked` raises, and what `Predictor.prepare` raises."""
    _check_mask(model)
    query = model.prepare(sequence, heads=(head,))
    found = model.heads[head]
    if found.per_residue:
        raise SpecError(
            f"{head} answers for each residue; only answers for a whole sequence are attributed.",
            field="head",
        )
    if found.reads_homologs:  # searched once: every copy keeps the homologs of the whole sequence
        query.told = {head: found.find(kept([query.sequence], [len(query.ids)]))}
    said = _said(model.run([query])[0], head)
    chosen, unit = _label(found, said, label)
    values = np.zeros(len(query.ids), dtype=np.float32)
    answer = _answer(said, chosen)
    with Progress(len(values), "masking residues", unit="residues", enabled=progress) as bar:
        for at in range(0, len(values), _AT_A_TIME):
            places = range(at, min(at + _AT_A_TIME, len(values)))
            for place, result in zip(
                places, model.run([masked(model, query, [i]) for i in places]), strict=True
            ):
                values[place] = answer - _answer(_said(result, head), chosen)
            bar.add(len(places))
    return Attribution(head, chosen, answer, unit, values)


def masked(model: Model, query: Query, places: Iterable[int]) -> Query:
    """A query whose backbone does not see these residues. Raises `BioseqError` for a backbone that cannot hide a residue."""
    _check_mask(model)
    ids = query.ids.copy()
    ids[list(places)] = model.alphabet.mask_id
    return replace(query, ids=ids)


def _check_mask(model: Model) -> None:
    """Without a mask token the family would read an X; in words, hiding a letter makes other words of its neighbours."""
    config = model.encoder.config
    if not isinstance(config, PaddedConfig):
        return
    why = "has no mask token" if config.ids[model.alphabet.mask_id] < 0 else ""
    why = "reads words of several letters" if config.k > 1 else why
    if why:
        raise BioseqError(
            f"{model.name} {why}: single residues cannot be hidden from it, so nothing is attributed to them.",
            hint="Use a head on a backbone with a mask token for residues: docs/backbones.md names the families.",
        )


def answers(model: Model, queries: list[Query], head: str, label: str) -> np.ndarray:
    """What the head says for a label, of each query, in `Attribution.unit`; float64 [queries]."""
    return np.array([_answer(_said(r, head), label) for r in model.run(queries)])


def _said(result: Result, head: str) -> dict[str, Any]:
    assert result.predictions is not None
    return result.predictions[head]


def _label(head: Head, said: dict[str, Any], label: str | None) -> tuple[str, str]:
    """(the label, its unit)."""
    if head.task == "regression":
        known = list(head.targets)
        chosen = label or known[0]
        unit = head.units if isinstance(head.units, str) else "the label's unit"
    else:
        known = list(said["probabilities"])
        chosen = label or max(said["probabilities"], key=said["probabilities"].get)
        unit = "log-odds"
    if chosen not in known:
        raise SpecError(f"{label!r} is not one of {', '.join(known)}.", field="label")
    return chosen, unit


def _answer(said: dict[str, Any], label: str) -> float:
    if said["probabilities"] is None:
        return float(said["value"][label] if isinstance(said["value"], dict) else said["value"])
    p = min(max(said["probabilities"][label], _LEAST), 1.0 - _LEAST)
    return float(np.log(p / (1.0 - p)))
