"""What searches leave on the disk is for its owner alone, and goes with the head that it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bioseq.bundles.bundle import write_bundle
from bioseq.bundles.registry import Registry
from bioseq.commands import models as command
from bioseq.errors import OutputError
from bioseq.homologs.cache import SearchCache
from bioseq.homologs.database import open_database
from bioseq.homologs.reference import ReferenceSet, build_reference, homologs_home
from bioseq.homologs.search import search
from bioseq.sequences.fasta import Record


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))


def test_others_read_neither_databases_nor_answers(reference: ReferenceSet, families: list[Record]) -> None:
    search(families[:1], reference, cache=SearchCache(), quiet=True)
    home = homologs_home()
    assert home.stat().st_mode & 0o777 == 0o700
    assert open_database(reference).folder.stat().st_mode & 0o777 == 0o700
    kept = list(home.glob("searches.sqlite*"))
    assert kept and not any(f.stat().st_mode & 0o077 for f in kept)


def test_a_home_that_cannot_be_entered_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bioseq.homologs.reference.os.listdir", closed)  # root may enter any
    with pytest.raises(OutputError, match="Permission denied"):
        homologs_home()


def test_the_database_of_a_heads_training_rows_goes_with_its_last_version(
    families: list[Record], tmp_path: Path
) -> None:
    rows = build_reference(families[:8], tmp_path / "rows")
    registry = Registry()
    for name in ("first", "second"):
        folder = tmp_path / name
        fields = {
            "kind": "head",
            "name": "kin",
            "alphabet": "protein",
            "task": "binary",
            "labels": ["a", "b"],
            "base_hash": "sha256:" + "0" * 64,
        }
        files = {f"homologs/{f.name}": f for f in rows.folder.iterdir()}
        write_bundle(
            folder,
            manifest_fields=fields,
            tensors={"w": torch.zeros(1)},
            card=f"# {name}",
            evidence={},
            extra_files=files,
        )
        registry.register(folder, "kin")
    database = open_database(rows, quiet=True)
    other = open_database(build_reference(families[8:12], tmp_path / "other"), quiet=True)
    assert command.main(["remove", "kin@1"]) == 0 and (database.folder / "ready.json").exists()
    assert command.main(["remove", "kin@2"]) == 0 and not database.folder.exists()
    assert (other.folder / "ready.json").exists()
