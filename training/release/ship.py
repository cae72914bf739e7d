"""From a run's best checkpoint to the backbone that the package ships.

The shipped bundle's evidence also holds its perplexity on small copies of validation proteins that the repository
carries (tests/data), so that anyone can hold the model to its card without the whole corpus:

    python -m training.release.ship RUN/best --check tests/data -o bioseq/models/default
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bioseq.backbones.storage import load_backbone, save_backbone
from bioseq.bundles.bundle import Bundle, open_bundle
from bioseq.sequences.fasta import read_fasta
from training.pretrain.evaluate import perplexity

PASSES = 2  # of the protocol's seven: the check is quick, and the same residues are chosen every time
CHECKS = {"remote": "valid_remote_25.fasta", "orphan": "valid_orphan_25.fasta"}


def ship(source: Path, out: Path, checks: Path, *, force: bool = False) -> Bundle:
    """Write `source` again as `out` with the check's figures in card and evidence (float32, the first passes)."""
    bundle = open_bundle(source)
    encoder = load_backbone(bundle, dtype=torch.float32)
    evidence = bundle.evidence()
    found = {}
    for name, file in CHECKS.items():
        result = perplexity(encoder, [r.sequence for r in read_fasta(checks / file)], seed=0, passes=PASSES)
        found[name] = {"file": file, **result}
    evidence["check"] = found
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
    parser.add_argument("--force", action="store_true", help="replace the output")
    args = parser.parse_args(argv)
    print(ship(args.source, args.output, args.check, force=args.force).manifest.content_hash)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
