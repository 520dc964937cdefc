"""What orjson gives is what the json module gives, or it is not given."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc import quick_json

TEXT = st.text(st.characters())
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(TEXT, inner, max_size=20),
    max_leaves=30,
)


@settings(deadline=None)
@given(VALUES, st.booleans())
@example(2**64, True)
@example(-(2**63) - 1, True)
@example({"a": [1e16, 1e-7, -0.0, 5e-324]}, True)
def test_what_is_decoded_is_what_the_json_module_decodes(value: Any, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        found = quick_json.decode(data)
    except ValueError:
        return
    assert (found, repr(found)) == (value, repr(value))


@pytest.mark.parametrize("data", [b"18446744073709551616", b"NaN", b"1e999", rb'"\ud800"', b'"\xff"', b"{", b""])
def test_what_only_the_json_module_could_decode_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        quick_json.decode(data)


def test_a_row_of_usual_values_is_decoded() -> None:
    assert quick_json.decode(b'{"id": 123456789012345678, "x": [1.5, null, "\\u00e9"]}') == {
        "id": 123456789012345678,
        "x": [1.5, None, "é"],
    }


@settings(deadline=None)
@given(VALUES)
@example([float(f"{digit}e{exponent}") for digit in (1, 9.5) for exponent in (-320, -7, -5, -4, 15, 16, 17, 300)])
def test_what_is_encoded_is_what_the_json_module_encodes(value: Any) -> None:
    try:
        found = quick_json.encode(value)
    except (TypeError, ValueError):
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False).encode()
        return
    assert found == json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_json_number_is_not_encoded(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        quick_json.encode(number)


@given(TEXT)
def test_any_string_is_decoded(text: str) -> None:
    assert quick_json.decode_string(json.dumps(text).encode()) == text
