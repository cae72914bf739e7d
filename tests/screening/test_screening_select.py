from __future__ import annotations

import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioseq.errors import ExpressionError, SpecError
from bioseq.specs.screen import ScreenSpec
from serving.screening.tables import select as room
from serving.screening.tables.columns import HeadColumns, part_schema, table_schema
from serving.screening.units import connect

REG = HeadColumns("reg", "regression", ())
CLS = HeadColumns("cls", "multiclass", ("a", "b", "c"))
SS = HeadColumns("ss", "per_residue", ("H", "E", "C"), per_residue=True)
MANY = HeadColumns("two", "regression", ("tm", "kd"))


def spec(**changes):
    return ScreenSpec(**{"inputs": ("x",), "output": "y", "heads": ("reg", "cls"), **changes})


def rows(count=400, seed=1):
    random.seed(seed)
    made = []
    for i in range(count):
        p = [random.choice((0.1, 0.2, 0.5, 0.7)) for _ in range(3)]
        value = None if i % 17 == 0 else random.choice([-1.5, 0.0, 0.25, 1.0, 2.0])
        made.append(
            {
                "id": f"r{i}",
                "row": i,
                "length": 10 + i % 7,
                "status": "quarantined" if value is None else "ok",
                "reg.value": value,
                "reg.ood_percentile": None if value is None else random.random(),
                **{f"cls.{k}": None if value is None else v for k, v in zip("abc", p)},
            }
        )
    return made


@pytest.fixture
def database(tmp_path):
    with connect(tmp_path) as connection:
        table = pa.Table.from_pylist(rows(), schema=table_schema((REG, CLS)))
        connection.register("given", table)
        connection.execute("CREATE TABLE predictions AS SELECT * FROM given")
        yield connection


def ranked(database):
    return [r[0] for r in database.execute("SELECT row FROM ranked ORDER BY rank").fetchall()]


def apply(database, heads=(REG, CLS), **changes):
    selection = room.compile_selection(spec(**changes), heads)
    room.rank(database, "predictions", selection)
    return selection


def ok():
    return [r for r in rows() if r["status"] == "ok"]


def test_rank_by_expression_with_ties_by_row_and_undefined_last(database):
    apply(database, rank="log(reg.value)", where="length > 11")
    passing = [r for r in ok() if r["length"] > 11]
    defined = [r for r in passing if r["reg.value"] > 0]
    wanted = sorted(defined, key=lambda r: (-math.log(r["reg.value"]), r["row"]))
    wanted += [r for r in passing if r["reg.value"] <= 0]
    assert ranked(database) == [r["row"] for r in wanted]


def test_one_head_is_ranked_by_its_value_or_highest_probability(database):
    apply(database, heads=(REG,))
    assert ranked(database) == [r["row"] for r in sorted(ok(), key=lambda r: (-r["reg.value"], r["row"]))]
    database.execute("DROP TABLE ranked; DROP TABLE scored")
    apply(database, heads=(CLS,))
    best = {r["row"]: max(r[f"cls.{k}"] for k in "abc") for r in ok()}
    assert ranked(database) == sorted(best, key=lambda i: (-best[i], i))


def test_several_heads_are_ranked_by_the_mean_of_their_ranks(database):
    selection = apply(database)
    assert selection.explained.startswith("the mean of its places (1 is best) by reg.value and ")

    def places(score):
        values = {r["row"]: score(r) for r in ok()}
        return {i: 1 + sum(other > v for other in values.values()) for i, v in values.items()}

    a, b = places(lambda r: r["reg.value"]), places(lambda r: max(r[f"cls.{k}"] for k in "abc"))
    assert ranked(database) == sorted(a, key=lambda i: ((a[i] + b[i]) / 2, i))


def test_the_front_is_what_nothing_dominates(database, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 13)  # a block is dominated by earlier ones and by itself
    selection = apply(database, pareto=("reg.value", "cls.a", "-length"))
    room.pareto(database, "predictions", selection.front)
    points = {r["row"]: (r["reg.value"], r["cls.a"], -r["length"]) for r in ok()}

    def dominated(p):
        return any(all(x >= y for x, y in zip(q, p)) and q != p for q in points.values())

    assert sorted(ranked(database)) == sorted(i for i, p in points.items() if not dominated(p))
    assert len(ranked(database)) > 1


