"""`--where` and `--rank`: a small grammar (`expression.lark`), checked and compiled to SQL. Nothing is evaluated
as code: the tree is walked, every name must be a column of the table, every literal is written anew.

    where   localization.nucleus > 0.5 and ood_percentile < 0.95
    rank    stability.value - 2 * stability.ood

Columns of a head may be written without the head where only one head has them; names with other characters
stand between backticks. Undefined values (a quarantined record, a division by zero, the log of a negative
number) make a comparison false and come last in a ranking.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal, cast

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from bioseq.errors import ExpressionError

Kind = Literal["number", "text", "truth", "opaque"]

MAX_CHARACTERS = 4000
MAX_DEPTH = 250  # expressions within expressions


# An operand stands once in what it becomes, and a lambda binds it: nested calls would double the work at each level
# otherwise, in our SQL or inside DuckDB, whose nullif() is a macro that writes its operand twice. Where an operand is
# undefined (NULL) so is the result, which least() and greatest() would pass over.
def _only(operand: str, condition: str) -> str:
    """SQL of the operand where it meets the condition, else NULL."""
    return f"list_transform([{operand}], lambda x: CASE WHEN x {condition} THEN x END)[1]"


_FUNCTIONS = {
    "abs": (1, 1, "abs({all})"),
    "min": (2, 8, "list_reduce([{all}], lambda x, y: CASE WHEN x <= y THEN x WHEN x > y THEN y END)"),
    "max": (2, 8, "list_reduce([{all}], lambda x, y: CASE WHEN x >= y THEN x WHEN x < y THEN y END)"),
    "log": (1, 1, f"ln({_only('{all}', '> 0')})"),
    "sqrt": (1, 1, f"sqrt({_only('{all}', '>= 0')})"),
}


@cache
def _parser() -> Lark:
    text = Path(__file__).with_name("expression.lark").read_text("utf-8")
    return Lark(text, parser="lalr", propagate_positions=True)


def quote(name: str) -> str:
    """A SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def short_names(columns: Mapping[str, Kind], heads: tuple[str, ...]) -> dict[str, list[str]]:
    """Bare name -> the full columns it may mean."""
    found: dict[str, list[str]] = {}
    for column in columns:
        for head in heads:
            if column.startswith(head + "."):
                found.setdefault(column[len(head) + 1 :], []).append(column)
    return found


