"""What each rank did when, from the spans that the ranks wrote."""

from hypothesis import given
from hypothesis import strategies as st

from hpc.report.spans import Span, chain, followed

KINDS = st.sampled_from(["read", "load", "generate", "wait"])
BEGUN = st.lists(st.tuples(KINDS, st.floats(-10, 110)), max_size=8)


def test_a_span_ends_where_the_next_one_begins() -> None:
    assert chain([("load", 3), ("generate", 5)], 0, 9, "other") == [
        Span("other", 0, 3), Span("load", 3, 5), Span("generate", 5, 9)
    ]  # fmt: skip


def test_spans_of_one_kind_that_touch_are_one() -> None:
    assert chain([("load", 3), ("load", 5)], 0, 9, "load") == [Span("load", 0, 9)]


@given(BEGUN)
def test_spans_have_no_gap_and_no_overlap_whatever_the_clocks_say(begun: list[tuple[str, float]]) -> None:
    spans = chain(begun, 0, 100, "other")
    times = [time for span in spans for time in (span.began, span.ended)]
    assert (times[0], times[-1], times[1:-1:2]) == (0, 100, times[2::2])
    assert all(span.began < span.ended for span in spans)


@given(BEGUN, BEGUN)
def test_who_follows_has_a_kind_at_every_moment(own: list[tuple[str, float]], leading: list[tuple[str, float]]) -> None:
    own = [(kind if kind != "wait" else "follow", time) for kind, time in own]
    spans = followed(chain(own, 0, 100, "follow"), chain(leading, 0, 100, "other"))
    assert "follow" not in {span.kind for span in spans}
    assert abs(sum(span.ended - span.began for span in spans) - 100) < 1e-9
