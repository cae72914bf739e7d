"""Everything that bioseq raises on purpose.

    BioseqError                     code, hint; the command line exits with 1
    ├── InputError                  what a user handed in
    │   ├── FastaError              file and line
    │   ├── SequenceError           index, position (one-based)
    │   │   ├── IllegalResidueError
    │   │   ├── EmptySequenceError
    │   │   └── SequenceTooLongError
    │   ├── MutationError           variant notation, or a contradiction of the wild type
    │   ├── TableError              label tables; row numbers
    │   ├── AlignmentError          a user's alignment
    │   └── ExpressionError         filter and rank expressions; column of the fault
    ├── SpecError                   a job spec or setting; names the field
    ├── ArtefactError               files that bioseq reads as models
    │   ├── CheckpointError         Hugging Face layout; names the tensor
    │   ├── BundleError             bundle directories
    │   ├── ReferenceSetError        reference sets of homologs
    │   ├── VectorStoreError         stores of embeddings
    │   └── RegistryError
    │       └── NotFoundError       model.not_found, head.not_found, version.not_found
    ├── OutputError                 cannot be written: permission, full disk, would overwrite
    ├── ResourceError               memory, devices
    ├── SearchError                 a search for homologs that failed
    ├── ServiceError                what a remote bioseq answered (status, code)
    └── MissingExtraError           an optional dependency; prints the install line

Every message says what was given, the limit, where, and what to do. A message never contains a sequence:
sequences are confidential and messages travel to logs.
"""

from __future__ import annotations


class BioseqError(Exception):
    """Base of all errors that are meant for a user. `code` is stable and dotted; `hint` says what to do."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class InputError(BioseqError):
    code = "input.invalid"


class FastaError(InputError):
    """A FASTA file that cannot be read. `file` and one-based `line` say where."""

    code = "fasta.invalid"

    def __init__(
        self, message: str, *, file: str | None = None, line: int | None = None, hint: str | None = None
    ):
        where = f"{file}:{line}: " if line is not None else (f"{file}: " if file else "")
        super().__init__(where + message, hint=hint)
        self.file, self.line = file, line


class SequenceError(InputError):
    """One sequence is at fault. `index` is its place in the input, `position` the one-based residue."""

    code = "sequence.invalid"

    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        position: int | None = None,
        record: str | None = None,
        source: str | None = None,
        hint: str | None = None,
    ):
        where = f"record {record!r}" if record else (f"sequence {index}" if index is not None else "")
        if source:
            where = f"{source}: {where}" if where else source
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.bare = message
        self.index, self.position, self.record, self.source = index, position, record, source

    def at(
        self, *, index: int | None = None, record: str | None = None, source: str | None = None
    ) -> SequenceError:
        """The same error, told where the sequence came from."""
        return type(self)(
            self.bare,
            index=self.index if index is None else index,
            position=self.position,
            record=record or self.record,
            source=source or self.source,
            hint=self.hint,
        )


class IllegalResidueError(SequenceError):
    code = "sequence.illegal_residue"


class EmptySequenceError(SequenceError):
    code = "sequence.empty"


class SequenceTooLongError(SequenceError):
    code = "sequence.too_long"


class MutationError(InputError):
    code = "mutation.invalid"


class TableError(InputError):
    """A label table. `rows` are the one-based data rows at fault (header not counted), all of them."""

    code = "table.invalid"

    def __init__(self, message: str, *, rows: list[int] | None = None, hint: str | None = None):
        if rows:
            first = ", ".join(str(r) for r in rows[:10])
            more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
            message = f"{message} (row{'s' if len(rows) > 1 else ''} {first}{more}; {len(rows)} in all)"
        super().__init__(message, hint=hint)
        self.rows = rows or []


class AlignmentError(InputError):
    """An alignment that cannot be read, or that is not one of the query."""

    code = "alignment.invalid"


class ExpressionError(InputError):
    """A --where or --rank expression. `column` is the one-based character of the fault."""

    code = "expression.invalid"

    def __init__(self, message: str, *, column: int | None = None, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.column = column


class SpecError(BioseqError):
    """A job spec or a setting. `field` names it, dotted."""

    code = "spec.invalid"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None):
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field


class ArtefactError(BioseqError):
    code = "artefact.invalid"


class CheckpointError(ArtefactError):
    code = "checkpoint.invalid"


class BundleError(ArtefactError):
    code = "bundle.invalid"


class ReferenceSetError(ArtefactError):
    """A reference set of homologs that is missing, damaged or unsuitable."""

    code = "homologs.reference_invalid"


class VectorStoreError(ArtefactError):
    """A store of vectors that is missing, damaged, or holds others than were asked for."""

    code = "vectors.invalid"


class RegistryError(ArtefactError):
    code = "registry.invalid"


class NotFoundError(RegistryError):
    code = "model.not_found"


class OutputError(BioseqError):
    code = "output.unwritable"


class ResourceError(BioseqError):
    code = "resource.insufficient"


class SearchError(BioseqError):
    code = "homologs.search_failed"


class ServiceError(BioseqError):
    """A remote service refused or failed. `status` is the HTTP status, `retry_after` the seconds it asked to wait."""

    code = "service.error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        hint: str | None = None,
    ):
        super().__init__(message, code=code, hint=hint)
        self.status, self.retry_after = status, retry_after


class MissingExtraError(BioseqError):
    """An optional dependency is not installed."""

    code = "extra.missing"

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed.", hint=f"Install it with: pip install 'bioseq[{extra}]'"
        )
