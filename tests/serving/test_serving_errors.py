"""The error table, line by line; errors on the OpenAI route in OpenAI's shape; no sequence anywhere."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from serving_helpers import CANARY, SEQS

from serving.database.base import Database
from serving.database.keys import Keys

GOOD = {"sequences": SEQS[:1]}
JSON = {"Content-Type": "application/json"}
MINUTE = 40_000_000  # in 2046: the scheduler folds usage of the past into one row while a test runs


def check(response: httpx.Response, status: int, code: str) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    if response.request.url.path == "/v1/embeddings":
        assert response.headers["content-type"] == "application/json"
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == code
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert body["status"] == status and body["code"] == code
        assert body["type"] and body["title"] and body["detail"]
    assert response.headers["x-request-id"]
    return body


CASES = [
    ("not JSON", b"{nope", 400, "request.not_json"),
    ("empty body", b"", 400, "request.not_json"),
    ("deep nesting", b"[" * 100_000, 400, "request.not_json"),
    ("half a surrogate", b'{"sequences": ["\\ud800"]}', 422, "request.invalid"),
    ("not an object", b"[1]", 422, "request.invalid"),
    ("wrong type", b'{"sequences": "MKT"}', 422, "request.invalid"),
    ("wrong item type", b'{"sequences": [1]}', 422, "request.invalid"),
    ("null", b'{"sequences": null}', 422, "request.invalid"),
    ("empty list", b'{"sequences": []}', 422, "request.invalid"),
    ("NaN", b'{"sequences": [NaN]}', 422, "request.invalid"),
    ("NaN layer", b'{"sequences": ["MKT"], "layers": [NaN]}', 422, "request.invalid"),
    ("empty sequence", b'{"sequences": ["MKT", ""]}', 422, "request.invalid"),
    ("only a stop", b'{"sequences": ["*"]}', 422, "request.invalid"),
    ("unknown field", b'{"sequences": ["MKT"], "poolng": "max"}', 422, "request.invalid"),
    ("unknown pooling", b'{"sequences": ["MKT"], "pooling": "sum"}', 422, "request.invalid"),
    ("no such layer", b'{"sequences": ["MKT"], "layers": [3]}', 422, "request.invalid"),
    ("unknown model", b'{"sequences": ["MKT"], "model": "nope"}', 404, "model.not_found"),
    ("unknown version", b'{"sequences": ["MKT"], "model": "tiny@9"}', 404, "model.not_found"),
    ("a path", b'{"sequences": ["MKT"], "model": "../../etc"}', 404, "model.not_found"),
    ("a head as model", b'{"sequences": ["MKT"], "model": "fold"}', 404, "model.not_found"),
]


@pytest.mark.parametrize(("body", "status", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bodies(shared, body, status, code):
    check(shared("POST", "/v1/embed", content=body, headers=JSON), status, code)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, bundles):
    """One service for the cases that need no setting; requests from a loop in a thread."""
    import threading

    from bioseq.bundles.registry import Registry
    from serving.http.app import in_process
    from serving.settings import Settings

    folder = tmp_path_factory.mktemp("shared")
    (folder / "empty").mkdir()
    registry = Registry(folder / "registry", shipped=folder / "empty")
    for bundle in bundles.values():
        registry.register(bundle)
    registry.alias("default", "tiny@1")
    settings = Settings(
        database=f"sqlite:///{folder / 's.sqlite'}",
        home=str(folder),
        threads=1,
        log_file=str(folder / "log"),
        homologs="none",
    )
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    box = {}

    async def live():
        async with in_process(settings, registry=registry) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://bioseq", timeout=60) as http:
                box["http"] = http
                ready.set()
                await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()))
    thread.start()
    assert ready.wait(120)

    def request(method: str, path: str, **more):
        return asyncio.run_coroutine_threadsafe(box["http"].request(method, path, **more), loop).result(60)

    yield request
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()


def test_content_type(shared):
    r = shared("POST", "/v1/embed", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    check(r, 400, "request.not_json")


def test_illegal_residue_tells_index_and_position_and_never_the_sequence(shared):
    body = check(
        shared("POST", "/v1/embed", json={"sequences": ["MKT", CANARY + "1"]}),
        422,
        "sequence.illegal_residue",
    )
    assert (body["index"], body["position"]) == (1, len(CANARY) + 1)
    assert CANARY not in json.dumps(body)
    body = check(shared("POST", "/v1/embed", json={"sequences": ["MK-T"]}), 422, "sequence.illegal_residue")
    assert (body["index"], body["position"]) == (0, 3)


def test_too_long_tells_the_limit(shared):
    body = check(
        shared("POST", "/v1/embed", json={"sequences": ["MKT", "M" * 1023]}), 422, "sequence.too_long"
    )
    assert body["index"] == 1 and "1023" in body["detail"] and "1022" in body["detail"]


def test_too_many_items(shared):
    body = check(
        shared("POST", "/v1/embed", json={"sequences": ["M"] * 10_001}), 413, "request.too_many_items"
    )
    assert (body["given"], body["limit"]) == (10_001, 10_000)
    check(
        shared("POST", "/v1/score", json={"sequence": "MKT", "mutants": ["M1A"] * 10_001}),
        413, "request.too_many_items",
    )  # fmt: skip


def test_not_acceptable(shared):
    for path, accept in (
        ("/v1/embed", "text/html"),
        ("/v1/embed", "application/json;q=0"),
        ("/v1/predict", "application/x-npz"),
    ):
        body = {**GOOD, **({"heads": ["fold"]} if "predict" in path else {})}
        check(shared("POST", path, json=body, headers={"Accept": accept}), 406, "response.not_acceptable")
    for accept in ("text/html, */*;q=0.1", "application/*", "application/x-npz;q=0.2, application/json"):
        r = shared("POST", "/v1/embed", json=GOOD, headers={"Accept": accept})
        assert r.headers["content-type"] == "application/json"


def test_a_page_of_another_name_is_turned_away(shared):
    """DNS rebinding: without keys only this machine's own names answer."""
    for host in ("evil.example", "evil.example:8000", "10.1.2.3"):
        check(shared("POST", "/v1/embed", json=GOOD, headers={"Host": host}), 403, "auth.forbidden")
    for host in ("127.0.0.1:8000", "localhost:8000", "bioseq", "[::1]:8000", "a.localhost"):
        assert shared("POST", "/v1/embed", json=GOOD, headers={"Host": host}).status_code == 200


