"""Reference sets: the proteins that a search looks in.

Concept: a reference set is a folder with `manifest.json` and one file of sequences, which is all that travels.
Its identity is the hash of its sequences, not its name. What MMseqs2 needs is built from it on first use, once a
computer, under `$BIOSEQ_HOME/homologs/` (see `database`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bioseq.compression import DAMAGED, unpacked
from bioseq.errors import OutputError, ReferenceSetError, SequenceError
from bioseq.output import atomic_folder
from bioseq.sequences.alphabet import protein
from bioseq.sequences.fasta import Record
from bioseq.specs.reading import build, read_file

FORMAT = 1
LONGEST = 65_000  # residues; MMseqs2 cuts at 65,535
SHIPPED = Path(__file__).parent / "default"
_KINDS = {"xz": "xz", "gz": "gzip"}


@dataclass(frozen=True, slots=True)
class ReferenceManifest:
    """What a reference set says of itself. `hash` is its identity: format, alphabet and sequences.

    `sequences_sha256` is over the text `>id\\nRESIDUES\\n` of all sequences in order, unpacked; `file_sha256` over
    the file as it lies there.
    """

    format: int
    name: str
    alphabet: str
    sequences: int
    residues: int
    sequences_sha256: str
    file: str
    file_bytes: int
    file_sha256: str
    hash: str
    licence: str = ""
    source: str = ""
    citation: str = ""
    selection: str = ""
    left_out: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def _identity(alphabet: str, sequences_sha256: str) -> str:
    return hashlib.sha256(f"bioseq homologs {FORMAT} {alphabet} {sequences_sha256}".encode()).hexdigest()


class _Counted:
    """A file that is written, with the number and the hash of its bytes."""

    def __init__(self, handle: IO[bytes]):
        self.handle, self.bytes, self.sha = handle, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.sha.update(data)
        return self.handle.write(data)

    def flush(self) -> None:
        self.handle.flush()


def build_reference(
    records: Iterable[Record],
    out: str | Path,
    *,
    name: str = "",
    licence: str = "",
    source: str = "",
    citation: str = "",
    selection: str = "",
    pack: str = "gz",
    force: bool = False,
) -> ReferenceSet:
    """Write the reference set `out` from records, one at a time, so any number will do.

    `pack` is "gz" (fast) or "xz" (a fifth smaller, twenty times slower). Sequences over 65,000 residues are left
    out and counted. Raises `SequenceError` (naming the record), `OutputError`, `ReferenceSetError` for no sequence.
    """
    if pack not in _KINDS:
        raise ValueError(f"pack is {pack!r}; use gz or xz")
    alphabet = protein()
    letters = alphabet.tokens
    table = bytes(ord(t) if len(t) == 1 else ord("X") for t in letters) + bytes(256 - len(letters))
    sha, count, residues, long = hashlib.sha256(), 0, 0, 0
    with atomic_folder(out, force=force) as folder:
        path = folder / f"sequences.fasta.{pack}"
        with open(path, "wb") as raw:
            counted = _Counted(raw)
            packed: Any = (
                gzip.GzipFile(filename="", mode="wb", fileobj=counted, compresslevel=1, mtime=0)
                if pack == "gz"
                else lzma.LZMAFile(counted, "wb", preset=6)  # type: ignore[arg-type]  # noqa: SIM115
            )
            with packed:
                for index, record in enumerate(records):
                    try:
                        ids = alphabet.encode(record.sequence).ids
                    except SequenceError as error:
                        raise error.at(index=index, record=record.id, source=record.source) from None
                    if len(ids) > LONGEST:
                        long += 1
                        continue
                    text = b">%s\n%s\n" % (
                        "".join(record.id.split()).encode(),
                        ids.tobytes().translate(table),
                    )
                    sha.update(text)
                    packed.write(text)
                    count += 1
                    residues += len(ids)
        if not count:
            raise ReferenceSetError(
                "there is no sequence to build a reference set from.", hint="Give at least one protein."
            )
        digest = sha.hexdigest()
        manifest = ReferenceManifest(
            format=FORMAT,
            name=name or Path(out).name,
            alphabet=alphabet.name,
            sequences=count,
            residues=residues,
            sequences_sha256=digest,
            file=path.name,
            file_bytes=counted.bytes,
            file_sha256=counted.sha.hexdigest(),
            hash=_identity(alphabet.name, digest),
            licence=licence,
            source=source,
            citation=citation,
            selection=selection,
            left_out=long,
        )
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return ReferenceSet(Path(out), manifest)


class ReferenceSet:
    """An opened reference set. `database.open_database` gives what the search needs, built on first use."""

    def __init__(self, folder: Path, manifest: ReferenceManifest):
        self.folder, self.manifest = folder, manifest

    @property
    def hash(self) -> str:
        return self.manifest.hash

    @property
    def name(self) -> str:
        return self.manifest.name

    def __len__(self) -> int:
        return self.manifest.sequences

    def __repr__(self) -> str:
        return f"ReferenceSet({self.name!r}, {len(self)} sequences, {self.hash[:12]})"

    @contextmanager
    def _unpacked(self) -> Iterator[IO[bytes]]:
        path = self.folder / self.manifest.file
        try:
            with open(path, "rb") as raw:
                yield unpacked(raw, _KINDS[path.suffix[1:]])
        except FileNotFoundError:
            raise ReferenceSetError(
                f"{path} is not there any more.", hint="Put the reference set back, or build it again."
            ) from None
        except DAMAGED as error:
            raise ReferenceSetError(
                f"{path} is damaged: {error}.", hint="Fetch or build it again."
            ) from error

    def records(self) -> Iterator[Record]:
        """Its sequences in order. Raises `ReferenceSetError` at the end where their hash is not the manifest's."""
        sha, count = hashlib.sha256(), 0
        with self._unpacked() as handle:
            for header in handle:
                residues = next(handle, b"")
                sha.update(header)
                sha.update(residues)
                count += 1
                yield Record(header[1:-1].decode(), residues[:-1].decode(), f"{self.name}:{count}")
        if sha.hexdigest() != self.manifest.sequences_sha256 or count != self.manifest.sequences:
            raise ReferenceSetError(
                f"the sequences of {self.folder} do not match their manifest's hash.",
                code="homologs.wrong_hash",
                hint="Fetch or build it again.",
            )


