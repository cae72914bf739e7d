"""A stream that was cut between two record batches is a whole Arrow stream to pyarrow: rows are counted."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from client_service import StandIn, embeddings, stream_of, vector_of

from bioseq.errors import ServiceError

SEQS = ["MK", "ACD", "GGGG", "WWWWW", "MKTAY", "L"]


def cut(**how):
    def answer(request):
        batch = embeddings(json.loads(request.content)["sequences"])
        return httpx.Response(200, content=stream_of(batch, slices=2, **how))

    return answer


@pytest.mark.parametrize("end", [False, True])
def test_rows_that_are_missing_are_an_error(ask, end):
    with pytest.raises(ServiceError, match="2 of 4 rows"):
        ask(StandIn([cut(keep=1, end=end)] * 9), "embed", SEQS[:4], client={"retries": 2})


def test_a_cut_answer_is_asked_for_again(ask, pauses):
    got = ask(StandIn([cut(keep=1, end=False), cut(keep=0), cut()]), "embed", SEQS)
    np.testing.assert_array_equal(got, [vector_of(s) for s in SEQS])
    assert len(pauses) == 2


def test_rows_out_of_order_or_in_excess_are_an_error(ask):
    def answer(sequences, order):
        batch = embeddings(sequences)
        return lambda request: httpx.Response(200, content=stream_of(batch.take(order)))

    for order in ([1, 0], [0, 0], [0, 1, 1]):
        with pytest.raises(ServiceError, match="rows"):
            ask(StandIn([answer(SEQS[:2], order)]), "embed", SEQS[:2], client={"retries": 0})


def test_a_stream_without_its_end_is_an_error_where_rows_cannot_be_counted(ask):
    def answer(request):
        return httpx.Response(200, content=StandIn().scan({"sequence": "MKT"}).content[:-8])

    assert ask(StandIn(), "scan", "MKT").shape == (3, 20)
    with pytest.raises(ServiceError, match="broke off"):
        ask(StandIn([answer]), "scan", "MKT", client={"retries": 0})
