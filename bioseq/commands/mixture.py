"""`bioseq homologs fit-mixture`: how far a backbone is trusted beside homologs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bioseq.cli import positive_int


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="NAME, NAME@V, an alias, or a bundle's folder")
    target = p.add_mutually_exclusive_group()
    target.add_argument("-o", "--output", metavar="FOLDER", help="write the bundle with its mixture here")
    target.add_argument("--register", metavar="NAME", help="register it as the next version of NAME")
    p.add_argument(
        "--homologs", default="default", metavar="REF", help="the reference set (default: default)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: all)")
    p.add_argument("--force", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> int:
    from bioseq.bundles.registry import Registry
    from bioseq.homologs.door import Homologs
    from bioseq.homologs.settings import SearchSettings
    from bioseq.inference.fitting import card_section, fit_mixture, with_mixture
    from bioseq.inference.homologs import NEAR_COPIES
    from bioseq.inference.loading import load
    from bioseq.output import check_free

    if args.output:
        check_free(Path(args.output), force=args.force)
    registry = Registry()
    bundle = registry.resolve(args.model, kind="backbone")
    model = load(bundle.path, device=args.device, threads=args.threads)
    settings = SearchSettings(exclude_above_identity=NEAR_COPIES)
    homologs = Homologs(args.homologs, settings=settings, threads=args.threads)
    print(f"searching in {homologs.reference.name}", file=sys.stderr, flush=True)
    mixture = fit_mixture(model, homologs.profiles, progress=True)
    print(card_section(mixture).strip())
    if args.output:
        made = with_mixture(bundle, mixture, args.output, force=args.force)
        print(f"wrote {made.path}", file=sys.stderr)
    elif args.register:
        with tempfile.TemporaryDirectory(prefix="bioseq-mixture-") as scratch:
            entry = registry.register(with_mixture(bundle, mixture, Path(scratch) / "bundle"), args.register)
        print(f"registered {entry.ref}", file=sys.stderr)
    else:
        print("nothing was written; use -o FOLDER or --register NAME", file=sys.stderr)
    return 0
