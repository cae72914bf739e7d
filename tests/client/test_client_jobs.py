"""Jobs and files through both clients: uploads, logs and downloads that break off and go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from client_service import URL, problem

import bioseq
from bioseq.client.job_files import read_job
from bioseq.errors import InputError, OutputError, ServiceError, SpecError

JOB = {"id": "j1", "kind": "finetune", "state": "SUCCEEDED", "waiting_before": None}


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in pieces, and may break."""

    def __init__(self, *pieces: bytes | Exception):
        self.pieces, self.closed = pieces, False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> Any:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Server(httpx.MockTransport):
    """Keeps the requests. `POST /v1/files` is answered here, first with `troubles`; all else by `answers` in turn."""

    def __init__(
        self, *answers: httpx.Response | Exception, troubles: Sequence[httpx.Response | Exception] = ()
    ):
        self.requests: list[httpx.Request] = []
        self.files: dict[str, bytes] = {}
        self.answers, self.troubles = list(answers), list(troubles)
        super().__init__(self.answer)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        upload = request.method == "POST" and request.url.path == "/v1/files"
        if upload and not self.troubles:
            assert hashlib.sha256(request.content).hexdigest() == request.url.params["sha256"]
            assert int(request.headers["Content-Length"]) == len(request.content)
            made = f"f{len(self.files)}"
            self.files[made] = request.content
            return httpx.Response(201, json={"id": made, "name": request.url.params["name"]})
        answer = (self.troubles if upload else self.answers).pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok(content: Any = None) -> httpx.Response:
    return httpx.Response(200, json=content if content is not None else JOB)


# --------------------------------------------------------------------------------------------- files, submission


def test_a_file_is_sent_whole_again_after_a_break(ask, tmp_path, pauses):
    path = tmp_path / "table of labels.csv"
    path.write_bytes(b"sequence,target\n" + b"MKT,1\n" * 400_000)  # over two blocks
    server = Server(troubles=[httpx.WriteError("x"), problem(503, "engine.unavailable", "later.")])
    made = ask(server, "upload", path)
    assert made == {"id": "f0", "name": "table_of_labels.csv"}
    assert server.files["f0"] == path.read_bytes() and len(pauses) == 2
    with pytest.raises(InputError, match="cannot read"):
        ask(server, "upload", tmp_path / "none.csv")


