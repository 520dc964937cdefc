"""What a journal took comes back as it was written, or is known to be damaged; never is it something else."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc.output.journal import JournalError, JournalIndex, JournalWriter, decode, encode
from hpc.request import KEY_BYTES, Completion, Sample
from tests.conftest import finish, start

FAILED = {"kind": "engine", "message": "out of memory"}


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def completion(number: int, text: str | None = "text", error: dict[str, str] | None = None) -> Completion:
    reason = "error" if error else "stop"
    return Completion(key(number), number, f"id{number}", (1, 2, number), text, reason, error)  # type: ignore[arg-type]


def failure(number: int) -> Completion:
    return completion(number, None, FAILED)


def written(path: Path, completions: Iterable[Completion]) -> Path:
    writer = JournalWriter(path)
    writer.append(completions)
    writer.close()
    return path


def found(paths: Sequence[Path], numbers: Iterable[int], retry_errors: bool = False) -> list[Completion | None]:
    """What an index of journals has for the keys of some numbers."""
    index = JournalIndex(paths, retry_errors)
    places = index.find(np.array([key(number) for number in numbers], dtype=f"S{KEY_BYTES}")).tolist()
    return [None if place < 0 else decode(next(iter(index.read(np.array([place]))))) for place in places]


TEXT = st.text(st.characters())
LOGPROB = st.floats(-9999, 0)
LOGPROBS = st.none() | st.lists(
    st.tuples(LOGPROB, st.lists(st.tuples(st.integers(0, 2**31 - 1), LOGPROB), max_size=3).map(tuple)), max_size=3
).map(tuple)
SAMPLE = st.builds(
    Sample,
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    text=TEXT,
    finish_reason=st.sampled_from(["stop", "length"]),
    logprobs=LOGPROBS,
)
COMPLETION = st.builds(
    Completion,
    key=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    row=st.integers(0, 2**40),
    id=st.integers() | TEXT,
    token_ids=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
    text=st.none() | TEXT,
    finish_reason=st.sampled_from(["stop", "length", "error"]),
    error=st.none() | st.fixed_dictionaries({"kind": TEXT, "message": TEXT}),
    logprobs=LOGPROBS,
    others=st.lists(SAMPLE, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(COMPLETION)
@example(completion(1, "two\nlines\r\n\u2028\u2029\x85"))
@example(completion(1, "half a pair: \ud800"))
@example(completion(1, '"error":null}\n'))
def test_a_record_is_one_line_that_comes_back_as_it_was(given_completion: Completion) -> None:
    record = encode(given_completion)
    assert record.isascii()
    assert record.splitlines(keepends=True) == [record]
    assert decode(record) == given_completion


OLD = (
    b'{"crc":"129b191d","key":"00000000000000000000000000000001","row":1,"id":"id1","finish_reason":"stop",'
    b'"token_ids":[1,2,1],"text":"text","error":null}\n'
)
"""A record as it was before there were samples and log probabilities."""


def test_a_record_of_the_first_journals_is_read() -> None:
    assert decode(OLD) == completion(1)


def test_a_completion_without_samples_is_written_as_in_the_first_journals() -> None:
    assert encode(completion(1)) == OLD


@pytest.mark.parametrize(("error", "count"), [(None, 1), (FAILED, 0)])
def test_a_completion_of_several_samples_is_told_from_an_error(
    tmp_path: Path, error: dict[str, str] | None, count: int
) -> None:
    other = Sample((3,), "other", "length", ((-0.5, ((3, -0.5),)),))
    one = Completion(key(1), 1, 1, (1,), None if error else "a", "stop", error, ((-1.0, ()),), (other,))
    index = JournalIndex([written(tmp_path / "j", [one])], retry_errors=True)
    assert len(index) == count


def test_a_record_with_a_wrong_checksum_is_no_completion() -> None:
    with pytest.raises(ValueError, match="the record's checksum is wrong"):
        decode(encode(completion(1)).replace(b'"text":"text"', b'"text":"tixt"'))


def test_completions_are_found_by_their_keys(tmp_path: Path) -> None:
    path = written(tmp_path / "j", map(completion, range(5)))
    assert found([path], [3, 0, 9]) == [completion(3), completion(0), None]


def test_completions_are_found_over_all_journals(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(number), [completion(number)]) for number in range(3)]
    assert found(paths, [2, 0, 1]) == [completion(2), completion(0), completion(1)]


@pytest.mark.parametrize("odd", [bytes(KEY_BYTES), b"k" * 15 + b"\0", b"\0" * 15 + b"k", b"\n" * KEY_BYTES])
def test_a_key_is_found_whatever_its_bytes(tmp_path: Path, odd: bytes) -> None:
    path = written(tmp_path / "j", [completion(1), Completion(odd, 0, 0, (), "", "stop")])
    assert JournalIndex([path]).find(np.array([odd], dtype=f"S{KEY_BYTES}")).tolist() != [-1]


def test_in_an_index_without_journals_nothing_is_found() -> None:
    assert found([], [1, 2]) == [None, None]


def test_an_index_counts_a_key_once(tmp_path: Path) -> None:
    assert len(JournalIndex([written(tmp_path / "j", map(completion, (1, 2, 1)))])) == 2


def test_the_first_record_of_a_journal_wins(tmp_path: Path) -> None:
    path = written(tmp_path / "j", [completion(1, "first"), completion(1, "second")])
    assert found([path], [1]) == [completion(1, "first")]


def test_the_record_of_the_first_journal_wins(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, [completion(1, name)]) for name in ("zero", "one")]
    assert found(paths, [1]) == [completion(1, "zero")]


def test_a_completion_goes_before_an_earlier_error(tmp_path: Path) -> None:
    paths = [written(tmp_path / "0", [failure(1)]), written(tmp_path / "1", [completion(1)])]
    assert found(paths, [1]) == [completion(1)]


def test_an_error_counts_where_there_is_no_completion(tmp_path: Path) -> None:
    assert found([written(tmp_path / "j", [failure(1)])], [1]) == [failure(1)]


def test_an_error_does_not_count_when_errors_are_retried(tmp_path: Path) -> None:
    path = written(tmp_path / "j", [failure(1), completion(2)])
    assert found([path], [1, 2], retry_errors=True) == [None, completion(2)]


@settings(deadline=None)
@given(bytes_left=st.integers(0, len(encode(completion(2))) - 1))
def test_a_torn_last_record_is_dropped_and_no_other(tmp_path_factory: pytest.TempPathFactory, bytes_left: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "j"
    path.write_bytes(encode(completion(0)) + encode(completion(1)) + encode(completion(2))[:bytes_left])
    assert found([path], [0, 1, 2]) == [completion(0), completion(1), None]
    assert JournalIndex([path]).damages == []


@pytest.mark.parametrize(("bytes_left", "torn"), [(0, 0), (1, 1), (len(encode(completion(2))) - 1, 1)])
def test_of_a_torn_record_the_log_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bytes_left: int, torn: int
) -> None:
    path = tmp_path / "j"
    path.write_bytes(encode(completion(0)) + encode(completion(2))[:bytes_left])
    with caplog.at_level(logging.INFO):
        JournalIndex([path])
    assert caplog.text.count("j:2: the last record is torn") == torn


@settings(deadline=None)
@given(at=st.integers(0, len(encode(completion(1))) - 2), flipped=st.integers(1, 255))
def test_a_record_with_any_byte_changed_is_reported_and_not_found(
    tmp_path_factory: pytest.TempPathFactory, at: int, flipped: int
) -> None:
    record = bytearray(encode(completion(1)))
    record[at] ^= flipped
    path = tmp_path_factory.mktemp("damaged") / "j"
    path.write_bytes(encode(completion(0)) + record + encode(completion(2)))
    assert found([path], [0, 1, 2]) == [completion(0), None, completion(2)]
    said = str(JournalIndex([path]).damages[0])
    assert [word for word in (f"{path}:2", "checksum", "generated again") if word not in said] == []


def test_a_record_that_is_damaged_in_one_journal_is_found_in_another(tmp_path: Path) -> None:
    damaged = tmp_path / "0"
    damaged.write_bytes(b"{}\n")
    assert found([damaged, written(tmp_path / "1", [completion(1)])], [1]) == [completion(1)]


def test_appending_says_where_each_record_stands(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "j")
    places = [place for batch in ([0, 1], [2]) for place in writer.append(map(completion, batch))]
    writer.close()
    data = (tmp_path / "j").read_bytes()
    assert [data[at : at + length] for at, length in places] == [encode(completion(number)) for number in range(3)]


def test_what_was_appended_can_be_read_before_the_journal_is_closed(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "j")
    writer.append([completion(1)])
    assert found([tmp_path / "j"], [1]) == [completion(1)]
    writer.close()


def test_a_journal_without_completions_is_no_file(tmp_path: Path) -> None:
    JournalWriter(tmp_path / "j").close()
    assert not (tmp_path / "j").exists()


def test_a_journal_file_is_never_opened_again(tmp_path: Path) -> None:
    path = written(tmp_path / "j", [completion(1)])
    with pytest.raises(JournalError, match="File exists"):
        JournalWriter(path).append([completion(2)])
    assert path.read_bytes() == encode(completion(1))


FULL_DISK = """
import resource, sys
from pathlib import Path
from hpc.output.journal import JournalError, JournalWriter
from tests.output.test_journal import completion

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond it takes a part, then EFBIG
writer, number = JournalWriter(Path(sys.argv[1])), 0
try:
    while number < 1000:
        writer.append([completion(number), completion(number + 1)])
        number += 2
except JournalError as error:
    print(number)
    sys.exit(str(error))
"""


def test_a_disk_that_takes_no_more_is_said_and_what_was_written_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ended = finish(start(["-c", FULL_DISK, str(path)], PYTHONPATH=str(Path(__file__).parents[2])))
    acknowledged = int(ended.out)
    assert "cannot write the journal (File too large)" in ended.err
    assert "run the same command again" in ended.err
    assert path.stat().st_size == 1000
    assert acknowledged > 0
    assert found([path], range(acknowledged)) == list(map(completion, range(acknowledged)))


def test_the_key_stands_where_a_reader_without_json_finds_it() -> None:
    record = encode(completion(7))
    assert list(json.loads(record))[:2] == ["crc", "key"]