class _Compiler:
    def __init__(self, text: str, columns: Mapping[str, Kind], heads: tuple[str, ...]):
        self.text, self.columns = text, columns
        self.short = short_names(columns, heads)
        self.used: list[str] = []
        self.depth = 0

    def fail(self, message: str, at: Tree | Token, hint: str | None = None) -> ExpressionError:
        column = getattr(at, "column", None) or getattr(getattr(at, "meta", None), "column", None) or 1
        return _error(self.text, message, column, hint)

    def known(self) -> str:
        return ", ".join(n if n.replace(".", "_").isidentifier() else f"`{n}`" for n in self.columns)

    def column(self, token: Token) -> tuple[Kind, str]:
        name = str(token)[1:-1] if token.type == "QUOTED" else str(token)
        full = name if name in self.columns else None
        if full is None:
            options = self.short.get(name, [])
            if len(options) > 1:
                raise self.fail(f"{name!r} may be {' or '.join(options)}.", token, "Write the head too.")
            if not options:
                near = difflib.get_close_matches(name, [*self.columns, *self.short], n=1)
                guess = f"Did you mean {near[0]}? " if near else ""
                raise self.fail(f"unknown column {name!r}.", token, f"{guess}Columns: {self.known()}.")
            full = options[0]
        kind = self.columns[full]
        if kind == "opaque":
            raise self.fail(f"{full} holds one value a residue or a list; it cannot be compared.", token)
        if full not in self.used:
            self.used.append(full)
        sql = f"CAST({quote(full)} AS DOUBLE)" if kind == "number" else quote(full)
        return kind, sql

    def want(self, node: Tree, kind: Kind) -> str:
        got, sql = self.visit(node)
        if got != kind:
            names = {"number": "a number", "text": "a text", "truth": "a comparison", "opaque": "a list"}
            raise self.fail(f"{names[kind]} is needed here, not {names[got]}.", node)
        return sql

    def visit(self, node: Tree) -> tuple[Kind, str]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(self.text, f"nested too deeply; the limit is {MAX_DEPTH}.", 1)
        found = self.compiled(node)
        self.depth -= 1
        return found

    def compiled(self, node: Tree) -> tuple[Kind, str]:
        parts = node.children
        match node.data:
            case "number":
                value = float(str(parts[0]))
                if not math.isfinite(value):
                    raise self.fail("the number is too large.", node)
                return "number", f"CAST({value!r} AS DOUBLE)"
            case "text":
                return "text", "'" + str(parts[0])[1:-1].replace("'", "''") + "'"
            case "column":
                return self.column(cast(Token, parts[0]))
            case "or_" | "and_":
                word = "OR" if node.data == "or_" else "AND"
                left, right = (self.want(p, "truth") for p in parts)
                return "truth", f"({left} {word} {right})"
            case "not_":
                return "truth", f"(NOT {self.want(parts[0], 'truth')})"
            case "negative":
                return "number", f"(-{self.want(parts[0], 'number')})"
            case "add":
                a, op, b = parts
                return "number", f"({self.want(a, 'number')} {op} {self.want(b, 'number')})"
            case "mul":
                a_sql, b_sql = self.want(parts[0], "number"), self.want(parts[2], "number")
                if parts[1] == "/":
                    return "number", f"({a_sql} / {_only(b_sql, '<> 0')})"
                return "number", f"({a_sql} * {b_sql})"
            case "call":
                return self.call(node)
            case "compare":
                return self.compare(node)
        raise self.fail("this cannot be read.", node)

    def call(self, node: Tree) -> tuple[Kind, str]:
        name, *arguments = node.children
        rule = _FUNCTIONS.get(str(name).lower())
        if rule is None:
            raise self.fail(f"unknown function {str(name)!r}.", name, f"Known: {', '.join(_FUNCTIONS)}.")
        low, high, template = rule
        if not low <= len(arguments) <= high:
            wanted = str(low) if low == high else f"{low} to {high}"
            raise self.fail(f"{name} takes {wanted} values, not {len(arguments)}.", name)
        sql = [self.want(a, "number") for a in arguments]
        return "number", template.format(all=", ".join(sql))

    def compare(self, node: Tree) -> tuple[Kind, str]:
        left, op, right = node.children
        kind, a = self.visit(left)
        if kind == "truth":
            raise self.fail("a comparison cannot be compared.", left)
        b = self.want(right, kind)
        if kind == "text" and op not in ("=", "==", "!="):
            raise self.fail("texts know only == and !=.", op)
        sign = {"==": "=", "!=": "<>"}.get(str(op), str(op))
        return "truth", f"coalesce({a} {sign} {b}, FALSE)"


def _error(text: str, message: str, column: int, hint: str | None = None) -> ExpressionError:
    shown = text.replace("\n", " ")
    start = max(0, column - 31)
    return ExpressionError(
        f"column {column} of the expression, at {shown[start : column - 1]!r} <here> {shown[column - 1 : column + 20]!r}: {message}",
        column=column,
        hint=hint,
    )


def compile_expression(
    text: str, columns: Mapping[str, Kind], *, heads: tuple[str, ...] = (), kind: Kind = "truth"
) -> tuple[str, list[str]]:
    """SQL (DuckDB) of an expression and the columns that it reads.

    `kind` is "truth" for a filter, "number" for a rank. Raises `ExpressionError` with the one-based column of
    the fault; an unknown name lists the columns.
    """
    if len(text) > MAX_CHARACTERS:
        raise _error(text, f"{len(text)} characters; at most {MAX_CHARACTERS} are read.", MAX_CHARACTERS)
    if not text.strip():
        raise _error(text, "the expression is empty.", 1)
    flat = text.replace("\n", " ").replace("\r", " ")
    compiler = _Compiler(flat, columns, heads)
    try:
        tree = _parser().parse(flat)
        if isinstance(tree, Token):  # a lone terminal cannot be a start, but lark's type allows it
            raise _error(flat, "this cannot be read.", 1)
        sql = compiler.want(tree, kind)
    except UnexpectedCharacters as error:
        raise _error(flat, f"unexpected {error.char!r}.", error.column) from None
    except (UnexpectedEOF, UnexpectedToken) as error:
        token = getattr(error, "token", None)
        if token is None or token.type == "$END":
            raise _error(flat, "the expression breaks off here.", len(flat) + 1) from None
        raise _error(flat, f"unexpected {str(token)!r}.", token.column or 1) from None
    except UnexpectedInput as error:
        raise _error(flat, "this cannot be read.", getattr(error, "column", 1)) from None
    except RecursionError:
        raise _error(flat, "nested too deeply.", 1) from None
    return sql, compiler.used
