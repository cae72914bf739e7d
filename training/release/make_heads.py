"""The heads that ship with the default backbone: `python -m training.release.make_heads DATA OUT [--base B] [--rows R]`;
`make heads DATA=DIR` makes them all in place. With the same number of threads on the same kind of processor the bundles
are the same bit for bit.

DATA is a folder in the form of the development data (localization.csv.gz, target_class.csv.gz,
secondary_structure_*.fasta.gz). Each head goes to OUT/<name>. `--rows` says how much is embedded: `small` for one CPU
core in minutes, `medium`, which made what ships, or `full` for a GPU or a long night. Localization and target class train on all rows either
way; rows that are not embedded train the sequence features and homologs alone. The cards say what was done.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Literal

from bioseq.specs.finetune import FinetuneSpec

COMPARTMENTS = (
    "nucleus", "cytoplasm", "extracellular", "plasma_membrane", "mitochondrion", "endoplasmic_reticulum", "golgi",
    "plastid", "vacuole_lysosome", "peroxisome",
)  # fmt: skip
CLASSES = ("kinase", "gpcr", "ion_channel", "peptidase", "transporter")
SWISSPROT = (
    "UniProtKB/Swiss-Prot, release of January 2014, CC BY 4.0 (The UniProt Consortium, doi 10.1093/nar/gkac1052)",
    "Gene Ontology annotations, CC BY 4.0 (The Gene Ontology Consortium, doi 10.1093/genetics/iyad031)",
    "both as packed in metastudent-data 2.0.1 (Hamp et al. 2013, doi 10.1186/1471-2105-14-S3-S7)",
)
NETSURF = (
    "secondary structure set of FLIP (Dallago et al. 2021, doi 10.1101/2021.11.09.467890), from NetSurfP-2.0 "
    "(Klausen et al. 2019, doi 10.1002/prot.25674)",
)
NAMES = ("localization", "target_class", "secondary_structure")
Size = Literal["small", "medium", "full"]
SHIPPED: Size = "medium"
# rows embedded for training, rows to choose on, rows to measure on; None is all
ROWS: dict[str, dict[str, tuple[int | None, int | None, int | None]]] = {
    "small": {
        "localization": (None, None, None),
        "target_class": (1000, 500, None),
        "secondary_structure": (1500, 300, None),
    },
    "medium": {
        "localization": (None, None, None),
        "target_class": (3000, None, None),
        "secondary_structure": (4000, 600, None),
    },
    "full": dict.fromkeys(NAMES, (None, None, None)),
}


def spec(name: str, data: Path, out: Path, base: str, size: Size = SHIPPED, **options: Any) -> FinetuneSpec:
    """The spec of one shipped head."""
    embedded, valid, test = ROWS[size][name]
    common: dict[str, Any] = {
        "output": str(out / name),
        "name": name,
        "base": base,
        "method": "frozen",
        "licence": "CC-BY-4.0",
        "max_valid": valid,
        "max_test": test,
        "neighbours": 1000,
        "force": True,
        "threads": 2,
        "dtype": "float32" if size == "full" else "bfloat16",
    } | options
    if name == "secondary_structure":
        return FinetuneSpec(
            labels=str(data / "secondary_structure_sequences.fasta.gz"),
            residue_labels=str(data / "secondary_structure_labels.fasta.gz"),
            residue_mask=str(data / "secondary_structure_mask.fasta.gz"),
            max_embedded=embedded,
            citation=NETSURF,
            **common,
        )
    return FinetuneSpec(
        labels=str(data / f"{name}.csv.gz"),
        targets=COMPARTMENTS if name == "localization" else CLASSES,
        task="multilabel",
        max_embedded=embedded,
        features=("composition", "dipeptide", "gapped", "terminal"),
        models=("mlp",),
        citation=SWISSPROT,
        **common,
    )


def make_heads(
    data: str | Path,
    out: str | Path,
    *,
    base: str = "default",
    size: Size = SHIPPED,
    names: tuple[str, ...] = NAMES,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Train the heads one after another; their evidence by name."""
    from training.finetune.run import finetune

    found = {}
    for name in names:
        started = time.monotonic()
        bundle = finetune(spec(name, Path(data), Path(out), base, size, **options))
        found[name] = bundle.evidence()
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data")
    p.add_argument("out")
    p.add_argument("--base", default="default")
    p.add_argument("--rows", choices=tuple(ROWS), default=SHIPPED)
    p.add_argument("--heads", default=",".join(NAMES))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--cache", default=None, help="of embeddings and searches (default: $BIOSEQ_CACHE or ~/.cache/bioseq)"
    )
    args = p.parse_args()
    names = tuple(n for n in args.heads.split(",") if n)
    unknown = set(names) - set(NAMES)
    if unknown:
        p.error(f"unknown heads: {', '.join(sorted(unknown))}")
    make_heads(
        args.data,
        args.out,
        base=args.base,
        size=args.rows,
        names=names,
        threads=args.threads,
        cache=args.cache,
    )


if __name__ == "__main__":
    main()
