from __future__ import annotations

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import ExpressionError
from bioseq.expressions.expression import compile_expression

COLUMNS = {
    "id": "text",
    "length": "number",
    "status": "text",
    "loc.nucleus": "number",
    "loc.value": "opaque",
    "loc.ood_percentile": "number",
    "gb1.value": "number",
    "gb1.ood_percentile": "number",
    "loc.cell wall": "number",
}
HEADS = ("loc", "gb1")


def value(text: str, kind: str = "truth"):
    sql, _ = compile_expression(text, COLUMNS, heads=HEADS, kind=kind)
    row = {
        "id": "it's",
        "length": 10,
        "status": "ok",
        "loc.nucleus": 0.75,
        "loc.ood_percentile": 0.5,
        "gb1.value": -2.0,
    }
    row |= {"gb1.ood_percentile": None, "loc.cell wall": 0.0}
    cells = ", ".join(
        f"{'NULL' if v is None else repr(v) if not isinstance(v, str) else chr(39) + v.replace(chr(39), chr(39) * 2) + chr(39)}"
        f' AS "{k}"'
        for k, v in row.items()
    )
    return duckdb.connect().execute(f"SELECT {sql} FROM (SELECT {cells})").fetchall()[0][0]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("loc.nucleus > 0.5 and length < 20", True),
        ("nucleus > 0.5", True),  # a bare name that only one head has
        ("NOT nucleus <= 0.5 AND (length = 10 OR length > 1e3)", True),
        ("gb1.ood_percentile < 0.9", False),  # undefined is not below
        ("not gb1.ood_percentile < 0.9", True),
        ("`loc.cell wall` == 0", True),
        ('id == "it\'s"', True),
        ("status != 'ok'", False),
        ("length / `cell wall` > 0 or length / `cell wall` <= 0", False),  # a division by zero is undefined
        ("min(length, gb1.value) == -2 and max(1, 2, 3) == 3", True),
        ("max(1, gb1.ood_percentile) > 0", False),  # undefined in, undefined out
        ("max(gb1.ood_percentile, 1) > 0 or min(1, 2, gb1.ood_percentile) < 3", False),
    ],
)
def test_filters(text, wanted):
    assert value(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("2 + 3 * -gb1.value", 8.0),
        ("(2 + 3) * 2 - 1", 9.0),
        ("length - 3 - 2", 5.0),
        ("8 / 4 / 2", 1.0),
        ("abs(gb1.value) + sqrt(4) + log(1)", 4.0),
        ("log(gb1.value)", None),
        ("sqrt(-1)", None),
        ("log(0)", None),
        ("sqrt(0)", 0.0),
        ("sqrt(-1e-300)", None),
        ("length / (length - 10)", None),
        ("min(min(3, 2), max(1, min(5, 4)))", 2.0),
    ],
)
def test_arithmetic(text, wanted):
    assert value(text, "number") == wanted


@pytest.mark.parametrize(
    "text, kind, column, says",
    [
        ("nucleus >", "truth", 10, "breaks off"),
        ("nucleus > 0.5 banana", "truth", 15, "banana"),
        ("ood_percentile < 1", "truth", 1, "loc.ood_percentile or gb1.ood_percentile"),
        ("length > 1 and nuclues > 1", "truth", 16, "Did you mean nucleus?"),
        ("length", "truth", 1, "a comparison is needed"),
        ("length > 1", "number", 1, "a number is needed"),
        ("1 < length < 2", "truth", 12, "unexpected '<'"),
        ("__import__('os')", "truth", 1, "unknown function"),
        ("length; drop", "truth", 7, "unexpected ';'"),
        ("loc.value == 'x'", "truth", 1, "cannot be compared"),
        ("length > 'a'", "truth", 10, "a number is needed"),
        ("id < 'a'", "truth", 4, "only == and !="),
        ("1e999 > length", "truth", 1, "too large"),
        ("   ", "truth", 1, "empty"),
        ("not " * 900 + "length > 1", "truth", 1, "deep"),
    ],
)
def test_faults_say_where(text, kind, column, says):
    with pytest.raises(ExpressionError) as caught:
        compile_expression(text, COLUMNS, heads=HEADS, kind=kind)
    assert caught.value.column == column
    assert says in str(caught.value)


def test_unknown_column_lists_the_columns():
    with pytest.raises(ExpressionError, match=r"Columns: id, length, status, loc.nucleus.*`loc.cell wall`"):
        compile_expression("nothing > 1", COLUMNS, heads=HEADS)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_an_error_or_sql_that_runs(text):
    """No text reaches DuckDB that it cannot run: whatever compiles also executes."""
    try:
        value(text)
    except ExpressionError as error:
        assert error.column is not None and error.column >= 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", ["sqrt({})", "log({})", "abs({})", "min(1, {})", "max({}, 2)", "(1 / {})"])
def test_nested_calls_do_not_multiply(call):
    """Each operand is written once, and bound once by DuckDB: forty levels that doubled would never end."""
    text = "length"
    for _ in range(40):
        text = call.format(text)
    sql, _ = compile_expression(text, COLUMNS, heads=HEADS, kind="number")
    assert len(sql) < 100 * len(text)
    value(text, "number")
