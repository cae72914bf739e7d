"""`translate` in POST /v1/predict and in the client: proteins of coding sequences, the bases that code for each, counted."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pyarrow as pa
import pytest
from Bio.Seq import Seq
from serving_helpers import SEQS, same

import bioseq
from bioseq.errors import IllegalResidueError, SequenceTooLongError, SpecError
from bioseq.inference.loading import load
from bioseq.sequences.fasta import Record
from bioseq.sequences.translation import coded

CODONS = {"A": "GCT", "C": "TGT", "D": "GAT", "E": "GAA", "F": "TTT", "G": "GGT", "H": "CAT", "I": "ATT", "K": "AAA",
          "L": "CTG", "M": "ATG", "N": "AAT", "P": "CCG", "Q": "CAG", "R": "CGT", "S": "TCT", "T": "ACT", "V": "GTT",
          "W": "TGG", "Y": "TAT"}  # fmt: skip
PROTEINS = [s.upper().rstrip("*") for s in SEQS]
GENES = ["".join(CODONS[a] for a in p) + "TAA" for p in PROTEINS]
HEADS = ["stability", "fold", "structure"]


@pytest.fixture
def predictor(registry):
    return load("default", threads=1, registry=registry)


def awaited(test):
    """Run an async test to its end."""
    return functools.wraps(test)(lambda *args, **kwargs: asyncio.run(test(*args, **kwargs)))


async def asked(http, **body):
    return await http.post("/v1/predict", json={"heads": HEADS, **body})


@pytest.mark.parametrize("mode", ["one", "six"])
@awaited
async def test_predictions_are_those_of_the_proteins_and_the_bases_code_for_them(serve, predictor, mode):
    given = [
        GENES[0],
        str(Seq(GENES[1]).reverse_complement()) if mode == "six" else GENES[1].replace("T", "U"),
    ]
    want = [c for i, s in enumerate(given) for c in coded(Record(str(i), s), mode, 1)]
    expected = predictor.predict([w.sequence for w in want], HEADS)
    async with serve(chunk_tokens=60) as http:
        answer = (await asked(http, sequences=given, translate=mode)).json()
        arrow = await http.post(
            "/v1/predict", json={"heads": HEADS, "sequences": given, "translate": mode},
            headers={"Accept": "application/vnd.apache.arrow.stream"},
        )  # fmt: skip
    table = pa.ipc.open_stream(arrow.content).read_all()
    assert [d["index"] for d in answer["data"]] == list(range(len(want))) == table["index"].to_pylist()
    assert [d["coding"] for d in answer["data"]] == table["coding"].to_pylist()
    for item, one, prediction in zip(answer["data"], want, expected, strict=True):
        place = item["coding"]
        bases = Seq(given[place["sequence"]][place["first_base"] - 1 : place["last_base"]])
        if place["strand"] == "-":
            bases = bases.reverse_complement()
        assert str(bases.translate()) == one.sequence and place["residues"] == len(one.sequence)
        same(item["predictions"], prediction)
    if mode == "six":
        frames = [d["coding"] for d in answer["data"] if d["coding"]["sequence"] == 1]
        assert ("-", len(PROTEINS[1])) in {(c["strand"], c["residues"]) for c in frames}
    # both are counted: what is computed, and what is read
    tokens = sum(len(w.sequence) + 2 for w in want) + sum(map(len, given)) // 64
    assert answer["usage"] == {"items": len(want), "tokens": tokens}


@awaited
async def test_without_translate_nothing_changes(serve):
    async with serve() as http:
        plain = (await asked(http, sequences=PROTEINS[:1])).json()
        named = (await asked(http, sequences=PROTEINS[:1], translate="none")).json()
    assert plain == named and "coding" not in plain["data"][0]


@awaited
async def test_what_is_refused(serve):
    long = "ATG" + "GCT" * 5000
    async with serve(max_items=4) as http:
        for body, status, code, words in (
            ({"sequences": [GENES[0], "ATGTAAGCT"], "translate": "one"}, 422, "sequence.illegal_residue", "stop codon inside"),
            ({"sequences": [GENES[0], "ATGEE"], "translate": "six"}, 422, "sequence.illegal_residue", "position 4"),
            ({"sequences": [GENES[0], "AT"], "translate": "one"}, 422, "request.invalid", "fewer than three"),
            ({"sequences": [GENES[0], long], "translate": "one"}, 422, "sequence.too_long", "bases 1 to 15003 (+)"),
            ({"sequences": GENES[:1], "translate": "one", "genetic_code": 7}, 422, "request.invalid", "no genetic code 7"),
            ({"sequences": GENES[:1], "translate": "two"}, 422, "request.invalid", "translate"),
            ({"sequences": GENES[:1], "translate": "six"}, 413, "request.too_many_items", "6"),
            ({"sequences": GENES[:1] * 5, "translate": "one"}, 413, "request.too_many_items", "5"),
            ({"sequences": [PROTEINS[0], GENES[0]]}, 422, "sequence.illegal_residue", "this model reads proteins"),
        ):  # fmt: skip
            answer = await asked(http, **body)
            told = answer.json()
            assert (answer.status_code, told["code"]) == (status, code), told
            assert words in answer.text
            assert not code.startswith("sequence") or told["index"] == 1
            assert GENES[0] not in answer.text


def test_the_client_gives_the_proteins_of_each_sequence(live, predictor):
    records = [Record(f"g{i}", g) for i, g in enumerate(GENES * 3)]
    with live(max_items=20) as service, bioseq.connect(service.url) as remote:
        one = remote.predict(GENES, HEADS, translate="one")
        six = remote.predict(iter(records), ["stability"], translate="six", genetic_code=11)
        expected = predictor.predict(PROTEINS, HEADS)
        assert [len(rows) for rows in one] == [1] * 4
        for (row,), gene, want in zip(one, GENES, expected, strict=True):
            assert (row["strand"], row["first_base"], row["last_base"]) == ("+", 1, len(gene) - 3)
            same(row["predictions"], want)
        assert len(six) == 12 and all(1 <= len(rows) <= 6 for rows in six)
        np.testing.assert_allclose(
            [next(r for r in rows if r["first_base"] == 1)["predictions"]["stability"]["value"] for rows in six[:2]],
            [expected[i]["stability"]["value"] for i in range(2)], rtol=1e-4,
        )  # fmt: skip
        with pytest.raises(IllegalResidueError, match="stop codon inside") as fault:
            remote.predict([*GENES, "ATGTAAGCT"], HEADS, translate="one")
        assert fault.value.index == 4
        rows = remote.predict([GENES[0], "ATG" * 2000, GENES[1]], HEADS, translate="one", on_error="report")
        assert rows[1] is None and len(rows[0]) == len(rows[2]) == 1
        assert isinstance(remote.errors[0], SequenceTooLongError) and remote.errors[0].index == 1
        with pytest.raises(SpecError, match="no genetic code 99"):
            remote.predict(GENES, HEADS, translate="one", genetic_code=99)