def test_heads(shared):
    for head in ("nope", "fold@7", "tiny", "../fold"):
        check(shared("POST", "/v1/predict", json={**GOOD, "heads": [head]}), 404, "head.not_found")
    check(shared("POST", "/v1/predict", json={**GOOD, "heads": []}), 422, "request.invalid")
    check(shared("POST", "/v1/predict", json={**GOOD, "heads": ["fold", "fold"]}), 422, "request.invalid")


def test_variants(shared):
    for mutants in (["A1G"], ["M1"], ["M99A"], ["M1A:M1G"]):
        r = shared("POST", "/v1/score", json={"sequence": "MKT", "mutants": mutants})
        check(r, 422, "mutation.invalid")
    check(shared("POST", "/v1/scan", json={"sequence": "MK1"}), 422, "sequence.illegal_residue")
    r = shared("POST", "/v1/scan", json={"sequence": "M" * 1000, "strategy": "pseudo-log-likelihood"})
    check(r, 413, "request.too_large")


def test_routes_that_are_not_there(shared):
    check(shared("GET", "/v1/nothing"), 404, "not_found")
    check(shared("GET", "/v1/embed"), 405, "request.method_not_allowed")
    check(shared("GET", "/v1/models/nope"), 404, "model.not_found")
    check(shared("GET", "/v1/models/nope/card"), 404, "model.not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "request.not_json"),
        (b'{"input": [], "model": "default"}', 422, "request.invalid"),
        (b'{"input": [1, 2], "model": "default"}', 422, "request.invalid"),
        (b'{"input": "MK1", "model": "default"}', 422, "sequence.illegal_residue"),
        (b'{"input": "MKT", "model": "nope"}', 404, "model.not_found"),
        (b'{"input": "MKT", "model": "default", "dimensions": 7}', 422, "request.invalid"),
        (b'{"input": "MKT", "model": "default", "encoding_format": "hex"}', 422, "request.invalid"),
        (b'{"input": "%s", "model": "default"}' % (b"M" * 1023), 422, "sequence.too_long"),
        (json.dumps({"input": ["M"] * 10_001, "model": "default"}).encode(), 413, "request.too_many_items"),
    ],
)
def test_openai_route_has_openais_shape(shared, body, status, code):
    check(shared("POST", "/v1/embeddings", content=body, headers=JSON), status, code)


