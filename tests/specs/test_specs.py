"""Job specs: exact round trips through JSON and TOML, unknown keys and wrong types refused, dotted overrides."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import SpecError
from bioseq.specs.base import Spec
from bioseq.specs.finetune import FinetuneSpec
from bioseq.specs.pretrain import ArchitectureSpec, PretrainSpec
from bioseq.specs.screen import ScreenSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    lr: float = 1e-3
    names: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.lr <= 0:
            raise SpecError(f"{self.lr} is not above 0.", field="inner.lr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Spec):
    title: str
    count: int = 3
    share: float = 0.5
    flag: bool = False
    mode: Literal["fast", "exact"] = "fast"
    level: Literal[1, 2] = 1
    limit: int | None = None
    pair: tuple[int, float] = (1, 2.0)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)
    others: tuple[Inner, ...] = ()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, lr=st.floats(1e-300, 1e300), names=st.lists(texts, max_size=3).map(tuple))
outers = st.builds(
    Outer,
    title=texts,
    count=st.integers(-(2**63), 2**63 - 1),
    share=floats,
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "exact"]),
    level=st.sampled_from([1, 2]),
    limit=st.none() | st.integers(0, 9),
    pair=st.tuples(st.integers(0, 9), floats),
    weights=st.dictionaries(texts, floats, max_size=3),
    inner=inners,
    others=st.lists(inners, max_size=2).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(outers)
def test_json_and_toml_round_trips_are_exact(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("spec")
    for name, text in (("a.json", spec.to_json()), ("a.toml", spec.to_toml())):
        (folder / name).write_text(text, "utf-8", newline="")
        back = Outer.load(folder / name)
        assert back == spec
        assert [type(v) for v in dataclasses.astuple(back)] == [type(v) for v in dataclasses.astuple(spec)]
    assert Outer.from_dict(spec.to_dict()) == spec
    assert Outer.load(folder / "a.json").to_json() == spec.to_json()


REAL = [
    ScreenSpec(
        inputs=("a.fasta", 'b "x".fasta'), output="runs/1", heads=("a", "b@2"), where="a.value > 1", top=5
    ),
    PretrainSpec(
        name="demo",
        model=ArchitectureSpec(n_layers=2, d_model=64, n_heads=4, d_ff=256),
        steps=4000,
        tokens_per_step=4096,
        micro_tokens=1024,
        trackers=(),
        corpus="shards",
    ),
    FinetuneSpec(
        labels="t.csv", targets=("fitness",), output="runs/head", features=("composition",), lr=1e-4
    ),
]


@pytest.mark.parametrize("spec", REAL, ids=lambda s: type(s).__name__)
def test_the_specs_of_every_job_survive_both_formats(tmp_path, spec):
    for name, text in (("a.json", spec.to_json()), ("a.toml", spec.to_toml())):
        (tmp_path / name).write_text(text)
        assert type(spec).load(tmp_path / name) == spec


def every_spec(kind: type) -> list[type]:
    inner = [h for h in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(h)]
    return [kind, *(k for i in inner for k in every_spec(i))]


@pytest.mark.parametrize("kind", [k for s in REAL for k in every_spec(type(s))], ids=lambda k: k.__name__)
def test_fields_that_may_be_none_are_none_by_default(kind):
    """TOML has no null: a None that is not the default would be lost in it."""
    assert kind.__dataclass_params__.frozen and all(f.kw_only for f in dataclasses.fields(kind))
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if type(None) in typing.get_args(hints[f.name]):
            assert f.default is None, f.name


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        ({"title": "a", "coutn": 1}, "coutn", "unknown key.*Known: title, count"),
        ({"title": "a", "inner": {"rl": 1.0}}, "inner.rl", "unknown key"),
        ({"title": "a", "others": [{"lr": 1.0}, {"x": 1}]}, r"others\[1\].x", "unknown key"),
        ({}, "title", "missing"),
        ({"title": 5}, "title", "str is needed"),
        ({"title": "a", "count": 1.0}, "count", "int is needed"),
        ({"title": "a", "count": True}, "count", "int is needed"),
        ({"title": "a", "count": "1"}, "count", "int is needed"),
        ({"title": "a", "count": None}, "count", "int is needed"),
        ({"title": "a", "share": "0.5"}, "share", "float is needed"),
        ({"title": "a", "share": False}, "share", "float is needed"),
        ({"title": "a", "share": float("nan")}, "share", "finite"),
        ({"title": "a", "share": float("inf")}, "share", "finite"),
        ({"title": "a", "flag": 1}, "flag", "bool is needed"),
        ({"title": "a", "mode": "slow"}, "mode", "'slow' is not one of fast, exact"),
        ({"title": "a", "mode": ["fast"]}, "mode", "is not one of"),
        ({"title": "a", "level": True}, "level", "is not one of"),
        ({"title": "a", "limit": "x"}, "limit", "int is needed"),
        ({"title": "a", "pair": [1]}, "pair", "2 values are needed, 1"),
        ({"title": "a", "pair": [1, "x"]}, r"pair\[1\]", "float is needed"),
        ({"title": "a", "inner": {"names": "abc"}}, "inner.names", "a list is needed"),
        ({"title": "a", "inner": 3}, "inner", "a table is needed"),
        ({"title": "a", "weights": [1]}, "weights", "a table is needed"),
        ({"title": "a", "weights": {"x": "y"}}, "weights.x", "float is needed"),
        ({"title": "a", "inner": {"lr": -1.0}}, "inner.lr", "not above 0"),
    ],
)
def test_faults_are_refused_by_their_dotted_name(data, field, words):
    with pytest.raises(SpecError, match=f"^{field}: .*{words}"):
        Outer.from_dict(data)


def test_whole_numbers_serve_as_floats_and_become_them():
    spec = Outer.from_dict({"title": "a", "share": 1})
    assert spec.share == 1.0 and isinstance(spec.share, float)


def test_values_are_checked_at_construction_too():
    with pytest.raises(SpecError, match=r"inner\.lr"):
        Inner(lr=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer(title="a").title = "b"
    with pytest.raises(TypeError):
        Outer("a")


def test_overrides_are_dotted_typed_and_leave_the_original():
    spec = Outer(title="a")
    new = spec.override(
        {"inner.lr": "3e-4", "limit": "7", "title": "two words", "flag": "true", "mode": "exact"}
    )
    assert (new.inner.lr, new.limit, new.title, new.flag, new.mode) == (3e-4, 7, "two words", True, "exact")
    assert new.override({"limit": "none"}).limit is None
    assert new.override({"inner.names": '["a", "b"]'}).inner.names == ("a", "b")
    assert new.override({"count": 9}).count == 9
    assert spec == Outer(title="a")
    for key in ("inner.rl", "nothing", "title.x", "inner.lr.x"):
        with pytest.raises(SpecError, match="unknown key"):
            spec.override({key: "1"})
    with pytest.raises(SpecError, match="count: int is needed"):
        spec.override({"count": "many"})


@pytest.mark.parametrize("text", ["17", "true", "1e5", "none", "[1]", "2020-01-01"])
def test_text_fields_take_text_that_looks_like_something_else(text):
    assert Outer(title="a").override({"title": text}).title == text


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="No such file"):
        Outer.load(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="cannot read"):
        Outer.load(tmp_path)
    for name, content in (
        ("a.toml", b"title = "),
        ("a.json", b"{"),
        ("b.json", b"\xff\xfe"),
        ("c.json", b'{"title": "a", "title": "b"}'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=f"{name} is not valid"):
            Outer.load(tmp_path / name)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SpecError, match="a table is needed"):
        Outer.load(tmp_path / "list.json")


def test_toml_is_toml_for_the_odd_values():
    spec = Outer(title='tab\t "quoted" \\ \x7f é', share=1e16, weights={"a b.c": 1e-9, "": 0.0, "é": 2.0})
    data = tomllib.loads(spec.to_toml())
    assert data["title"] == spec.title and data["weights"] == spec.weights
    assert math.isclose(data["share"], 1e16) and isinstance(data["share"], float)
    assert "limit" not in data
