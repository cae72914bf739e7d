"""The routes answer what the predictor says, in every format."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest

import bioseq
from asyncio import run

SEQS = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "ACDEFGHIKLMNPQRSTVWY", "mkv*", "GSHMRGEELF" * 12]


@pytest.fixture
def predictor(registry):
    return bioseq.load("default", threads=1, registry=registry)


def test_embed(serve, predictor):
    want = predictor.embed(SEQS)

    async def go():
        async with serve() as http:
            r = await http.post("/v1/embed", json={"sequences": SEQS})
            assert r.status_code == 200
            got = np.array([d["embedding"] for d in r.json()["data"]], dtype=np.float32)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    run(go())
