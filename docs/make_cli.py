"""Writes docs/cli.md from the real `--help` of every command; a test holds the file equal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"

from bioseq.cli import CORE, EXTRAS, main

VERBS = ("create", "propose", "ingest", "mark", "status", "report", "simulate")
SUB = {
    "campaign": VERBS,
    "pretrain": ("prepare", "run"),
    "vectors": ("add", "search", "annotate"),
    "models": (),
    "jobs": (),
    "keys": (),
}


def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "-h"])
    return out.getvalue().rstrip()


def render() -> str:
    parts = ["# The command line", "", "Made by `python docs/make_cli.py` from each command's own help.", ""]
    parts += ["```", help_of().replace("usage: bioseq -h", "usage: bioseq"), "```", ""]
    for command in (*CORE, *EXTRAS):
        for words in ((command,), *((command, sub) for sub in SUB.get(command, ()))):
            parts += [f"## bioseq {' '.join(words)}", "", "```", help_of(*words), "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(render(), "utf-8")
    sys.exit(0)
