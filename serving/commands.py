"""The subcommands of this package: `bioseq serve | keys | screen | report | jobs`. Thin: each imports its room when
it is called."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bioseq.cli import new_parser, positive_int


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


# ------------------------------------------------------------------------------------------------------ serve


def _serve_parser() -> argparse.ArgumentParser:
    p = new_parser(
        "serve",
        "Serve the REST API on the embedded default model, or another, until Ctrl-C.",
        example="""bioseq serve
  curl -s http://127.0.0.1:8000/v1/embed -H 'Content-Type: application/json' -d '{"sequences": ["MKTAYIAKQR"]}'
  bioseq keys create alice && bioseq serve --host 0.0.0.0""",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    p.add_argument("--port", type=positive_int, default=8000, help="default: 8000")
    p.add_argument("--model", default="default", help="registry name, NAME@V, or a bundle's folder")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="arithmetic; int8: on a CPU alone",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--threads", type=positive_int, help="CPU threads of each engine")
    p.add_argument("--insecure", action="store_true", help="serve beyond loopback without asking for keys")
    p.add_argument("--database", default="", metavar="URL", help="default: SQLite in $BIOSEQ_HOME")
    p.add_argument(
        "--root",
        action="append",
        default=[],
        metavar="DIR",
        help="let admins register bundles from here; repeatable",
    )
    p.add_argument(
        "--homologs",
        default="default",
        metavar="NAME",
        help="reference set of scores and scans that name none; 'none' for no search (default: the shipped one)",
    )
    p.add_argument(
        "--reference-set",
        action="append",
        default=[],
        metavar="DIR",
        help="a reference set that requests may name by its folder's name; repeatable",
    )
    p.add_argument(
        "--vectors",
        action="append",
        default=[],
        metavar="STORE",
        help="a vector store that requests may search by its folder's name; repeatable",
    )
    p.add_argument("--log-file", help="access log, JSON lines (default: logs/access.jsonl in $BIOSEQ_HOME)")
    group = p.add_argument_group("limits")
    group.add_argument(
        "--max-queue",
        type=_positive,
        default=30.0,
        metavar="S",
        help="longest time until a request's answer; what cannot be done in it is refused",
    )
    group.add_argument("--max-items", type=positive_int, default=10_000, help="sequences a request")
    group.add_argument("--request-timeout", type=_positive, default=600.0, metavar="S", help="of one request")
    group.add_argument(
        "--drain", type=_positive, default=30.0, metavar="S", help="wait for requests when stopping"
    )
    group = p.add_argument_group("cluster")
    group.add_argument("--address", help="a running Ray cluster (default: start one here)")
    group.add_argument("--engines", type=positive_int, default=1, help="engine replicas")
    group.add_argument(
        "--max-engines", type=positive_int, default=1, help="let the tokens that wait raise it to so many"
    )
    group.add_argument(
        "--queued-tokens", type=positive_int, default=32_768, help="that call for one engine more"
    )
    group.add_argument("--gpus", type=float, default=0.0, help="GPUs of each engine")
    group.add_argument("--cpus", type=positive_int, help="logical CPUs of the Ray that is started here")
    group.add_argument("--open-metrics", action="store_true", help="/metrics answers without a key")
    group.add_argument("--traces", action="store_true", help="OpenTelemetry traces, if installed")
    return p


def serve(argv: list[str]) -> int:
    args = _serve_parser().parse_args(argv)
    from bioseq.vectors.store import VectorStore
    from serving.cluster.running import run
    from serving.settings import Settings, default_home

    for folder in args.vectors:
        VectorStore(folder)  # raises where there is none
    settings = Settings(
        host=args.host,
        port=args.port,
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        insecure=args.insecure,
        database=args.database,
        roots=tuple(args.root),
        homologs=args.homologs,
        reference_sets=tuple(args.reference_set),
        vector_stores=tuple(args.vectors),
        log_file=args.log_file or str(default_home() / "logs" / "access.jsonl"),
        max_queue_s=args.max_queue,
        max_items=args.max_items,
        request_s=args.request_timeout,
        drain_s=args.drain,
        engine_replicas=args.engines,
        min_engine_replicas=args.engines,
        max_engine_replicas=args.max_engines,
        target_queued_tokens=args.queued_tokens,
        engine_gpus=args.gpus,
        open_metrics=args.open_metrics or None,
        traces=args.traces,
    )
    return run(settings, address=args.address, num_cpus=args.cpus)


# ------------------------------------------------------------------------------------------------------- keys


def _keys_parser() -> argparse.ArgumentParser:
    p = new_parser(
        "keys",
        "API keys of the service. Once one was made, every request needs one.",
        example="""bioseq keys create alice --scopes read,predict --tokens-per-minute 1000000
  bioseq keys list
  bioseq keys revoke 1f6c0a9e2b77""",
    )
    p.add_argument("--database", default="", metavar="URL", help="default: SQLite in $BIOSEQ_HOME")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; it is shown once, on standard output")
    create.add_argument("name", help="whose it is")
    create.add_argument(
        "--scopes", default="read,predict", help="of read, predict, train, admin (default: read,predict)"
    )
    create.add_argument("--requests-per-minute", type=positive_int)
    create.add_argument("--tokens-per-minute", type=positive_int)
    create.add_argument("--days", type=positive_int, help="valid for so long (default: until revoked)")
    actions.add_parser("list", help="all keys, with what they used")
    revoke = actions.add_parser("revoke", help="end a key; it may still work for two seconds")
    revoke.add_argument("id")
    return p


def keys(argv: list[str]) -> int:
    args = _keys_parser().parse_args(argv)
    from serving.database.base import Database
    from serving.database.keys import Keys
    from serving.settings import default_database

    database = Database(args.database or default_database())
    database.upgrade()
    room = Keys(database)
    if args.action == "create":
        scopes = tuple(s.strip() for s in args.scopes.split(",") if s.strip())
        info, text = room.create(
            args.name,
            scopes,
            requests_per_minute=args.requests_per_minute,
            tokens_per_minute=args.tokens_per_minute,
            days=args.days,
        )
        print(text)
        print(
            f"key {info.id} of {info.name}: {', '.join(scopes)}. Keep it: it is not shown again.",
            file=sys.stderr,
        )
    elif args.action == "revoke":
        info = room.revoke(args.id)
        print(f"key {info.id} of {info.name} is revoked.", file=sys.stderr)
    else:
        _print_keys(room)
    database.dispose()
    return 0


def _print_keys(room: Any) -> None:
    rows = [("id", "name", "scopes", "limits a minute", "created", "state", "requests", "tokens")]
    for key in room.list():
        limits = [
            f"{v} {what}"
            for v, what in ((key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens"))
            if v is not None
        ]
        state = f"revoked {key.revoked:%Y-%m-%d}" if key.revoked else "valid"
        if not key.revoked and key.expires:
            state = f"until {key.expires:%Y-%m-%d}"
        used = room.used(key.id)
        scopes = ",".join(sorted(key.scopes))
        created = f"{key.created:%Y-%m-%d}"
        rows.append((key.id, key.name, scopes, ", ".join(limits) or "none", created, state, *map(str, used)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


# ------------------------------------------------------------------------------------------- screen and report


def screen(argv: list[str]) -> int:
    from serving.screening.cli import main_screen

    return main_screen(argv)


def report(argv: list[str]) -> int:
    from serving.screening.cli import main_report

    return main_report(argv)


# ------------------------------------------------------------------------------------------------------- jobs


def jobs(argv: list[str]) -> int:
    from serving.jobs.commands import jobs

    return jobs(argv)
