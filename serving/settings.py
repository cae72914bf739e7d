"""Every setting of the service, with its default. Plain data, so that a Serve config file can carry it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bioseq.errors import SpecError

MIB = 1024 * 1024


def default_home() -> Path:
    """Where the service keeps its database, logs and tokens: $BIOSEQ_HOME when it is a folder of this machine."""
    home = os.environ.get("BIOSEQ_HOME", "")
    if home and "://" not in home:
        return Path(home)
    return Path.home() / ".local" / "share" / "bioseq"


def default_database() -> str:
    """$BIOSEQ_DATABASE, else an SQLite file in the service's home."""
    return os.environ.get("BIOSEQ_DATABASE") or f"sqlite:///{default_home() / 'service.sqlite'}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits are those of one request unless they say otherwise; times in seconds.

    `model` answers where a request names none. `threads` are the batches that an
    engine runs at a time on a CPU, each on one thread (default: its share of the cores). `max_queue_s` bounds
    the time from an accepted request's arrival to its answer (see `serving.engine.batcher`). `body_s` is the time in
    which a body must arrive, `request_s` the time a request may take in all, `recovery_s` how long a request
    waits for an engine that is being restarted before it is answered 503.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model: str = "default"
    registry: str | None = None
    database: str = ""
    home: str = ""
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    budget: int | None = None
    max_models: int = 4
    max_heads: int = 64
    max_items: int = 10_000
    max_body_bytes: int = 64 * MIB
    max_held_bytes: int = (
        1024 * MIB
    )  # of bodies and pieces of answers of all requests in flight, in one ingress
    max_variants: int = 10_000
    max_variant_bytes: int = 4 * MIB
    max_request_tokens: int = 20_000_000
    max_item_bytes: int = 512 * MIB  # of the answer for one sequence, which an engine holds whole
    max_answer_bytes: int = 16 * 1024 * MIB
    max_upload_bytes: int = 16 * 1024 * MIB
    max_queue_s: float = 30.0
    max_queued_tokens: int = 4_000_000
    body_s: float = 30.0
    request_s: float = 600.0
    recovery_s: float = 60.0
    drain_s: float = 30.0
    chunk_tokens: int = 16_384
    chunk_bytes: int = 8 * MIB
    parallel_chunks: int = 4
    engine_replicas: int = 1
    max_engine_replicas: int = 1
    min_engine_replicas: int = 0
    engine_cpus: float = 0.5
    engine_gpus: float = 0.0
    target_queued_tokens: int = 32_768
    ingress_replicas: int = 1
    open_metrics: bool | None = None
    insecure: bool = False
    traces: bool = False
    log_file: str | None = None
    poll_s: float = 1.0
    roots: tuple[str, ...] = ()
    behind_serve: bool = False
    # Homologs: the reference set of scores and scans that name none ("none": no search), further ones by their folder,
    # and the deployment that searches, for heads that read homologs too.
    homologs: str = "default"
    reference_sets: tuple[str, ...] = ()
    search_replicas: int = 1
    search_cpus: float = 0.5
    search_threads: int | None = None
    max_queued_residues: int = 2_000_000
    # Folders of vector stores that requests search by their folder's name, and the comparisons (queries times vectors)
    # that one request may cost.
    vector_stores: tuple[str, ...] = ()
    max_comparisons: int = 2_000_000_000
    # Jobs and files: `data` is where they lie (default: the home), on a disk that all nodes see.
    data: str = ""
    max_running_jobs: int = 3
    max_running_jobs_per_key: int = 2
    max_jobs_per_key: int = 100
    max_campaigns_per_key: int = 1000
    # Of one attempt of a job: its time, the memory of its own processes (workers on a cluster are bounded by their
    # nodes), and what lies in its folder. None for no limit.
    max_job_hours: float | None = 24.0 * 14
    max_job_memory_bytes: int | None = None
    max_job_bytes: int | None = 512 * 1024 * MIB
    max_file_bytes: int = 16 * 1024 * MIB
    max_stored_bytes_per_key: int = 256 * 1024 * MIB
    max_job_workers: int = 64
    job_attempts: int = 5
    file_days: int = 30
    job_days: int = 90
    usage_days: int = 90  # after which a key's usage is kept as one sum, no longer by the minute
    jobs_poll_s: float = 0.5
    jobs_lease_s: float = 15.0

    def __post_init__(self) -> None:
        for name in (
            "max_items",
            "max_body_bytes",
            "max_held_bytes",
            "chunk_tokens",
            "parallel_chunks",
            "engine_replicas",
        ):
            if getattr(self, name) < 1:
                raise SpecError(f"{getattr(self, name)} is below 1.", field=name)
        for name in ("max_queue_s", "body_s", "request_s", "poll_s"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{getattr(self, name)} is not above 0.", field=name)
        if not self.database:
            object.__setattr__(self, "database", default_database())
        if not self.home:
            object.__setattr__(self, "home", str(default_home()))
        if not self.data:
            object.__setattr__(self, "data", os.environ.get("BIOSEQ_DATA") or self.home)
        object.__setattr__(self, "roots", tuple(self.roots))
        object.__setattr__(self, "reference_sets", tuple(self.reference_sets))
        object.__setattr__(self, "vector_stores", tuple(self.vector_stores))
        if self.homologs not in ("none", *self.references):
            raise SpecError(
                "this reference set is not one of the server's.", field="homologs",
                hint=f"Known: none, {', '.join(self.references)}.",
            )  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Raises `SpecError` for an unknown key."""
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise SpecError(
                    "unknown setting.", field=str(key), hint=f"Known: {', '.join(sorted(known))}."
                )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def references(self) -> dict[str, str]:
        """Reference sets by the name that requests give: "default", and each folder's own name."""
        return {"default": "default", **{Path(folder).name: folder for folder in self.reference_sets}}

    @property
    def stores(self) -> dict[str, str]:
        """Vector stores by the name that requests give: each folder's own."""
        return {Path(folder).name: folder for folder in self.vector_stores}

    @property
    def searches(self) -> bool:
        """Whether requests may have homologs searched; heads that read homologs do in any case."""
        return self.homologs != "none" or bool(self.reference_sets)

    @property
    def on_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def metrics_open(self) -> bool:
        """Whether /metrics answers without a key: on loopback, unless set."""
        return self.on_loopback if self.open_metrics is None else self.open_metrics