def test_body_over_the_limit(serve):
    async def go():
        async with serve(max_body_bytes=1000) as http:
            r = await http.post("/v1/embed", content=b"x" * 1001, headers=JSON)
            assert check(r, 413, "request.too_large")["limit"] == 1000

            async def unannounced():
                for _ in range(20):
                    yield b" " * 100

            r = await http.post("/v1/embed", content=unannounced(), headers=JSON)
            check(r, 413, "request.too_large")
            r = await http.post("/v1/embeddings", content=b"x" * 1001, headers=JSON)
            check(r, 413, "request.too_large")

    asyncio.run(go())


def test_slow_body(serve):
    async def go():
        async with serve(body_s=0.3) as http:

            async def slow():
                yield b'{"sequences": '
                await asyncio.sleep(3)
                yield b'["MKT"]}'

            for path in ("/v1/embed", "/v1/embeddings"):
                check(await http.post(path, content=slow(), headers=JSON), 408, "request.timeout")

    asyncio.run(go())


class Slow:
    """A predictor whose batches can be held."""

    def __init__(self, registry):
        import threading

        import bioseq

        self.registry, self.gate = registry, threading.Event()
        self.gate.set()
        self.loaded = bioseq.load

    def __call__(self, exact):
        predictor = self.loaded(exact, threads=1, registry=self.registry)
        run = predictor.run

        def held(works, **more):
            assert self.gate.wait(20)
            return run(works, **more)

        predictor.run = held
        return predictor


def test_request_past_its_time(serve, registry):
    slow = Slow(registry)

    async def go():
        async with serve(load=slow, request_s=0.5) as http:
            slow.gate.clear()
            r = await http.post("/v1/embed", json=GOOD)
            slow.gate.set()
            check(r, 408, "request.timeout")
            assert (await http.post("/v1/embed", json=GOOD)).status_code == 200

    asyncio.run(go())


def test_full_queue(serve, registry):
    slow = Slow(registry)

    async def go():
        async with serve(load=slow, max_queued_tokens=300) as http:
            engine, body = http.app.service.link.host.engine, {"sequences": ["M" * 98]}
            slow.gate.clear()
            tasks = []
            for requests, tokens in ((1, 0), (2, 100), (3, 200), (4, 300)):
                tasks.append(asyncio.create_task(http.post("/v1/embed", json=body)))
                async with asyncio.timeout(30):
                    while (len(engine._tickets), engine.status()["queued_tokens"]) != (requests, tokens):
                        await asyncio.sleep(0.01)
            answers = [
                await http.post("/v1/embed", json=body),
                await http.post("/v1/embeddings", json={"input": "M" * 98, "model": "default"}),
            ]
            slow.gate.set()
            for r in answers:
                check(r, 429, "overloaded")
                assert int(r.headers["retry-after"]) >= 1
            assert [(await t).status_code for t in tasks] == [200] * 4

    asyncio.run(go())


def test_engine_dead(serve):
    async def go():
        async with serve() as http:
            http.app.service.link.host.engine.stop()
            for path, body in (("/v1/embed", GOOD), ("/v1/embeddings", {"input": "MKT", "model": "default"})):
                r = await http.post(path, json=body)
                check(r, 503, "engine.unavailable")
                assert int(r.headers["retry-after"]) >= 1
            check(await http.get("/health/ready"), 503, "engine.unavailable")
            assert (await http.get("/health/live")).status_code == 200

    asyncio.run(go())


