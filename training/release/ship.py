"""From a run's best checkpoint to the backbone that the package ships.

The shipped bundle's evidence also holds its perplexity on small copies of validation proteins that the repository
carries (tests/data), so that anyone can hold the model to its card without the whole corpus:

    python -m training.release.ship RUN/best --check tests/data -o bioseq/models/default
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.storage import load_packed, save_backbone
from bioseq.bundles.bundle import Bundle, open_bundle
from bioseq.errors import CheckpointError
from bioseq.sequences.fasta import read_fasta
from training.pretrain.evaluate import perplexity

PASSES = 2  # of the protocol's seven: the check is quick, and the same residues are chosen every time
CHECKS = {"remote": "valid_remote_25.fasta", "orphan": "valid_orphan_25.fasta"}


DRIFT = 1e-3  # of the perplexity, by which weights stored in bfloat16 may differ from float32 ones


def ship(source: Path, out: Path, checks: Path, *, half: bool = False, force: bool = False) -> Bundle:
    """Write `source` again as `out` with the check's figures in card and evidence (float32 arithmetic, the first
    passes). `half`: weights in bfloat16, half the size; raises `CheckpointError` if that moves a figure by 0.1 %."""
    bundle = open_bundle(source)
    encoder = load_packed(bundle, dtype=torch.float32)
    evidence = bundle.evidence()
    sets = {name: [r.sequence for r in read_fasta(checks / file)] for name, file in CHECKS.items()}

    def measure() -> dict[str, dict[str, Any]]:
        return {n: perplexity(encoder, members, seed=0, passes=PASSES) for n, members in sets.items()}

    results = measure()
    if half:
        exact = results
        encoder.to(torch.bfloat16).to(torch.float32)
        results = measure()
        drift = max(abs(results[n]["perplexity"] / exact[n]["perplexity"] - 1) for n in sets)
        if drift > DRIFT:
            raise CheckpointError(
                f"stored in bfloat16 the weights move a perplexity by {drift:.2%}; {DRIFT:.1%} is allowed.",
                hint="Ship them in float32.",
            )
        evidence["stored"] = {"dtype": "bfloat16", "drift_of_perplexity": drift}
        encoder.to(torch.bfloat16)
    evidence["check"] = found = {name: {"file": CHECKS[name], **r} for name, r in results.items()}
    for key in ("corpus", "output"):  # paths of the machine; the corpus's hash says what it was trained on
        evidence["spec"][key] = None
    lines = [
        "",
        "## A check that you can repeat",
        "",
        f"Perplexity in float32, the first {PASSES} passes, on small copies of validation proteins in `tests/data`:",
        "",
        "| file | proteins | residues | perplexity |",
        "|---|---|---|---|",
        *(
            f"| {c['file']} | {c['proteins']} | {c['residues']:,} | {c['perplexity']:.3f} |"
            for c in found.values()
        ),
        "",
        *(
            ["The weights are stored in bfloat16, which moves these figures by less than 0.1 %.", ""]
            if half
            else []
        ),
    ]
    m = bundle.manifest
    return save_backbone(
        out,
        encoder,
        name=m.name,
        card=bundle.card().rstrip() + "\n" + "\n".join(lines),
        evidence=evidence,
        data_hash=m.data_hash,
        seed=m.seed,
        licence=m.licence,
        alphabet=m.alphabet,
        force=force,
    )


def main(argv: list[str] | None = None) -> int:
    """Ship a backbone bundle."""
    parser = argparse.ArgumentParser(prog="python -m training.release.ship", description=main.__doc__)
    parser.add_argument("source", type=Path, help="a backbone bundle, RUN/best for instance")
    parser.add_argument("--check", type=Path, default=Path("tests/data"), help="folder of the small copies")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--half", action="store_true", help="store the weights in bfloat16")
    parser.add_argument("--force", action="store_true", help="replace the output")
    args = parser.parse_args(argv)
    print(ship(args.source, args.output, args.check, half=args.half, force=args.force).manifest.content_hash)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
