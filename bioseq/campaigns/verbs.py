"""`bioseq.campaign(FOLDER)`: the verbs of `bioseq campaign` in Python."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bioseq.campaigns.campaign import Campaign
from bioseq.campaigns.ingest import ingest
from bioseq.errors import MissingExtraError


class campaign(Campaign):
    """An opened campaign with `propose`, `ingest`, `mark`, `status`, `plate` and `report`; `campaign.create` starts one.
    Raises what the commands raise."""

    def _command(self, *words: str) -> None:
        """What fits surrogates is reached through the entry point of the command: the core does not import it."""
        found = entry_points(group="bioseq.commands", name="campaign")
        if not found:
            raise MissingExtraError("training", "train")
        next(iter(found)).load()(list(words))

    def propose(self, *, more: bool = False) -> dict[str, Any]:
        """Choose the next round: its number, reasons, and what the surrogates believed. The wells are in `plate(N)`."""
        self._command("propose", str(self.folder), *(["--more"] if more else []))
        return json.loads((self.round_folder(self.state().rounds) / "proposal.json").read_text("utf-8"))

    def ingest(
        self, results: str | Path | bytes, *, round_: int | None = None, correct: bool = False
    ) -> dict[str, int]:
        """Take in results, all rows or none; counts of measured, failed and unproposed wells."""
        return ingest(self, results, round_=round_, correct=correct)

    def report(self, output: str | Path, *, force: bool = False) -> None:
        """The campaign as one HTML file."""
        self._command("report", str(self.folder), "-o", str(output), *(["--force"] if force else []))