def test_unforeseen_errors_are_500_without_their_text(serve, registry, tmp_path):
    def load(exact):
        import bioseq

        predictor = bioseq.load(exact, threads=1, registry=registry)
        run = predictor.run

        def broken(works, **more):
            if any(w.sequence == CANARY for w in works):
                raise KeyError(CANARY)
            return run(works, **more)

        predictor.run = broken
        return predictor

    async def go():
        async with serve(load=load) as http:
            r = await http.post("/v1/embed", json={"sequences": [CANARY]})
            check(r, 500, "internal")
            assert CANARY not in r.text
            r, other = await asyncio.gather(
                http.post("/v1/embed", json={"sequences": [CANARY]}), http.post("/v1/embed", json=GOOD)
            )
            assert (r.status_code, other.status_code) == (500, 200)

    asyncio.run(go())
    assert CANARY not in (tmp_path / "access.jsonl").read_text()


def test_keys_and_scopes(serve, settings):
    options = settings()
    database = Database(options.database)
    database.upgrade()
    keys = Keys(database)

    async def go():
        async with serve() as http:

            async def ask(token: str | None, path="/v1/embed", body=GOOD):
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                return await http.post(path, json=body, headers=headers)

            # No key was ever made: any header is ignored.
            assert (await ask(None)).status_code == 200
            assert (await ask("sk-whatever")).status_code == 200
            reader, text_reader = keys.create("reader", ("read",))
            _, text = keys.create("alice", ("predict",))
            _, text_admin = keys.create("root", ("admin",))
            http.app.service.authorizer._asked = (0.0, True)
            r = await ask(None)
            check(r, 401, "auth.unauthenticated")
            assert r.headers["www-authenticate"] == "Bearer"
            for wrong in ("sk-whatever", text[:-1] + "?", text.replace("bsk_", ""), "bsk__", "bsk_a_b"):
                check(await ask(wrong), 401, "auth.unauthenticated")
                check(
                    await ask(wrong, "/v1/embeddings", {"input": "MKT", "model": "default"}),
                    401, "auth.unauthenticated",
                )  # fmt: skip
            r = check(await ask(text_reader), 403, "auth.forbidden")
            assert r["scope"] == "predict"
            check(
                await ask(text_reader, "/v1/embeddings", {"input": "MKT", "model": "default"}),
                403, "auth.forbidden",
            )  # fmt: skip
            assert (await ask(text)).status_code == 200
            assert (await ask(text_admin)).status_code == 200
            check(
                await http.delete("/v1/models/tiny@1", headers={"Authorization": f"Bearer {text}"}),
                403,
                "auth.forbidden",
            )
            check(await http.get("/v1/models"), 401, "auth.unauthenticated")
            assert (await http.get("/health/ready")).status_code == 200
            keys.revoke(reader.id)
            http.app.service.authorizer._known.clear()
            check(await ask(text_reader), 401, "auth.unauthenticated")

    asyncio.run(go())
    assert text_is_nowhere(database)


def text_is_nowhere(database: Database) -> bool:
    """Only hashes at rest."""
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql("select * from api_keys").fetchall()
    return all("bsk_" not in str(row) for row in rows)


def test_quotas(serve, settings):
    database = Database(settings().database)
    database.upgrade()
    keys = Keys(database)
    few, text_few = keys.create("few", ("predict",), requests_per_minute=2)
    _, text_small = keys.create("small", ("predict",), tokens_per_minute=100)
    free, text_free = keys.create("free", ("predict",))

    async def go():
        async with serve() as http:
            http.app.service.authorizer._clock = lambda: MINUTE * 60 + 30.0

            async def ask(text: str, length: int = 8, path="/v1/embed"):
                body = (
                    {"sequences": ["M" * length]}
                    if path == "/v1/embed"
                    else {"input": "M" * length, "model": "default"}
                )
                return await http.post(path, json=body, headers={"Authorization": f"Bearer {text}"})

            assert [(await ask(text_few)).status_code for _ in range(2)] == [200, 200]
            for path in ("/v1/embed", "/v1/embeddings"):
                r = await ask(text_few, path=path)
                check(r, 429, "quota.exceeded")
                assert r.headers["retry-after"] == "30"
            assert (await ask(text_small, 58)).status_code == 200
            check(await ask(text_small, 58), 429, "quota.exceeded")
            check(await ask(text_small, 200), 413, "request.too_large")
            assert (await ask(text_free)).status_code == 200
            http.app.service.authorizer._clock = lambda: (MINUTE + 1) * 60 + 0.0
            assert (await ask(text_few)).status_code == 200

    asyncio.run(go())
    assert keys.used(few.id) == (3, 30)
    assert keys.used(free.id) == (1, 10)


