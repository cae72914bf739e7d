"""The `bioseq` command: finds the subcommand and turns errors into messages. Imports nothing heavy.

Exit codes: 0 done, 1 failed, 2 wrong use. Results go to standard output only when asked (`-o -`), messages
to standard error. `training` and `serving` add subcommands through the entry-point group `bioseq.commands`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

from bioseq.errors import BioseqError, MissingExtraError
from bioseq.version import __version__

GROUP = "bioseq.commands"
CORE = {
    "embed": ("bioseq.commands.embed", "embeddings of the proteins in a FASTA file"),
    "score": ("bioseq.commands.score", "how likely variants of a protein are"),
    "scan": ("bioseq.commands.scan", "all single substitutions of a protein, with a heat map"),
    "predict": ("bioseq.commands.predict", "properties of proteins, by the heads you name"),
    "contacts": ("bioseq.commands.contacts", "which residues of a protein touch, by ESM-2's contact head"),
    "attribute": ("bioseq.commands.attribute", "how much each residue adds to what a head says"),
    "homologs": ("bioseq.commands.homologs", "find relatives of proteins in a reference set"),
    "vectors": ("bioseq.commands.vectors", "keep embeddings, and find the nearest proteins"),
    "design": ("bioseq.commands.design", "new variants that an objective finds good, under constraints"),
    "models": ("bioseq.commands.models", "list, import, export and register models"),
}
EXTRAS = {  # what the other two packages add; the text is here so that help needs no import
    "screen": ("serve", "rank a FASTA library of any size"),
    "report": ("serve", "build the report of a screen again"),
    "pretrain": ("train", "train a protein language model on sequences"),
    "finetune": ("train", "train a property head on a table of labels"),
    "campaign": ("train", "rounds of design and measurement: which variants next"),
    "serve": ("serve", "start the REST API"),
    "jobs": ("serve", "submit and follow jobs on a server"),
    "keys": ("serve", "create, list and revoke API keys"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\nSee: {self.prog} -h\n")


def new_parser(command: str, description: str, *, example: str = "") -> argparse.ArgumentParser:
    """A parser with bioseq's layout: description, options, then worked examples."""
    return _Parser(
        prog=f"bioseq {command}".strip(),
        description=description,
        epilog=f"example:\n  {example.strip()}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive_int(text: str) -> int:
    """argparse type: an integer >= 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device and --threads: what `bioseq.load` takes."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model", default="default", help="registry name, NAME@V, or a folder (default: default)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="arithmetic; int8: on a CPU alone",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--threads", type=positive_int, default=None, help="CPU threads of the engine")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """--server and --api-key: ask a running service instead of a local engine."""
    group = parser.add_argument_group("remote")
    group.add_argument("--server", metavar="URL", help="ask a running `bioseq serve` instead of this machine")
    group.add_argument("--api-key", help="its API key (default: the environment variable BIOSEQ_API_KEY)")


def api_key(args: argparse.Namespace) -> str | None:
    return args.api_key or os.environ.get("BIOSEQ_API_KEY")


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _usage(plugins: dict[str, EntryPoint]) -> str:
    lines = [
        "usage: bioseq COMMAND [OPTIONS]",
        "",
        f"bioseq {__version__}: protein language models to embed, predict, score, screen, train and serve.",
        "",
    ]
    shown = {name: text for name, (_, text) in CORE.items()} | {
        name: text for name, (_, text) in EXTRAS.items() if name in plugins
    }
    shown |= {name: f"added by {p.module}" for name, p in plugins.items() if name not in shown}
    lines += [f"  {name:<10} {text}" for name, text in shown.items()]
    lines += [
        "",
        "bioseq COMMAND -h tells more, with an example. `bioseq --version` tells the version.",
        "",
        "example:",
        "  bioseq embed proteins.fasta -o embeddings.parquet",
    ]
    return "\n".join(lines)


def _find(name: str, plugins: dict[str, EntryPoint]) -> Callable[[list[str]], int]:
    if name in CORE:
        return importlib.import_module(CORE[name][0]).main
    try:
        return plugins[name].load()
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("bioseq", "training", "serving"):
            raise
        raise MissingExtraError(error.name or "a dependency", EXTRAS.get(name, ("all", ""))[0]) from error


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    plugins = _plugins()
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage(plugins))
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"bioseq {__version__}")
        return 0
    name, *rest = args
    if name not in CORE and name not in plugins:
        if name in EXTRAS:
            print(f"bioseq: error: {MissingExtraError(f'bioseq {name}', EXTRAS[name][0])}", file=sys.stderr)
            return 1
        print(f"bioseq: error: there is no command {name!r}.\nSee: bioseq --help", file=sys.stderr)
        return 2
    try:
        return _find(name, plugins)(rest)
    except BioseqError as error:
        print(f"bioseq: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("bioseq", "training", "serving"):
            raise
        extra = EXTRAS.get(name, ("all", ""))[0]
        print(f"bioseq: error: {MissingExtraError(error.name or 'a package', extra)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing and keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("bioseq: interrupted", file=sys.stderr)
        return 130
