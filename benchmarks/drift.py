"""What bfloat16 and int8 cost in knowledge: perplexity of masked residues and zero-shot Spearman, beside float32.

    python benchmarks/drift.py DATA [--model default] [--proteins 200]

DATA is a folder of the development data. 15 % of the residues of held-out proteins are masked, the same in every
arithmetic; scores are the model's alone, without homologs. The claim (docs/performance.md): int8 moves the perplexity by less
than 0.1 and each Spearman by less than 0.01; the exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result
from scipy.special import log_softmax
from variants import avgfp, gb1

import bioseq
from bioseq.inference.predictor import DTYPES, Predictor
from bioseq.inference.scoring import scan_sites
from bioseq.ranking import spearman
from bioseq.sequences.fasta import read_fasta


def perplexity(model: Predictor, sequences: list[str]) -> float:
    total, count = 0.0, 0
    for sequence in sequences:
        seed = int(hashlib.sha256(sequence.encode()).hexdigest()[:8], 16)
        hidden = np.flatnonzero(np.random.default_rng(seed).random(len(sequence)) < 0.15)
        hidden = [i for i in hidden if sequence[i] in model.alphabet.standard]
        letters = list(sequence)
        for i in hidden:
            letters[i] = "<mask>"
        logits = model.logits(["".join(letters)], homologs="none")[0][hidden]
        true = model.alphabet.encode("".join(sequence[i] for i in hidden)).ids if hidden else []
        total -= float(log_softmax(logits.astype(float), axis=1)[np.arange(len(hidden)), true].sum())
        count += len(hidden)
    return float(np.exp(total / count))


def zero_shot(model: Predictor, data: Path) -> dict[str, float]:
    letters = model.alphabet.standard
    found = {}
    for name, read in (("avgfp", avgfp), ("gb1", gb1)):
        wild, changes, fitness = read(data, letters)
        table = scan_sites(model, wild, homologs="none").values
        old = [letters.index(a) for a in wild]
        scores = [sum(table[p, letters.index(b)] - table[p, old[p]] for p, b in c) for c in changes]
        found[name] = float(spearman(np.array(scores), fitness))
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("--model", default="default")
    p.add_argument("--proteins", type=int, default=200)
    p.add_argument("--out")
    args = p.parse_args()
    records = [
        r.sequence
        for r in read_fasta(args.data / "swissprot_valid_remote.fasta.gz")
        if len(r.sequence) <= 1022
    ]
    step = max(1, len(records) // args.proteins)
    sequences = records[::step][: args.proteins]
    result: dict[str, Any] = {"proteins": len(sequences)}
    for dtype in DTYPES:
        model = bioseq.load(args.model, dtype=dtype)
        result[dtype] = {"perplexity": perplexity(model, sequences), "spearman": zero_shot(model, args.data)}
        print(dtype, result[dtype], flush=True)
        result["weights"] = model.weights_hash
    plain, small = result["float32"], result["int8"]
    moved = {k: abs(small["spearman"][k] - plain["spearman"][k]) for k in plain["spearman"]}
    result["int8_moves"] = {"perplexity": abs(small["perplexity"] - plain["perplexity"]), "spearman": moved}
    print(json.dumps(result["int8_moves"]))
    print(write_result("drift", result | {"host": host(), "versions": versions()}, args.out))
    return int(result["int8_moves"]["perplexity"] >= 0.1 or max(moved.values()) >= 0.01)


if __name__ == "__main__":
    raise SystemExit(main())