def test_draining_turns_new_requests_away_and_finishes_old_ones(serve, registry):
    slow = Slow(registry)

    async def go():
        async with serve(load=slow) as http:
            slow.gate.clear()
            first = asyncio.create_task(http.post("/v1/embed", json=GOOD))
            await asyncio.sleep(0.3)
            http.app.draining = True
            answers = [await http.post("/v1/embed", json=GOOD), await http.get("/health/ready")]
            live = await http.get("/health/live")
            slow.gate.set()
            for r in answers:
                check(r, 503, "service.draining")
            assert live.status_code == 200
            assert (await first).status_code == 200

    asyncio.run(go())


def test_client_that_goes_away_frees_the_engine(serve, registry):
    slow = Slow(registry)

    async def go():
        async with serve(load=slow) as http:
            slow.gate.clear()
            engine = http.app.service.link.host.engine
            messages = [
                {"type": "http.request", "body": json.dumps({"sequences": ["M" * 500] * 20}).encode()}
            ]
            gone = asyncio.Event()

            async def receive():
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                raise AssertionError("nobody is there")

            scope = {
                "type": "http", "method": "POST", "path": "/v1/embed", "raw_path": b"/v1/embed",
                "query_string": b"", "headers": [(b"content-type", b"application/json")],
                "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("127.0.0.1", 1),
            }  # fmt: skip
            task = asyncio.create_task(http.app(scope, receive, send))
            async with asyncio.timeout(30):
                while not engine.status()["queued_requests"]:
                    await asyncio.sleep(0.02)
            gone.set()
            await task
            slow.gate.set()
            assert engine.status()["queued_requests"] == 0

    asyncio.run(go())


def test_no_sequence_in_logs_errors_or_metrics(serve, tmp_path):
    """A canary goes through every route, rightly and wrongly; afterwards it is nowhere."""

    async def go():
        texts = []
        async with serve() as http:
            for text in (CANARY, CANARY + "1", CANARY + "-", CANARY * 100):
                for path, body in (
                    ("/v1/embed", {"sequences": [text]}),
                    ("/v1/embeddings", {"input": [text], "model": "default"}),
                    ("/v1/embeddings", {"input": text, "model": text}),
                    ("/v1/logits", {"sequences": [text], "model": text}),
                    ("/v1/predict", {"sequences": [text], "heads": ["fold"]}),
                    ("/v1/predict", {"sequences": [text], "heads": [text]}),
                    ("/v1/predict", {"sequences": [[text]], "heads": {text: text}}),
                    ("/v1/score", {"sequence": text, "mutants": ["A1G"]}),
                    ("/v1/score", {"sequence": text, "mutants": [text]}),
                    ("/v1/scan", {"sequence": text, "strategy": "wt-marginals"}),
                    ("/v1/scan", {"sequence": text, text: 1}),
                    ("/v1/estimate", {"sequences": [text], "long_sequences": "error"}),
                ):
                    r = await http.post(path, json=body)
                    if r.status_code != 200:
                        texts.append((path, r.text))
                await http.post("/v1/embed", content=text.encode(), headers=JSON)
                await http.get(f"/v1/models/{text}")
                await http.get(f"/{text}")
            texts.append(("metrics", (await http.get("/metrics")).text))
        return texts

    texts = asyncio.run(go())
    assert len(texts) > 20
    leaks = [(path, text) for path, text in texts if CANARY in text]
    assert not leaks
    log = (tmp_path / "access.jsonl").read_text()
    assert CANARY not in log and len(log.splitlines()) > 40
    entry = json.loads(log.splitlines()[0])
    assert {"time", "request_id", "method", "route", "status", "ms", "bytes_in", "bytes_out"} <= set(entry)