def open_reference(reference: str | Path | ReferenceSet = "default") -> ReferenceSet:
    """The shipped set ("default") or the folder of one, with its file checked against the manifest.

    Raises `ReferenceSetError`: no such folder, half built, unknown keys or format, another alphabet, wrong hash.
    """
    if isinstance(reference, ReferenceSet):
        return reference
    folder = SHIPPED if str(reference) == "default" else Path(reference)
    manifest = _read_manifest(folder)
    path = folder / manifest.file
    if manifest.alphabet != protein().name:
        raise ReferenceSetError(
            f"{folder} holds {manifest.alphabet} sequences; homologs are searched among proteins.",
            code="homologs.other_alphabet",
        )
    if manifest.hash != _identity(manifest.alphabet, manifest.sequences_sha256):
        raise _wrong_hash(folder, "hash")
    try:
        size = path.stat().st_size
        if size != manifest.file_bytes or _file_sha(path) != manifest.file_sha256:
            raise _wrong_hash(folder, "file_sha256")
    except OSError as error:
        raise ReferenceSetError(
            f"{path} cannot be read: {error.strerror}.",
            hint="The reference set is not whole; build it again.",
        ) from error
    return ReferenceSet(folder, manifest)


def _wrong_hash(folder: Path, key: str) -> ReferenceSetError:
    return ReferenceSetError(
        f"{folder} does not match the {key} in its manifest.",
        code="homologs.wrong_hash",
        hint="It was changed or copied in part; fetch or build it again.",
    )


_seen: dict[tuple[str, int, int], str] = {}


def _file_sha(path: Path) -> str:
    """Its hash, remembered while size and time of change stay."""
    stat = os.stat(path)
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _seen:
        with open(path, "rb") as handle:
            _seen[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _seen[key]


def _read_manifest(folder: Path) -> ReferenceManifest:
    path = folder / "manifest.json"
    if not path.is_file():
        what = "is not a reference set" if folder.is_dir() else "does not exist"
        raise ReferenceSetError(
            f"{folder} {what}: there is no manifest.json in it.",
            code="homologs.not_found",
            hint="Name 'default' or a folder made by: bioseq homologs build FASTA -o FOLDER",
        )
    given = read_file(path, error=ReferenceSetError)
    if isinstance(given, dict) and given.get("format") != FORMAT:
        raise ReferenceSetError(f"{path}: format {given.get('format')!r}; this bioseq reads {FORMAT}.")
    manifest = build(ReferenceManifest, given, error=ReferenceSetError, where=str(path))
    if manifest.file not in {f"sequences.fasta.{pack}" for pack in _KINDS}:
        raise ReferenceSetError(f"{path}: file is {manifest.file!r}; it must be sequences.fasta.gz or .xz.")
    return manifest


def homologs_home() -> Path:
    """Where databases and the cache of searches lie: `$BIOSEQ_HOME/homologs`, or the cache folder where the
    registry is remote. Made for its owner alone, as it holds sequences. Raises `OutputError` where it cannot be made
    or entered."""
    home = os.environ.get("BIOSEQ_HOME") or "~/.local/share/bioseq"
    if "://" in home:
        home = os.environ.get("BIOSEQ_CACHE") or "~/.cache/bioseq"
    folder = Path(home).expanduser() / "homologs"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.listdir(folder)
    except OSError as error:
        raise OutputError(
            f"cannot make or enter {folder}: {error.strerror}.",
            hint="Set BIOSEQ_HOME to a folder that you may write.",
        ) from error
    return folder