@pytest.mark.parametrize("most, top", [(1, None), (2, None), (2, 7), (10_000, None)])
def test_diversity_keeps_so_many_a_neighbourhood(database, tmp_path, monkeypatch, most, top):
    monkeypatch.setattr(room, "BLOCK", 13)  # leaders must be found across blocks too
    generator = np.random.default_rng(5)
    centres = generator.normal(size=(9, 6))
    vectors = np.concatenate(
        [centres[generator.integers(9, size=400)] + 0.2 * generator.normal(size=(400, 6))]
    )
    vectors = vectors.astype(np.float32)
    path = tmp_path / "v.parquet"
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 6)
    pq.write_table(pa.table({"unit": pa.array(range(400)), "embedding": column}), path)
    database.execute("CREATE VIEW indexed AS SELECT row, row AS hash_high, row AS hash_low FROM predictions")
    database.execute(
        "CREATE VIEW units AS SELECT row AS unit, row AS hash_high, row AS hash_low FROM predictions"
    )
    apply(database, rank="reg.value")
    order = ranked(database)
    room.diversify(database, [path], most, 0.8, top)

    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    leaders, kept = {}, []
    for row in order:  # the definition, one record after another
        near = {i: float(centred[i] @ centred[row]) for i in leaders}
        close = max(near, key=lambda i: near[i], default=None)
        if close is None or near[close] < 0.8:
            leaders[row] = 1
        elif leaders[close] < most:
            leaders[close] += 1
        else:
            continue
        kept.append(row)
        if top is not None and len(kept) == top:
            break
    assert ranked(database) == kept
    assert top is not None or len(leaders) >= 9


def test_a_per_residue_head_is_in_the_parts_and_cannot_be_ranked_by():
    assert [f.name for f in part_schema((SS,))][3:5] == ["ss.value", "ss.probabilities"]
    assert room.compile_selection(spec(heads=("ss",)), (SS,)).scores == ()
    for rank in ("ss.value", "ss.probabilities"):
        with pytest.raises(ExpressionError, match="one value a residue"):
            room.compile_selection(spec(heads=("ss",), rank=rank), (SS,))
    with pytest.raises(ExpressionError):
        room.compile_selection(spec(heads=("ss",), where="ss.value == 'H'"), (SS,))


def test_columns_are_those_of_the_prediction():
    names = [f.name for f in table_schema((REG, CLS, MANY))]
    assert names[:5] == ["id", "row", "length", "status", "error"]
    assert names[5:10] == ["reg.value", "reg.low", "reg.high", "reg.ood", "reg.ood_percentile"]
    assert names[10:16] == ["cls.value", "cls.a", "cls.b", "cls.c", "cls.ood", "cls.ood_percentile"]
    assert names[16:19] == ["two.tm.value", "two.tm.low", "two.tm.high"] and names[-1] == "notes"
    cells = MANY.cells(
        {
            "value": {"tm": 1.0, "kd": 2.0},
            "interval": {"tm": [0, 2], "kd": [1, 3]},
            "ood": 0.5,
            "ood_percentile": 0.1,
        }
    )
    assert cells["two.kd.high"] == 3.0 and cells["two.tm.value"] == 1.0
    assert MANY.scores() == ['"two.tm.value"', '"two.kd.value"']


def test_the_nearest_training_sequence_has_columns():
    head = HeadColumns("cls", "multiclass", ("a", "b"), homologs=True)
    names = [f.name.removeprefix("cls.") for f in head.fields()][-6:]
    assert names == [
        "nearest", "nearest_identity", "nearest_coverage", "nearest_label", "homologs", "homologs_effective",
    ]  # fmt: skip
    prediction = {"value": "a", "probabilities": {"a": 0.75, "b": 0.25}, "ood": 0.5, "ood_percentile": 0.1}
    hit = {"id": "P1", "identity": 0.5, "coverage": 1.0, "label": ["x", "y"], "text": "P1: 50 %"}
    found = head.cells(prediction | {"nearest": [hit], "homologs": {"number": 3, "effective": 1.5}})
    assert [found[f"cls.{n}"] for n in names] == ["P1", 0.5, 1.0, "x, y", 3.0, 1.5]
    alone = head.cells(prediction | {"nearest": [], "homologs": {"number": 0, "effective": 0.0}})
    assert [alone[f"cls.{n}"] for n in names] == [None, None, None, None, 0.0, 0.0]
    assert head.kinds()["cls.nearest_identity"] == "number" and head.kinds()["cls.nearest"] == "text"


def test_an_answer_that_is_not_a_number_is_an_error():
    from bioseq.errors import BioseqError

    with pytest.raises(BioseqError, match="not a finite number"):
        REG.cells({"value": float("nan"), "interval": None, "ood": 0.0, "ood_percentile": 0.0})


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"heads": ()}, "heads"),
        ({"heads": ("a", "a")}, "heads"),
        ({"top": 0}, "top"),
        ({"diverse_threshold": 1.5}, "diverse_threshold"),
        ({"genetic_code": 8}, "genetic_code"),
        ({"pareto": ("a",)}, "pareto"),
        ({"pareto": ("*",), "heads": ("a",)}, "pareto"),
        ({"inputs": ()}, "inputs"),
    ],
)
def test_impossible_settings_name_their_field(changes, field):
    with pytest.raises(SpecError) as caught:
        spec(**changes)
    assert caught.value.field == field


def test_a_spec_survives_json_and_toml(tmp_path):
    given = spec(where="a.b > 0.5 and c == 'x\"y'", pareto=("a", "b"), top=3, workers=2)
    for name, text in (("s.json", given.to_json()), ("s.toml", given.to_toml())):
        (tmp_path / name).write_text(text)
        assert ScreenSpec.load(tmp_path / name) == given
