"""`bioseq models`: list, show, import, export, register, remove and alias."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioseq.bundles.manifest import fits
from bioseq.cli import new_parser

if TYPE_CHECKING:
    from bioseq.bundles.registry import Entry, Registry

EXAMPLE = """bioseq models list
  bioseq models import ~/checkpoints/esm2_t6_8M esm2-8m
  bioseq models import hf:facebook/esm2_t12_35M_UR50D esm2-35m
  bioseq models alias default esm2-8m@1
  bioseq models show default
  bioseq models export esm2-8m@1 hf_folder"""

_EXAMPLES = {
    "list": "bioseq models list\n  bioseq models list --json",
    "show": "bioseq models show default\n  bioseq models show esm2-8m@1 --json",
    "import": "bioseq models import ~/checkpoints/esm2_t6_8M esm2-8m --licence MIT\n"
    "  bioseq models import hf:facebook/esm2_t12_35M_UR50D esm2-35m",
    "export": "bioseq models export esm2-8m@1 hf_folder",
    "report": "bioseq models report localization -o localization.html",
    "register": "bioseq models register runs/solubility/bundle --name solubility",
    "remove": "bioseq models remove solubility@1",
    "alias": "bioseq models alias default esm2-8m@1",
}


def parser() -> argparse.ArgumentParser:
    p = new_parser("models", "The models in the registry.", example=EXAMPLE)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument(
            "--registry",
            metavar="HOME",
            help="folder or URL of the registry (default: $BIOSEQ_HOME, else ~/.local/share/bioseq)",
        )
        return sub

    add("list", "all names, versions and aliases").add_argument(
        "--json", action="store_true", help="one JSON list on standard output"
    )
    show = add("show", "what a model is: its card")
    show.add_argument("name", metavar="NAME", help="NAME, NAME@V, an alias, or a bundle's folder")
    show.add_argument("--json", action="store_true", help="manifest and evidence as JSON")
    imported = add(
        "import", "import a backbone in the Hugging Face layout (docs/backbones.md lists the families)"
    )
    imported.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and model.safetensors, or hf:ORG/NAME[@REVISION] to fetch it from the "
        "Hugging Face hub (this command alone uses the network)",
    )
    imported.add_argument("name", metavar="NAME", help="its name in the registry")
    imported.add_argument(
        "--licence",
        help="the checkpoint's licence, for the card (default: what the hub's model card names, else unknown)",
    )
    imported.add_argument("--card", type=Path, help="a Markdown file to keep as its card")
    export = add("export", "write a backbone in its family's Hugging Face layout")
    export.add_argument("name", metavar="NAME", help="NAME, NAME@V, an alias, or a bundle's folder")
    export.add_argument("folder", metavar="DIR", help="the folder to write")
    export.add_argument("--force", action="store_true", help="replace DIR, with all that is in it")
    register = add("register", "copy a bundle into the registry, as the next version of its name")
    register.add_argument("bundle", metavar="BUNDLE", help="a folder that training wrote")
    register.add_argument("--name", help="register under this name (default: the bundle's own)")
    register.add_argument(
        "--accept-weak", action="store_true", help="accept a head that does not beat its trivial baseline"
    )
    add("remove", "remove one version; its number is never used again").add_argument(
        "ref", metavar="NAME@V", help="the version to remove"
    )
    alias = add("alias", "point an alias at a version, or move it there")
    alias.add_argument("alias", metavar="NAME", help="the alias")
    report = add("report", "write a head's report: how good it is, beside what, and what it has seen")
    report.add_argument("name", metavar="NAME", help="registry name, NAME@V, or bundle folder")
    report.add_argument(
        "-o", "--output", required=True, metavar="FILE.html", help="one file with its pictures inside"
    )
    report.add_argument("--force", action="store_true", help="replace an existing file")
    alias.add_argument("target", metavar="NAME@V", help="the version to point at")
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(list(argv))
    from bioseq.bundles.registry import Registry

    registry = Registry(args.registry)
    if args.command == "list":
        _list(registry, as_json=args.json)
    elif args.command == "show":
        _show(registry, args.name, as_json=args.json)
    elif args.command == "import":
        _import(registry, args)
    elif args.command == "export":
        from bioseq.backbones.importing import export_checkpoint

        folder = export_checkpoint(registry.resolve(args.name), args.folder, force=args.force)
        _say(f"wrote {folder}")
    elif args.command == "report":
        from bioseq.heads.report import head_report
        from bioseq.output import atomic_file

        text = head_report(registry.resolve(args.name))
        with atomic_file(args.output, force=args.force) as temporary:
            temporary.write_text(text, "utf-8")
        _say(f"wrote {args.output}")
    elif args.command == "register":
        _report(registry.register(args.bundle, args.name, accept_weak=args.accept_weak))
    elif args.command == "remove":
        _remove(registry, args.ref)
    elif args.command == "alias":
        entry = registry.alias(args.alias, args.target)
        _say(f"{args.alias} now means {entry.ref}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _report(entry: Entry) -> None:
    _say(f"registered {entry.ref} ({entry.kind}, {entry.content_hash})")
    for note in entry.notes:
        _say(f"note: {note}")


def _plain(entry: Entry) -> dict[str, Any]:
    data = asdict(entry)
    data["aliases"] = list(entry.aliases)
    del data["notes"]
    return data


def _list(registry: Registry, *, as_json: bool) -> None:
    entries = registry.entries()
    if as_json:
        print(json.dumps([_plain(e) for e in entries], indent=2))
        return
    if not entries:
        _say(f"no models in the registry at {registry.store.where}")
        return
    rows = [("NAME", "KIND", "TASK", "BASE", "HASH", "ALIASES")]
    for e in entries:
        base = "-"
        if e.kind == "head":
            named = e.base_weights_hash or e.base_hash or ""
            found = (b.ref for b in entries if b.kind == "backbone" and fits(e, b))
            base = next(found, f"{named[7:19]} (unknown)")
        aliases = ", ".join(e.aliases) or "-"
        rows.append((e.ref, e.kind, e.task or "-", base, e.content_hash[7:19], aliases))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _show(registry: Registry, name: str, *, as_json: bool) -> None:
    bundle = registry.resolve(name)
    manifest = bundle.manifest
    if as_json:
        print(json.dumps({"manifest": manifest.to_dict(), "evidence": bundle.evidence()}, indent=2))
        return
    version = f"@{manifest.version}" if manifest.version is not None else ""
    lines = [("name", f"{manifest.name}{version}"), ("kind", manifest.kind), ("hash", manifest.content_hash)]
    if manifest.weights_hash:
        lines.append(("weights", manifest.weights_hash))
    if manifest.kind == "head":
        lines += [
            ("task", str(manifest.task)),
            ("base", str(manifest.base_weights_hash or manifest.base_hash)),
        ]
        lines += [("labels", ", ".join(manifest.labels) or "-")]
    lines += [("alphabet", manifest.alphabet), ("licence", manifest.licence), ("folder", str(bundle.path))]
    for key, value in lines:
        print(f"{key + ':':<10}{value}")
    print()
    print(bundle.card(), end="")


def _import(registry: Registry, args: argparse.Namespace) -> None:
    from bioseq.backbones.importing import import_checkpoint
    from bioseq.bundles.manifest import check_name
    from bioseq.errors import InputError, RegistryError

    check_name(args.name, RegistryError)
    card = None
    if args.card is not None:
        try:
            card = args.card.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {args.card}: {error}.") from error
    with tempfile.TemporaryDirectory(prefix="bioseq-import-") as scratch:
        source, label, licence = args.source, None, "unknown"
        if source.startswith("hf:"):
            from bioseq.backbones.hub import fetch

            fetched = fetch(source, Path(scratch), say=_say)
            source, label, licence = fetched.folder, fetched.source, fetched.licence
        bundle = import_checkpoint(
            source,
            Path(scratch) / "bundle",
            name=args.name,
            licence=args.licence or licence,
            card=card,
            label=label,
        )
        entry = registry.register(bundle)
    _report(entry)
    if bundle.manifest.alphabet == "protein" and bundle.manifest.extra.get("lm_head"):
        _say(
            "its weight beside homologs is the default, near zero; fit it with: "
            f"bioseq homologs fit-mixture {entry.ref} --register {args.name}"
        )


def _remove(registry: Registry, ref: str) -> None:
    from bioseq.heads.relatives import remove

    entry = remove(registry, ref)
    _say(f"removed {entry.ref}")
    if entry.kind == "backbone":
        left = [e for e in registry.entries() if e.kind == "backbone"]
        heads = [h for h in registry.heads_for(entry) if not any(fits(h, e) for e in left)]
        if heads:
            _say(f"note: {', '.join(h.ref for h in heads)} cannot be used without it")
