"""`bioseq jobs`: a thin face of `bioseq.client.sync`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, TextIO

from bioseq.cli import add_server_options, api_key, new_parser, positive_int

KINDS = ("pretrain", "finetune", "screen", "propose")
EXAMPLE = """export BIOSEQ_SERVER=http://127.0.0.1:8000
  bioseq jobs submit finetune.toml --follow
  bioseq jobs list --state RUNNING
  bioseq jobs logs JOB --follow
  bioseq jobs result JOB -o out/"""
TELL = """A job file is the spec that `bioseq KIND --spec FILE` takes, with a line such as
kind = "finetune". Files of this machine that it names are uploaded first."""


def _parser() -> argparse.ArgumentParser:
    p = new_parser("jobs", f"Pretrain, finetune and screen jobs on a server.\n\n{TELL}", example=EXAMPLE)
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for parser in (p, common):  # before the action and after it; SUPPRESS keeps what was given before
        add_server_options(parser)
        parser.add_argument("--json", action="store_true", help="answers as JSON on standard output")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, parents=[common], allow_abbrev=False)

    submit = action("submit", "submit a job file (TOML or JSON)")
    submit.add_argument("spec", metavar="SPEC.toml")
    submit.add_argument("--kind", choices=KINDS, help="if the file does not say")
    submit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field")
    submit.add_argument("--name", help="shown in lists")
    submit.add_argument("--idempotency-key", metavar="K", help="the same key gives the same job again")
    submit.add_argument("--follow", action="store_true", help="show its log until it ends")

    show = action("list", "jobs, newest first")
    show.add_argument("--state", choices=("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"))
    show.add_argument("--kind", choices=KINDS)
    show.add_argument("--limit", type=positive_int, default=100)
    show.add_argument("--all", action="store_true", help="of every key; needs the scope admin")

    for name, text in (("show", "one job"), ("cancel", "cancel a pending or running job")):
        action(name, text).add_argument("job")
    purge = action("purge", "delete an ended job with its log and result")
    purge.add_argument("job")
    logs = action("logs", "what a job printed")
    logs.add_argument("job")
    logs.add_argument(
        "--follow", "-f", action="store_true", help="until it ends; exit 1 if it did not succeed"
    )
    result = action("result", "download the result")
    result.add_argument("job")
    result.add_argument("-o", "--output", required=True, metavar="DIR")

    upload = action("upload", "upload a file; prints file:ID")
    upload.add_argument("file")
    action("files", "uploaded files")
    remove = action("rm", "delete an uploaded file")
    remove.add_argument("file", metavar="ID")
    return p


def jobs(argv: list[str]) -> int:
    p = _parser()
    args = p.parse_args(argv)
    server = args.server or os.environ.get("BIOSEQ_SERVER")
    if not server:
        p.error("--server URL is missing (or the environment variable BIOSEQ_SERVER)")
    from bioseq.client.sync import connect

    with connect(server, api_key(args)) as remote:
        return _ACTIONS[args.action](remote, args)


def _submit(remote: Any, args: argparse.Namespace) -> int:
    from bioseq.client.job_files import read_job

    given = read_job(args.spec, args.kind)
    for item in args.set:
        _set(given["spec"], item)
    job = remote.submit(**given, name=args.name, idempotency_key=args.idempotency_key)
    print(json.dumps(job, indent=1) if args.json else job["id"], flush=True)
    if not args.json:
        before = job["waiting_before"]
        waits = f", {before} of yours before it" if before else ""
        print(f"{job['kind']} job {job['id']} is {job['state']}{waits}.", file=sys.stderr)
    return _follow(remote, job["id"], sys.stderr) if args.follow else 0  # standard output has the job's id


def _set(spec: dict[str, Any], item: str) -> None:
    import tomllib

    from bioseq.errors import SpecError

    key, equals, text = item.partition("=")
    if not equals or not key:
        raise SpecError(f"{item!r} is not of the form KEY=VALUE.", field="--set")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        spec = spec.setdefault(parent, {})
        if not isinstance(spec, dict):
            raise SpecError(f"{parent} is not a table.", field="--set")
    spec[last] = value


def _follow(remote: Any, job_id: str, out: TextIO) -> int:
    for event in remote.follow(job_id):
        if event["event"] == "line":
            print(event["line"], file=out, flush=True)
        elif event["event"] == "metrics" and "loss" in event:
            print(f"step {event.get('step')}: loss {event['loss']:.4f}", file=out, flush=True)
        elif event["event"] == "end":
            return _told(job_id, event)
    return 1


def _told(job_id: str, end: dict[str, Any]) -> int:
    extra = f": {end['reason']}" if end.get("reason") else ""
    if end.get("registered"):
        extra += f"; registered as {end['registered']}"
    print(f"job {job_id} has {'' if end['state'] == 'SUCCEEDED' else 'not '}succeeded "
          f"({end['state']}){extra}", file=sys.stderr)  # fmt: skip
    return 0 if end["state"] == "SUCCEEDED" else 1


def _list(remote: Any, args: argparse.Namespace) -> int:
    found = remote.jobs(state=args.state, kind=args.kind, limit=args.limit, everyone=args.all)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    _table(
        ("job", "kind", "name", "state", "done", "submitted", "attempts"),
        [
            (j["id"], j["kind"], j["name"], j["state"], _done(j), j["created"][:16], str(j["attempt"]))
            for j in found
        ],
    )
    return 0


def _done(job: dict[str, Any]) -> str:
    progress = job["progress"]
    return f"{progress['fraction']:.0%} {progress['label']}" if progress and job["state"] == "RUNNING" else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def _show(remote: Any, args: argparse.Namespace) -> int:
    _print_job(remote.job(args.job), args.json)
    return 0


def _cancel(remote: Any, args: argparse.Namespace) -> int:
    _print_job(remote.cancel(args.job), args.json)
    return 0


def _print_job(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(job, indent=1))
        return
    for field in (
        "id",
        "kind",
        "name",
        "state",
        "created",
        "started",
        "ended",
        "attempt",
        "registered",
        "reason",
    ):
        if job[field] is not None:
            print(f"{field:<11} {job[field]}")
    if job["progress"]:
        p = job["progress"]
        print(
            f"{'progress':<11} {p['label']}: {p['done']:g} of {p['total']:g} {p['unit']} ({p['fraction']:.0%})"
        )
    if job["cancelling"]:
        print(f"{'cancelling':<11} yes")


def _purge(remote: Any, args: argparse.Namespace) -> int:
    remote.purge(args.job)
    return 0


def _logs(remote: Any, args: argparse.Namespace) -> int:
    if args.follow:
        return _follow(remote, args.job, sys.stdout)
    print(remote.logs(args.job), end="")
    return 0


def _result(remote: Any, args: argparse.Namespace) -> int:
    for path in remote.result(args.job, args.output):
        print(path)
    return 0


def _upload(remote: Any, args: argparse.Namespace) -> int:
    made = remote.upload(args.file)
    print(json.dumps(made, indent=1) if args.json else f"file:{made['id']}")
    return 0


def _files(remote: Any, args: argparse.Namespace) -> int:
    found = remote.files()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    _table(
        ("file", "name", "bytes", "sha256", "expires"),
        [(f["id"], f["name"], str(f["bytes"]), f["sha256"][:12], f["expires"][:10]) for f in found],
    )
    return 0


def _rm(remote: Any, args: argparse.Namespace) -> int:
    remote.delete_file(args.file.removeprefix("file:"))
    return 0


_ACTIONS = {
    "submit": _submit,
    "list": _list,
    "show": _show,
    "cancel": _cancel,
    "purge": _purge,
    "logs": _logs,
    "result": _result,
    "upload": _upload,
    "files": _files,
    "rm": _rm,
}
