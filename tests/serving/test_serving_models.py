"""Registering over HTTP: archives, server paths, aliases; what is no bundle is refused."""

from __future__ import annotations

import asyncio
import io
import pickle
import tarfile
import zipfile

import pytest
from serving_helpers import SEQS, make_head

from bioseq.bundles.bundle import open_bundle

TAR, ZIP = {"Content-Type": "application/x-tar"}, {"Content-Type": "application/zip"}


def tar(folder, extra: dict[str, bytes] | None = None, link: str | None = None, mode="w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        t.add(folder, arcname="bundle")
        for name, data in (extra or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("bundle/card.md.json")
            info.type, info.linkname = tarfile.SYMTYPE, link
            t.addfile(info)
    return out.getvalue()


def zipped(folder) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for file in folder.rglob("*"):
            if file.is_file():
                z.write(file, file.relative_to(folder.parent))
    return out.getvalue()


@pytest.fixture
def second(bundles, tmp_path):
    return make_head(tmp_path / "second", open_bundle(bundles["tiny"]), "stability", seed=21)


def test_archives_register_and_answer(serve, second):
    async def go():
        async with serve() as http:
            r = await http.post("/v1/models", content=tar(second), headers=TAR)
            assert r.status_code == 201, r.text
            assert r.json()["id"] == "stability@2"
            r = await http.post("/v1/models", params={"name": "dg"}, content=zipped(second), headers=ZIP)
            assert (r.status_code, r.json()["id"]) == (201, "dg@1"), r.text
            body = {"sequences": SEQS, "heads": ["stability", "dg"]}
            r = await http.post("/v1/predict", json=body)
            assert r.json()["heads"] == {"stability": "stability@2", "dg": "dg@1"}
            r = await http.post("/v1/models", json={"alias": "best", "target": "stability@1"})
            assert (r.status_code, r.json()["aliases"]) == (201, ["best"])
            r = await http.delete("/v1/models/stability@1")
            assert (r.status_code, r.json()["code"]) == (422, "registry.invalid")
            assert (await http.delete("/v1/models/stability")).json()["code"] == "registry.invalid"
            assert (await http.delete("/v1/models/stability@2")).status_code == 204
            assert (await http.delete("/v1/models/stability@2")).status_code == 404
            r = await http.post("/v1/predict", json=body)
            assert r.json()["heads"]["stability"] == "stability@1"

    asyncio.run(go())


def test_paths_only_inside_the_roots(serve, second, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(second)
    inside = make_head(tmp_path / "root" / "in", open_bundle_of(second), "fold", seed=5)

    async def go():
        async with serve(roots=[str(tmp_path / "root")]) as http:
            r = await http.post("/v1/models", json={"path": str(inside)})
            assert (r.status_code, r.json()["id"]) == (201, "fold@2"), r.text
            for path in (second, tmp_path / "root" / "out", tmp_path / "root" / ".." / "second", "/etc"):
                r = await http.post("/v1/models", json={"path": str(path)})
                assert (r.status_code, r.json()["code"]) == (422, "bundle.invalid")
        async with serve() as http:
            assert (await http.post("/v1/models", json={"path": str(inside)})).status_code == 422

    asyncio.run(go())


def open_bundle_of(head):
    """Something with the head's base hash, for `make_head`."""
    from types import SimpleNamespace

    manifest = open_bundle(head).manifest
    return SimpleNamespace(manifest=SimpleNamespace(content_hash=manifest.base_hash))


def test_what_is_no_bundle_is_refused(serve, second, tmp_path):
    evil = pickle.dumps({"weights": [1]})
    cases = [
        (tar(second, {"bundle/model.pkl": evil}), 422, "bundle.invalid"),
        (tar(second, {"bundle/pytorch_model.bin": evil}), 422, "bundle.invalid"),
        (tar(second, {"../../escape.json": b"{}"}), 422, "bundle.invalid"),
        (tar(second, {"/tmp/escape.json": b"{}"}), 422, "bundle.invalid"),
        (tar(second, {"bundle/spare.json": b"{}"}), 422, "bundle.invalid"),
        (tar(second, link="/etc/passwd"), 422, "bundle.invalid"),
        (evil, 422, "bundle.invalid"),
        (b"", 422, "bundle.invalid"),
        (tar(second)[:-200], 422, "bundle.invalid"),
        (b"\0" * 70_000, 413, "request.too_large"),
    ]

    async def go():
        async with serve(max_upload_bytes=65_536) as http:
            before = (await http.get("/v1/models")).json()
            for content, status, code in cases:
                r = await http.post("/v1/models", content=content, headers=TAR)
                assert (r.status_code, r.json()["code"]) == (status, code), r.text
            for body, status in (
                ({}, 422),
                ({"path": 1}, 422),
                ({"alias": "x"}, 422),
                ({"alias": "x", "target": "no@1"}, 404),
            ):
                assert (await http.post("/v1/models", json=body)).status_code == status
            r = await http.post("/v1/models", content=b"{", headers={"Content-Type": "application/json"})
            assert (r.status_code, r.json()["code"]) == (400, "request.not_json")
            assert (await http.get("/v1/models")).json() == before

    asyncio.run(go())
