"""Who is let in, before what is read, and what a request costs."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from serving.database.base import Database, now
from serving.database.keys import ApiKey, Keys
from serving.http.checks import variant_tokens

GOOD = {"sequences": ["MKTAYIAK"]}
MINUTE = 40_000_000  # in 2046: the scheduler folds usage of the past into one row while a test runs


def code(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["code"]


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.fixture
def keys(settings) -> Keys:
    database = Database(settings().database)
    database.upgrade()
    return Keys(database)


async def exchange(app: Any, headers: list[tuple[bytes, bytes]], **scope: Any) -> tuple[int, int]:
    """The status of a POST /v1/embed, and how often its body was asked for."""
    asked, status = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked == 5:
            await asyncio.Event().wait()
        asked += 1
        return {"type": "http.request", "body": b"{" * 1000, "more_body": asked < 5}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    given = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1:8000"), *headers]
    await app(
        {
            "type": "http", "method": "POST", "path": "/v1/embed", "raw_path": b"/v1/embed", "query_string": b"",
            "headers": given, "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000), "scheme": "http",
            "http_version": "1.1", "asgi": {"version": "3.0"}, **scope,
        },
        receive, send,
    )  # fmt: skip
    return status, asked


def test_no_byte_of_a_body_is_read_before_the_key_is_known(serve, keys):
    _, text = keys.create("alice", ("predict",))

    async def go():
        async with serve() as http:
            assert await exchange(http.app, []) == (401, 0)
            assert await exchange(http.app, [(b"authorization", b"Bearer bsk_x_y")]) == (401, 0)
            assert await exchange(http.app, [(b"authorization", b"Basic " + text.encode())]) == (401, 0)
            assert await exchange(http.app, [(b"authorization", b"Bearer " + text.encode())]) == (400, 5)

    asyncio.run(go())


def test_without_keys_only_this_machine_is_let_in(serve):
    """Whatever address was declared: what counts is the socket."""

    async def go():
        async with serve() as http:
            assert await exchange(http.app, []) == (400, 5)
            assert await exchange(http.app, [], client=("::1", 5)) == (400, 5)
            for client in (("192.168.1.9", 5), ("10.0.0.1", 5), ("", 0), None):
                assert await exchange(http.app, [], client=client) == (401, 0), client
            for host in (b"192.168.1.9:8000", b"evil.example", b"8.8.8.8"):
                assert (await exchange(http.app, [(b"host", host)]))[0] in (400, 403)
        async with serve(insecure=True) as http:
            assert await exchange(http.app, [], client=("192.168.1.9", 5)) == (400, 5)

    asyncio.run(go())


@pytest.mark.parametrize(
    "host, allowed",
    [("127.0.0.1:8000", True), ("localhost", True), ("[::1]:8000", True), ("192.168.1.9:8000", False),
     ("evil.example", False), ("127.0.0.1.evil.example", False)],
)  # fmt: skip
def test_without_keys_only_this_machines_own_name_is_answered(serve, host, allowed):
    async def go():
        async with serve() as http:
            response = await http.post("/v1/embed", json=GOOD, headers={"Host": host})
            assert response.status_code == (200 if allowed else 403)

    asyncio.run(go())


def test_a_key_past_its_expiry_is_refused(serve, keys):
    info, text = keys.create("alice", ("predict",), days=1)
    assert keys.check(text) is not None

    async def go():
        async with serve() as http:
            assert (await http.post("/v1/embed", json=GOOD, headers=bearer(text))).status_code == 200
            with keys.database.session() as session:
                past = now() - datetime.timedelta(seconds=1)
                session.execute(update(ApiKey).where(ApiKey.id == info.id).values(expires=past))
            http.app.service.authorizer._known.clear()
            r = await http.post("/v1/embed", json=GOOD, headers=bearer(text))
            assert code(r, 401) == "auth.unauthenticated"

    asyncio.run(go())
    assert keys.check(text) is None


def test_tokens_of_a_request_that_is_refused_are_given_back(serve, keys):
    """Eight tries of one request pay once."""
    limited, text = keys.create("alice", ("predict",), tokens_per_minute=100_000)
    free, text_free = keys.create("bob", ("predict",))

    async def go():
        async with serve(max_queue_s=1e-9) as http:
            engine = http.app.service.link.host.engine
            engine._wait_s = lambda now, ticket=None: 60.0
            for token in (text, text_free):
                for _ in range(8):
                    r = await http.post("/v1/embed", json=GOOD, headers=bearer(token))
                    assert code(r, 429) == "overloaded"
            del engine._wait_s
            engine.max_queue_s = None
            for token in (text, text_free):
                assert (await http.post("/v1/embed", json=GOOD, headers=bearer(token))).status_code == 200

    asyncio.run(go())
    assert [keys.used(limited.id)[1], keys.used(free.id)[1]] == [10, 10]


def test_long_variants_are_priced_and_bounded(serve):
    texts = [":".join(f"M{i}A" for i in range(1, 3001))] * 50
    cost = variant_tokens("wt-marginals", 3000, 50, 10_000, scan=False, characters=sum(map(len, texts)))
    assert cost > 3000 + sum(map(len, texts)) // 100

    async def go():
        async with serve(max_variant_bytes=100_000) as http:
            body = {"sequence": "M" * 60, "mutants": texts, "strategy": "wt-marginals"}
            assert code(await http.post("/v1/score", json=body), 413) == "request.too_large"

    asyncio.run(go())


def test_bodies_in_flight_are_bounded_together(serve):
    async def go():
        async with serve(max_held_bytes=3000) as http:
            assert (await http.post("/v1/embed", json={"sequences": ["M" * 2000]})).status_code in (200, 422)
            r = await http.post("/v1/embed", json={"sequences": ["M" * 4000]})
            assert code(r, 429) == "overloaded"
            assert http.app.held_bytes == 0

    asyncio.run(go())


async def most_held(http: Any, body: dict[str, Any]) -> tuple[httpx.Response, int]:
    """The answer of /v1/embed, and the most bytes that were counted while it was sent."""
    plain, held = http.app.app, [0]

    async def watch(scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            held.append(http.app.held_bytes)
            await send(message)

        await plain(scope, receive, told)

    watch.state = plain.state  # type: ignore[attr-defined]
    http.app.app = watch
    try:
        return await http.post("/v1/embed", json=body), max(held)
    finally:
        http.app.app = plain


def test_pieces_of_answers_in_flight_are_bounded_together_and_a_large_item_goes_alone(serve):
    """With bodies: an answer of many pieces holds the few that are on their way, whatever its size."""
    body = {"sequences": ["M" * 60] * 20, "layers": [0, -1], "per_residue": True}

    async def go():
        for chunk, most in (
            (40_000, 200_000),
            (1_000, 40_000),
        ):  # five pieces at a time; one large item at a time
            async with serve(chunk_bytes=chunk, max_held_bytes=most) as http:
                whole, held = await most_held(http, body)
                assert whole.status_code == 200 and len(whole.json()["data"]) == 20
                assert 0 < held <= most < 20 * 60 * 2 * 4 * 64 and http.app.held_bytes == 0
            async with serve(chunk_bytes=chunk, max_held_bytes=30_000) as http:
                assert code(await http.post("/v1/embed", json=body), 429) == "overloaded"

    asyncio.run(go())


def test_a_database_that_is_away_is_503_and_a_known_key_goes_on(serve, keys):
    _, text = keys.create("alice", ("predict",))
    _, unseen = keys.create("bob", ("predict",))

    async def go():
        async with serve() as http:
            authorizer = http.app.service.authorizer
            assert (await http.post("/v1/embed", json=GOOD, headers=bearer(text))).status_code == 200

            def away() -> Any:
                raise OperationalError("select", {}, Exception("could not connect to db.internal:5432"))

            authorizer.keys.database._sessions.begin = away
            authorizer._asked = (1.0, True)  # long ago: on loopback it must not be asked again
            authorizer._known = {
                k: (0.0 if v is None else at - 10, v) for k, (at, v) in authorizer._known.items()
            }
            assert (await http.post("/v1/embed", json=GOOD, headers=bearer(text))).status_code == 200
            r = await http.post("/v1/embed", json=GOOD, headers=bearer(unseen))
            assert code(r, 503) == "database.unavailable"
            assert r.headers["retry-after"] and "db.internal" not in r.text and "sqlite" not in r.text
            authorizer._known = {k: (at - 120, v) for k, (at, v) in authorizer._known.items()}
            assert code(await http.post("/v1/embed", json=GOOD, headers=bearer(text)), 503)

    asyncio.run(go())


def test_bytes_of_an_item_and_of_an_answer_are_bounded_and_told_before(serve):
    async def go():
        body = {"sequences": ["M" * 60] * 3, "layers": [0, 1, -1], "per_residue": True}
        asked = {"kind": "embed", "sequences": body["sequences"], "per_residue": True, "layers": 3}
        for limits in ({"max_item_bytes": 20_000}, {"max_answer_bytes": 60_000}):
            async with serve(**limits) as http:
                r = await http.post("/v1/embed", json=body)
                assert code(r, 413) == "request.too_large" and "bytes" in r.json()["detail"]
                assert not (await http.post("/v1/estimate", json=asked)).json()["fits_one_request"]
                one = {**body, "sequences": ["M" * 6], "layers": [-1]}
                assert (await http.post("/v1/embed", json=one)).status_code == 200
                small = {**asked, "sequences": ["M" * 6], "layers": 1}
                assert (await http.post("/v1/estimate", json=small)).json()["fits_one_request"]

    asyncio.run(go())


def test_every_route_is_counted_and_limited_but_the_one_that_tells_the_limits(serve, keys):
    """Jobs, files, models and estimates too, before their bodies are read."""
    info, text = keys.create("alice", ("admin",), requests_per_minute=5)
    estimate = {"kind": "embed", "lengths": [20]}

    async def go():
        async with serve() as http:
            http.app.service.authorizer._clock = lambda: MINUTE * 60 + 30.0
            ask = bearer(text)
            statuses = [
                (await http.get(p, headers=ask)).status_code for p in ("/v1/models", "/v1/jobs", "/v1/files")
            ]
            statuses.append((await http.post("/v1/estimate", json=estimate, headers=ask)).status_code)
            statuses.append(
                (await http.post("/v1/jobs", json={"kind": "screen", "spec": {}}, headers=ask)).status_code
            )
            assert statuses == [200, 200, 200, 200, 422]
            for method, path in (("POST", "/v1/estimate"), ("GET", "/v1/models"), ("POST", "/v1/files?name=a.csv"),
                                 ("DELETE", "/v1/jobs/" + "0" * 24), ("POST", "/v1/embed")):  # fmt: skip
                r = await http.request(method, path, headers=ask)
                assert code(r, 429) == "quota.exceeded" and r.headers["retry-after"] == "30", path
            assert await exchange(http.app, [(b"authorization", b"Bearer " + text.encode())]) == (429, 0)
            assert (await http.get("/v1/limits", headers=ask)).status_code == 200

    asyncio.run(go())
    assert keys.used(info.id) == (5, 0)


def test_an_admin_makes_lists_and_revokes_keys_and_no_secret_is_told_twice(serve, keys):
    _, admin = keys.create("root", ("admin",))
    reader, reading = keys.create("reader", ("read", "predict", "train"))

    async def go():
        async with serve() as http:
            asked = {"name": "lab", "scopes": ["predict", "read"], "tokens_per_minute": 1000, "days": 3}
            for method, path, body in (("GET", "/v1/keys", None), ("POST", "/v1/keys", asked),
                                       ("DELETE", f"/v1/keys/{reader.id}", None)):  # fmt: skip
                assert code(await http.request(method, path, json=body), 401) == "auth.unauthenticated"
                assert (
                    code(await http.request(method, path, json=body, headers=bearer(reading)), 403)
                    == "auth.forbidden"
                )
            made = await http.post("/v1/keys", json=asked, headers=bearer(admin))
            assert made.status_code == 201, made.text
            told = made.json()
            text = told.pop("key")
            assert (
                told["name"] == "lab"
                and told["tokens_per_minute"] == 1000
                and told["expires"] > told["created"]
            )
            assert (await http.get("/v1/models", headers=bearer(text))).status_code == 200
            listed = await http.get("/v1/keys", headers=bearer(admin))
            assert [k["name"] for k in listed.json()["data"]] == ["root", "reader", "lab"]
            assert text.split("_", 2)[2] not in listed.text and "digest" not in listed.text
            for bad in ({"name": ""}, {"name": "a", "scopes": ["god"]}, {"name": "a", "scopes": []}, {"name": "a", "days": 0},
                        {"name": "a", "more": 1}, {"name": "a" * 201}):  # fmt: skip
                assert (
                    code(await http.post("/v1/keys", json=bad, headers=bearer(admin)), 422)
                    == "request.invalid"
                )
            assert code(await http.delete("/v1/keys/0123", headers=bearer(admin)), 404) == "key.not_found"
            mine = next(k["id"] for k in listed.json()["data"] if k["name"] == "root")
            assert code(await http.delete(f"/v1/keys/{mine}", headers=bearer(admin)), 409) == "keys.own"
            gone = await http.delete(f"/v1/keys/{told['id']}", headers=bearer(admin))
            assert gone.status_code == 200 and gone.json()["revoked"]
            await asyncio.sleep(2.1)  # what a key is remembered for
            assert (await http.get("/v1/models", headers=bearer(text))).status_code == 401

    asyncio.run(go())


def test_the_first_key_must_be_an_admins(serve):
    async def go():
        async with serve() as http:
            assert (await http.get("/v1/keys")).json() == {"data": []}
            assert code(await http.post("/v1/keys", json={"name": "lab"}), 409) == "keys.first"
            made = await http.post("/v1/keys", json={"name": "root", "scopes": ["admin"]})
            assert made.status_code == 201
            await asyncio.sleep(2.1)
            assert (await http.get("/v1/keys")).status_code == 401
            assert (await http.get("/v1/keys", headers=bearer(made.json()["key"]))).status_code == 200

    asyncio.run(go())
