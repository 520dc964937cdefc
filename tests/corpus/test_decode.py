"""The depth of a row's lists and objects is bounded."""

import pytest

from hpc.corpus.decode import MAX_DEPTH, decode_row
from hpc.corpus.errors import RowError


def nested(opening: str, closing: str, depth: int) -> bytes:
    """Return the line of an object with so many levels in all."""
    return f'{{"id": {opening * (depth - 1)}1{closing * (depth - 1)}}}'.encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
def test_a_row_with_more_levels_than_can_be_carried_is_refused(opening: str, closing: str) -> None:
    levels = opening.count("[") + opening.count("{")
    with pytest.raises(RowError, match=str(MAX_DEPTH)):
        decode_row(nested(opening, closing, MAX_DEPTH // levels + 2))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_a_row_with_as_many_levels_as_can_be_carried_is_read(opening: str, closing: str) -> None:
    assert set(decode_row(nested(opening, closing, MAX_DEPTH))) == {"id"}
