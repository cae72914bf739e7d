"""Perplexity by one fixed protocol.

The residues of each protein are dealt into 7 passes by a seeded permutation, so that every residue is chosen
in exactly one pass and about 1/7 (14.3 %, near the customary 15 %) in each. **All** chosen residues are
replaced by `<mask>`: kept or random ones would leak or fake the answer. Cross-entropy over the logits of the
whole vocabulary; sums and counts over all proteins and passes are reduced apart and divided last; perplexity
is exp(sum / count).

The permutation depends on the seed and the protein's own residues, so not on its place in a list. A protein
over the model's `max_residues` is cut into equal windows, the fewest that fit, each a sequence of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.backbones.packed.config import EVIDENCE_WIDTH
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import InputError
from bioseq.inference.batching import pack, plan
from bioseq.sequences.alphabet import Alphabet, protein
from training.corpus.draws import PASSES, chosen
from training.corpus.homologs import unpack_evidence
from training.pretrain.distributed.team import SINGLE, Team


def subset(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` places (0: all), spread evenly."""
    if wanted == 0 or wanted >= count:
        return np.arange(count)
    return np.arange(wanted) * count // wanted


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    return np.array_split(ids, -(-len(ids) // size))


def perplexity(
    encoder: PackedEncoder,
    sequences: Sequence[str] | Sequence[np.ndarray],
    *,
    seed: int = 0,
    proteins: int = 0,
    passes: int = 0,
    alphabet: Alphabet | None = None,
    budget: int = 2048,
    precision: str = "float32",
    team: Team = SINGLE,
    evidence: np.ndarray | None = None,
) -> dict[str, Any]:
    """{"perplexity", "loss" (nats a residue), "residues", "proteins", "passes"} of `sequences` (strings, or
    residues' ids uint8 [L]).

    `evidence`: what the homologs of the sequences say, each pass's hidden residues hidden from the search too
    (`Evidence.of_set`); there are as many passes then. `proteins` and `passes` take a part (0: all). Each of `team` computes its share and all get the result.
    Raises `InputError` without sequences.
    """
    alphabet = alphabet or protein()
    encoded = [alphabet.encode(s).ids if isinstance(s, str) else s for s in sequences]
    if not encoded:
        raise InputError("perplexity needs at least one sequence.")
    ends = np.cumsum([len(ids) for ids in encoded])
    # Places are dealt over the whole protein, then it is cut, so that windows change no choice.
    items: list[Item] = []
    rounds = min(passes or PASSES, PASSES if evidence is None else len(evidence))
    takes = subset(len(encoded), proteins)
    for i in takes:
        ids = encoded[i]
        windows = cut(ids, encoder.config.max_residues)
        starts = np.cumsum([0] + [len(w) for w in windows])
        for number, places in enumerate(chosen(ids, seed)[:rounds]):
            for start, window in zip(starts, windows):
                own = places[(places >= start) & (places < start + len(window))] - start
                if len(own):
                    masked = window.copy()
                    masked[own] = alphabet.mask_id
                    begin = int(ends[i]) - len(ids) + int(start)
                    codes = None if evidence is None else evidence[number, begin : begin + len(window)]
                    items.append(Item(masked, own, window[own].astype(np.int64), codes))
    lengths = np.array([len(item.masked) + 2 for item in items])
    groups = plan(lengths, max(budget, int(lengths.max())))
    # Sharded models need as many forward passes on every worker: the last turns may have nothing to count.
    turns = -(-len(groups) // team.world)
    mine = [
        groups[at] if at < len(groups) else None for at in range(team.rank, turns * team.world, team.world)
    ]
    total, count = _sums(encoder, items, mine, alphabet, precision, team.device)
    total, seen = team.sum(total, float(count))
    return {
        "perplexity": math.exp(total / seen),
        "loss": total / seen,
        "residues": int(seen),
        "proteins": len(takes),
        "passes": rounds,
    }


@dataclass(frozen=True, slots=True)
class Item:
    """A masked window: ids [L], places and true ids [K], and its evidence's codes uint8 [L, E]."""

    masked: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    codes: np.ndarray | None


def _evidence(
    codes: list[np.ndarray | None], cu_seqlens: np.ndarray, device: torch.device
) -> torch.Tensor | None:
    """float32 [T, E] of a packed batch; None where there is none."""
    if codes[0] is None:
        return None
    rows = np.zeros((int(cu_seqlens[-1]), EVIDENCE_WIDTH), dtype=np.float32)
    for start, part in zip(cu_seqlens.tolist(), codes):
        assert part is not None
        rows[start + 1 : start + 1 + len(part)] = unpack_evidence(part)
    return torch.from_numpy(rows).to(device)


@torch.no_grad()
def _sums(
    encoder: PackedEncoder,
    items: list[Item],
    groups: list[np.ndarray | None],
    alphabet: Alphabet,
    precision: str,
    device: torch.device,
) -> tuple[float, int]:
    was_training = encoder.training
    encoder.eval()
    ids = [item.masked for item in items]
    half = precision == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    total, count = 0.0, 0
    try:
        for own in groups:
            group = np.zeros(1, dtype=np.int64) if own is None else own
            batch = pack(ids, group, cls_id=alphabet.cls_id, eos_id=alphabet.eos_id)
            places = np.concatenate([items[i].places + 1 + batch.cu_seqlens[n] for n, i in enumerate(group)])
            targets = torch.from_numpy(np.concatenate([items[i].targets for i in group])).to(device)
            rows = _evidence([items[i].codes for i in group], batch.cu_seqlens, device)
            wanted = torch.from_numpy(places).to(device)
            with cast:
                hidden = encoder(
                    torch.from_numpy(batch.tokens).to(device),
                    torch.from_numpy(batch.cu_seqlens).to(device),
                    batch.max_seqlen,
                    evidence_TE=rows,
                    rows_K=wanted,
                )
                logits = encoder.logits(hidden, None if rows is None else rows[wanted])
            if own is not None:
                total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += len(targets)
    finally:
        encoder.train(was_training)
    return total, count
