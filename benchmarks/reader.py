"""Masked perplexity of a backbone that reads homologs, by how many there are.

    python benchmarks/reader.py BUNDLE CORPUS [--sets dev] [--plain default] [--proteins 0] [--passes 0]

CORPUS was prepared with `bioseq pretrain prepare --homologs REF --valid NAME=FILE`: its held-out sets were searched
with the hidden residues hidden from the search too, by the fixed protocol of the model's card. Each set's masked
residues are predicted by the backbone with homologs and without, by the plain backbone, and by the profile alone
(as the backbone is given it; without homologs the background). Choices are made on `dev`; `remote` and `orphan` are
read once per finished candidate. The result also holds what an embedding costs with its search, and what the
training cost by the run's own record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import host, read_proteins, versions, write_result

import bioseq
from bioseq.backbones.packed.config import FIRST_LETTER, N_LETTERS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.homologs.matrix import BACKGROUND
from bioseq.homologs.reading import READING
from bioseq.inference.batching import pack
from bioseq.inference.predictor import Predictor
from bioseq.sequences.alphabet import protein
from training.corpus.corpus import Corpus, open_corpus
from training.corpus.draws import chosen
from training.corpus.homologs import SET_SEED, unpack_evidence

BINS = {"0": (0, 0), "1": (1, 1), "2-5": (2, 5), "6-20": (6, 20), "more": (21, 10**9)}


def losses(
    encoder: PackedEncoder, ids: np.ndarray, places: np.ndarray, rows: np.ndarray | None
) -> np.ndarray:
    """Nats of the hidden residues at `places`."""
    a = protein()
    masked = ids.copy()
    masked[places] = a.mask_id
    batch = pack([masked], np.arange(1), cls_id=a.cls_id, eos_id=a.eos_id)
    evidence = None if rows is None else torch.from_numpy(np.pad(rows, ((1, 1), (0, 0))))
    wanted = torch.from_numpy(places + 1)
    with torch.inference_mode():
        hidden = encoder(
            torch.from_numpy(batch.tokens),
            torch.from_numpy(batch.cu_seqlens),
            batch.max_seqlen,
            evidence_TE=evidence,
            rows_K=wanted,
        )
        logs = encoder.logits(hidden, None if evidence is None else evidence[wanted]).log_softmax(-1)
    return -logs.numpy()[np.arange(len(places)), ids[places]]


def of_profile(ids: np.ndarray, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The same of the profile alone; hidden residues that are not standard count as nothing (NaN)."""
    by_token = np.argsort(protein().standard_ids)
    logs = rows[places, :N_LETTERS] + np.log(BACKGROUND)[by_token]
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    columns = ids[places].astype(int) - FIRST_LETTER
    inside = (columns >= 0) & (columns < N_LETTERS)
    return np.where(inside, -logs[np.arange(len(places)), np.clip(columns, 0, N_LETTERS - 1)], np.nan)


def of_set(
    corpus: Corpus, name: str, reader: PackedEncoder, plain: PackedEncoder, proteins: int, passes: int
) -> dict[str, Any]:
    """Perplexity of each way over all hidden residues, and by number of homologs."""
    assert corpus.evidence is not None
    codes = corpus.evidence.of_set(name)
    number = np.load(corpus.evidence.folder / f"{name}.number.npy")
    members = corpus.sets()[name]
    ends = np.cumsum([len(m) for m in members])
    found: dict[str, list[np.ndarray]] = {w: [] for w in ("with", "without", "plain", "profile")}
    counts: list[np.ndarray] = []
    long = 0
    for i, ids in enumerate(members[: proteins or None]):
        if len(ids) > min(reader.config.max_residues, plain.config.max_residues):
            long += 1
            continue
        for p, places in enumerate(chosen(ids, SET_SEED)[: min(passes or len(codes), len(codes))]):
            if not len(places):
                continue
            rows = unpack_evidence(codes[p, int(ends[i]) - len(ids) : int(ends[i])])
            found["with"].append(losses(reader, ids, places, rows))
            found["without"].append(losses(reader, ids, places, None))
            found["plain"].append(losses(plain, ids, places, None))
            found["profile"].append(of_profile(ids, places, rows))
            counts.append(np.full(len(places), number[p, i]))
    values = {way: np.concatenate(parts) for way, parts in found.items()}
    homologs = np.concatenate(counts)

    def told(kept: np.ndarray) -> dict[str, Any]:
        out: dict[str, Any] = {"residues": int(kept.sum())}
        for way, x in values.items():
            out[way] = round(float(np.exp(np.nanmean(x[kept]))), 4) if kept.any() else None
        return out

    by = {label: told((homologs >= low) & (homologs <= high)) for label, (low, high) in BINS.items()}
    return {"all": told(np.ones(len(homologs), dtype=bool)), "by_homologs": by, "left_out_as_long": long}


def cost(model: Predictor, fasta: str | None, count: int = 32) -> dict[str, Any]:
    """Seconds a protein of an embedding: with its search, with the search's answer at hand, without homologs."""
    proteins = read_proteins(count, fasta)
    model.embed(proteins[:2], homologs="none")
    seconds = {}
    for way, homologs in (("with_search", "auto"), ("searched_before", "auto"), ("without", "none")):
        start = time.perf_counter()
        model.embed(proteins, homologs=homologs, long_sequences="window")  # type: ignore[arg-type]
        seconds[way] = round((time.perf_counter() - start) / count, 4)
    return {"proteins": count, "seconds_a_protein": seconds, "note": "searches of an earlier run are kept"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("corpus")
    parser.add_argument("--sets", default="dev", help="names of held-out sets, with commas")
    parser.add_argument("--plain", default="default", help="the plain backbone beside it")
    parser.add_argument("--proteins", type=int, default=0, help="of each set (0: all)")
    parser.add_argument("--passes", type=int, default=0, help="of the protocol (0: all that were searched)")
    parser.add_argument("--cost", action="store_true", help="time embeddings too")
    parser.add_argument("--fasta", help="proteins for the timing")
    parser.add_argument("--out")
    args = parser.parse_args()
    reader = bioseq.load(args.bundle, homologs="auto" if args.cost else "none")
    plain = bioseq.load(args.plain, homologs="none")
    corpus = open_corpus(args.corpus, verify=False)
    if corpus.evidence is None:
        raise SystemExit(f"{args.corpus} was prepared without homologs; prepare it with --homologs.")
    if corpus.evidence.manifest["settings"] != READING.to_json():
        raise SystemExit(
            f"{args.corpus} was searched with other settings than those of use; prepare it again."
        )
    result: dict[str, Any] = {"weights": reader.weights_hash, "plain": plain.weights_hash, "sets": {}}
    card = Path(args.bundle) / "evidence.json"
    if card.is_file():
        told = json.loads(card.read_text("utf-8"))
        result["training"] = {k: told.get(k) for k in ("step", "tokens", "training_seconds", "hardware")}
    for name in args.sets.split(","):
        result["sets"][name] = of_set(corpus, name, reader.encoder, plain.encoder, args.proteins, args.passes)
        print(name, json.dumps(result["sets"][name], indent=1))
    if args.cost:
        result["cost"] = cost(reader, args.fasta)
    command = "python benchmarks/reader.py " + " ".join(Path(a).name for a in sys.argv[1:])
    result |= {"command": command, "host": host(), "versions": versions()}
    print(write_result("reader", result, args.out))


if __name__ == "__main__":
    main()
