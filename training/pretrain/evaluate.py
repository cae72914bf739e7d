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
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import InputError
from bioseq.inference.batching import pack, plan
from bioseq.sequences.alphabet import Alphabet, protein
from training.pretrain.distributed.team import SINGLE, Team
from training.pretrain.sampler import EVAL, stream

PASSES = 7


def chosen(ids: np.ndarray, seed: int) -> list[np.ndarray]:
    """The places chosen in each pass, PASSES arrays that hold each place of `ids` once (some may be empty)."""
    key = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
    order = stream(seed, EVAL, 0, key).permutation(len(ids))
    return [np.sort(order[p::PASSES]) for p in range(PASSES)]


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
) -> dict[str, Any]:
    """{"perplexity", "loss" (nats a residue), "residues", "proteins", "passes"} of `sequences` (strings, or
    residues' ids uint8 [L]).

    `proteins` and `passes` take a part (0: all). Each of `team` computes its share and all get the result.
    Raises `InputError` without sequences.
    """
    alphabet = alphabet or protein()
    encoded = [alphabet.encode(s).ids if isinstance(s, str) else s for s in sequences]
    if not encoded:
        raise InputError("perplexity needs at least one sequence.")
    takes = [encoded[i] for i in subset(len(encoded), proteins)]
    # Places are dealt over the whole protein, then it is cut, so that windows change no choice.
    items: list[tuple[np.ndarray, np.ndarray]] = []
    rounds = passes or PASSES
    for ids in takes:
        windows = cut(ids, encoder.config.max_residues)
        starts = np.cumsum([0] + [len(w) for w in windows])
        for places in chosen(ids, seed)[:rounds]:
            for start, window in zip(starts, windows):
                own = places[(places >= start) & (places < start + len(window))] - start
                if len(own):
                    masked = window.copy()
                    masked[own] = alphabet.mask_id
                    items.append((masked, np.stack((own, window[own].astype(np.int64)))))
    lengths = np.array([len(masked) + 2 for masked, _ in items])
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


@torch.no_grad()
def _sums(
    encoder: PackedEncoder,
    items: list[tuple[np.ndarray, np.ndarray]],
    groups: list[np.ndarray | None],
    alphabet: Alphabet,
    precision: str,
    device: torch.device,
) -> tuple[float, int]:
    was_training = encoder.training
    encoder.eval()
    ids = [masked for masked, _ in items]
    half = precision == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    total, count = 0.0, 0
    try:
        for own in groups:
            group = np.zeros(1, dtype=np.int64) if own is None else own
            batch = pack(ids, group, cls_id=alphabet.cls_id, eos_id=alphabet.eos_id)
            places = np.concatenate([items[i][1][0] + 1 + batch.cu_seqlens[n] for n, i in enumerate(group)])
            targets = torch.from_numpy(np.concatenate([items[i][1][1] for i in group])).to(device)
            with cast:
                hidden = encoder(
                    torch.from_numpy(batch.tokens).to(device),
                    torch.from_numpy(batch.cu_seqlens).to(device),
                    batch.max_seqlen,
                )
                logits = encoder.logits(hidden[torch.from_numpy(places).to(device)])
            if own is not None:
                total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += len(targets)
    finally:
        encoder.train(was_training)
    return total, count