def test_what_a_spec_names_is_uploaded(ask, tmp_path):
    for name in ("a.fasta", "b.csv", "c.txt"):
        (tmp_path / name).write_text(name)
    a, b, c = (str(tmp_path / name) for name in ("a.fasta", "b.csv", "c.txt"))

    def sent(kind: str, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
        server = Server(ok())
        assert ask(server, "submit", kind, spec, **more) == JOB
        body = json.loads(server.requests[-1].content)
        contents = {f"file:{k}": v.decode() for k, v in server.files.items()}
        return json.loads(
            json.dumps(body), object_hook=lambda d: {k: _swap(v, contents) for k, v in d.items()}
        )

    body = sent(
        "finetune", {"labels": b, "wild_type": "M" * 300, "output": "here", "register": a}, name="mine"
    )
    # The wild type is a sequence and longer than a file name may be; `register` is not a file.
    assert body == {
        "kind": "finetune", "name": "mine", "spec": {"labels": "b.csv", "wild_type": "M" * 300, "register": a},
    }  # fmt: skip
    spec = {"inputs": (a, "file:f9", "https://x/y.fasta")}
    assert sent("screen", spec)["spec"]["inputs"] == ["a.fasta", "file:f9", "https://x/y.fasta"]
    assert spec["inputs"][0] == a
    prepare = {"clusters": c, "valid": {"remote": b}, "held_out": 0.1}
    body = sent("pretrain", {"corpus": a}, recipe="protein_tiny", prepare=prepare)
    assert body["recipe"] == "protein_tiny" and prepare["clusters"] == c
    assert body["prepare"] == {"clusters": "c.txt", "valid": {"remote": "b.csv"}, "held_out": 0.1}


def _swap(value: Any, contents: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_swap(v, contents) for v in value]
    return contents.get(value, value) if isinstance(value, str) else value


def test_a_submission_is_one_job_however_often_it_is_sent(ask):
    server = Server(httpx.ReadError("x"), ok())
    ask(server, "submit", "finetune", {"targets": ["t"]})
    first, second = (r.headers["Idempotency-Key"] for r in server.requests)
    assert first == second
    full = problem(429, "quota.jobs", "too many jobs.")
    with pytest.raises(ServiceError) as caught:
        ask(Server(full, ok()), "submit", "finetune", {"targets": ["t"]})
    assert caught.value.code == "quota.jobs"


def test_a_job_file_names_what_is_beside_it(tmp_path):
    (tmp_path / "t.csv").write_text("x")
    (tmp_path / "job.toml").write_text(f'kind = "finetune"\nlabels = "t.csv"\nwild_type = "{"M" * 300}"\n')
    spec = read_job(tmp_path / "job.toml")["spec"]
    assert spec == {"labels": str(tmp_path / "t.csv"), "wild_type": "M" * 300}
    (tmp_path / "p.json").write_text(
        '{"corpus": "t.csv", "recipe": "r", "prepare": {"valid": {"a": "t.csv"}}}'
    )
    assert read_job(tmp_path / "p.json", "pretrain") == {
        "kind": "pretrain", "spec": {"corpus": str(tmp_path / "t.csv")}, "recipe": "r",
        "prepare": {"valid": {"a": str(tmp_path / "t.csv")}},
    }  # fmt: skip
    for text, kind in (("labels = 1", None), ('kind = "screen"', "finetune"), ("x = ", "screen")):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(SpecError):
            read_job(tmp_path / "bad.toml", kind)


# ----------------------------------------------------------------------------------------------------------- logs


def events(*pieces: bytes | Exception) -> httpx.Response:
    return httpx.Response(200, stream=Pieces(*pieces))


END = b'event: end\ndata: {"state": "SUCCEEDED", "reason": null, "registered": null}\n\n'


def test_a_log_goes_on_where_the_connection_broke(ask, pauses):
    server = Server(
        events(b"retry: 2000\n\nid: 4\ndata: one\n\nid: 9\nda", b"ta: t\xe2\x80\xa8wo\x0c!\r\n\n", httpx.ReadError("x")),
        problem(503, "service.draining", "later."),
        events(b": still here\n\n", b'event: progress\ndata: {"done": 1}\n\n'),
        events(b"id: 12\ndata: three\n\nid: 14\nda"),  # in the middle of an event
        events(b"id: 14\ndata: \n\n" + END, b"data: after the end\n\n"),
    )  # fmt: skip
    seen = ask(server, "follow", "j/1")
    assert seen == [
        {"event": "line", "line": "one"},
        {"event": "line", "line": "t\u2028wo\x0c!"},
        {"event": "progress", "done": 1},
        {"event": "line", "line": "three"},
        {"event": "line", "line": ""},
        {"event": "end", "state": "SUCCEEDED", "reason": None, "registered": None},
    ]
    assert [r.headers.get("Last-Event-ID") for r in server.requests] == [None, "9", "9", "9", "12"]
    assert server.requests[0].url.raw_path == b"/v1/jobs/j%2F1/logs?follow=true" and len(pauses) == 4


def test_a_log_that_moves_on_is_followed_for_ever_and_one_that_does_not_is_given_up(ask):
    broken = [events(b"id: %d\ndata: x\n\n" % i, httpx.ReadError("x")) for i in range(9)]
    assert len(ask(Server(*broken, events(END)), "follow", "j1", client={"retries": 2})) == 10
    with pytest.raises(ServiceError, match="broke off"):
        ask(Server(*[events(b"retry: 2000\n\n") for _ in range(9)]), "follow", "j1", client={"retries": 2})
    with pytest.raises(ServiceError, match="no such job"):
        ask(Server(problem(404, "job.not_found", "no such job.")), "follow", "j1")


def test_a_log_that_nobody_reads_on_is_let_go():
    body = Pieces(b"data: one\n\n", b"data: two\n\n", END)
    with bioseq.connect(URL, transport=Server(httpx.Response(200, stream=body))) as remote:
        log = remote.follow("j1")
        assert next(log)["line"] == "one"
        assert not body.closed
        log.close()
        assert body.closed


def test_the_small_calls(ask, pauses):
    running = {**JOB, "state": "RUNNING"}
    server = Server(ok(running), ok(running), ok())
    assert ask(server, "wait", "j1", poll=7.0)["state"] == "SUCCEEDED" and pauses == [7.0, 7.0]
    with pytest.raises(ServiceError, match="RUNNING after"):
        ask(Server(*[ok(running)] * 3), "wait", "j1", timeout=0.0)
    log = httpx.Response(
        200, content="höre\n".encode(), headers={"Content-Type": "text/plain; charset=utf-8"}
    )
    assert ask(Server(log), "logs", "j1") == "höre\n"
    server = Server(ok({"data": [JOB]}))
    assert ask(server, "jobs", state="RUNNING", everyone=True) == [JOB]
    assert dict(server.requests[0].url.params) == {"state": "RUNNING", "limit": "100", "all": "true"}
    for method, want in (("cancel", "/v1/jobs/j1"), ("purge", "/v1/jobs/j1?purge=true")):
        server = Server(ok())
        ask(server, method, "j1")
        assert (server.requests[0].method, server.requests[0].url.raw_path.decode()) == ("DELETE", want)
    server = Server(httpx.Response(204))
    assert ask(server, "delete_file", "f/1") is None
    assert server.requests[0].url.raw_path == b"/v1/files/f%2F1"


# -------------------------------------------------------------------------------------------------------- results

CONTENT = bytes(range(256)) * 40
LIST = {
    "data": [{"name": "tables/hits.csv", "bytes": len(CONTENT), "href": "/v1/jobs/j1/result/tables/hits.csv"}]
}


class Results(Server):
    """Serves CONTENT by ranges under an ETag, and breaks off at the places `breaks` of the file."""

    def __init__(self, *breaks: int, tags: tuple[str, ...] = ('"a"',), ranges: bool = True):
        super().__init__()
        self.breaks, self.tags, self.ranges = list(breaks), list(tags), ranges

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/result"):
            return ok(LIST)
        self.requests.append(request)
        tag = self.tags.pop(0) if len(self.tags) > 1 else self.tags[0]
        asked = (
            request.headers.get("Range") if request.headers.get("If-Range") == tag and self.ranges else None
        )
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        last = self.breaks.pop(0) if self.breaks else len(CONTENT)
        end: list[Any] = [httpx.RemoteProtocolError("x")] if last < len(CONTENT) and last % 2 else []
        stream = Pieces(CONTENT[first : (first + last) // 2], CONTENT[(first + last) // 2 : last], *end)
        return httpx.Response(206 if asked else 200, headers={"ETag": tag}, stream=stream)


def test_a_download_goes_on_where_it_broke_off(ask, tmp_path):
    server = Results(101, 4000, 7001)  # odd: a broken connection; even: an end that comes early
    (path,) = ask(server, "result", "j1", tmp_path)
    assert path == tmp_path / "tables" / "hits.csv" and path.read_bytes() == CONTENT
    asked = [r.headers.get("Range") for r in server.requests]
    assert asked == [None, "bytes=101-", "bytes=4000-", "bytes=7001-"]
    assert [p.name for p in path.parent.iterdir()] == ["hits.csv"]
    again = Results()
    assert ask(again, "result", "j1", tmp_path) == [path] and not again.requests


def test_a_file_that_changed_meanwhile_begins_anew(ask, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / ".hits.csv.part").write_bytes(b"torn")
    (tmp_path / "tables" / ".hits.csv.etag").write_text('"old"')
    server = Results(301, tags=('"b"', '"c"'))
    (path,) = ask(server, "result", "j1", tmp_path)
    assert path.read_bytes() == CONTENT and server.requests[0].headers["Range"] == "bytes=4-"


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 1])
def test_a_part_that_is_whole_or_too_long(ask, tmp_path, size):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / ".hits.csv.part").write_bytes((CONTENT + b"x")[:size])
    (tmp_path / "tables" / ".hits.csv.etag").write_text('"a"')
    server = Results()
    (path,) = ask(server, "result", "j1", tmp_path)
    assert path.read_bytes() == CONTENT and len(server.requests) == (size > len(CONTENT))


def test_progress_renews_the_tries_and_beginning_anew_does_not(ask, tmp_path):
    ends = [101, 1001, 2001, 3001, 4001, 5001]
    (path,) = ask(Results(*ends), "result", "j1", tmp_path / "a", client={"retries": 2})
    assert path.read_bytes() == CONTENT
    with pytest.raises(ServiceError, match="broke off"):
        ask(Results(*ends, ranges=False), "result", "j1", tmp_path / "b", client={"retries": 2})


def test_a_result_stays_in_its_folder(ask, tmp_path):
    for name in ("../x", "/etc/x", "a/../../x", ""):
        bad = {"data": [{"name": name, "bytes": 1, "href": "/v1/x"}]}
        with pytest.raises(ServiceError, match="outside"):
            ask(Server(ok(bad)), "result", "j1", tmp_path)
    (tmp_path / "tables").write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="cannot write"):
        ask(Results(), "result", "j1", tmp_path)
