from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioseq.errors import SpecError
from bioseq.homologs.settings import SearchSettings

share = st.floats(0, 1)


@given(
    st.builds(
        SearchSettings,
        st.floats(1, 7.5),
        st.integers(1, 3),
        st.floats(0, 1e4),
        st.integers(1, 100_000),
        share,
        share,
        st.none() | share,
    )
)
def test_json_round_trip_is_exact_and_keeps_the_hash(settings: SearchSettings) -> None:
    again = SearchSettings.from_json(settings.to_json())
    assert again == settings and again.hash == settings.hash


def test_whole_numbers_and_floats_mean_the_same() -> None:
    assert SearchSettings(e_value=1).hash == SearchSettings(e_value=1.0).hash != SearchSettings().hash


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"sensitivity": 9}', "sensitivity"),
        ('{"iterations": 1.5}', "iterations"),
        ('{"iterations": true}', "iterations"),
        ('{"e_value": NaN}', "e_value"),
        ('{"min_coverage": "0.5"}', "min_coverage"),
        ('{"speed": 1}', "speed"),
        ("[]", None),
        ("{", None),
    ],
)
def test_bad_settings_name_the_field(text: str, field: str | None) -> None:
    with pytest.raises(SpecError) as error:
        SearchSettings.from_json(text)
    assert error.value.field == field
