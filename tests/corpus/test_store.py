"""The token store holds what reading found, refuses rows with one id, and is there whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.corpus.formats import Block
from hpc.corpus.store import StoreError, StoreWriter, TokenStore, parse_request, request_line
from hpc.request import KEY_BYTES, completion_key
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.stores import make_checker, read_store


def stored(tmp_path: Path, *rows: Any, **settings: Any) -> TokenStore:
    return read_store(tmp_path, [write_corpus(tmp_path / "corpus.jsonl", rows)], **settings)


def refused(tokens: TokenStore) -> dict[int, str]:
    return {row: error["kind"] for row, error in tokens.errors()}


def test_a_later_row_with_the_same_id_is_refused(tmp_path: Path) -> None:
    tokens = stored(tmp_path, {"id": "x", "prompt": "a"}, {"id": "y", "prompt": "b"}, {"id": "x", "prompt": "c"})
    assert (refused(tokens), tokens.good.tolist()) == ({2: "duplicate_id"}, [True, True, False])


def test_every_later_row_with_the_same_id_is_refused(tmp_path: Path) -> None:
    assert list(refused(stored(tmp_path, *[{"id": "x", "prompt": "a"}] * 4))) == [1, 2, 3]


def test_a_refused_duplicate_names_its_id_and_both_places(tmp_path: Path) -> None:
    [(_, error)] = stored(tmp_path, {"id": "é", "prompt": "a"}, "", {"id": "é", "prompt": "c"}).errors()
    assert error["message"].startswith('corpus.jsonl:3: "id" is "é", as at corpus.jsonl:1 already; ids must differ')


def test_an_id_that_is_the_index_of_a_later_row_without_one_refuses_that_row(tmp_path: Path) -> None:
    assert refused(stored(tmp_path, {"id": 1, "prompt": "a"}, {"prompt": "b"})) == {1: "duplicate_id"}


def test_an_id_that_is_the_index_of_an_earlier_row_without_one_is_refused(tmp_path: Path) -> None:
    assert refused(stored(tmp_path, {"prompt": "a"}, {"id": 0, "prompt": "b"})) == {1: "duplicate_id"}


def test_1_and_the_string_1_are_different_ids(tmp_path: Path) -> None:
    assert refused(stored(tmp_path, {"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"})) == {}


def test_1_and_the_string_1_are_refused_each_for_its_own_earlier_row(tmp_path: Path) -> None:
    rows = [{"id": identity, "prompt": "a"} for identity in (1, "1", "1", 1)]
    messages = [error["message"] for _, error in stored(tmp_path, *rows).errors()]
    assert [message[:54] for message in messages] == [
        'corpus.jsonl:3: "id" is "1", as at corpus.jsonl:2 alre',
        'corpus.jsonl:4: "id" is 1, as at corpus.jsonl:1 alread',
    ]


def test_a_row_that_is_refused_for_another_reason_keeps_that_one(tmp_path: Path) -> None:
    assert refused(stored(tmp_path, {"id": "x", "prompt": "a"}, {"id": "x", "prompt": ""})) == {1: "empty"}


@pytest.mark.parametrize("broken", ['{"id": 0', {"id": 0, "prompt": ""}, {"id": 0.5, "prompt": "a"}, {"prompt": ""}])
def test_a_refused_row_has_no_claim_on_an_id(tmp_path: Path, broken: Any) -> None:
    tokens = stored(tmp_path, broken, {"id": 0, "prompt": "a"}, {"id": 0, "prompt": "b"}, broken)
    assert [row for row, kind in refused(tokens).items() if kind == "duplicate_id"] == [2]
    assert tokens.good.tolist() == [False, True, False, False]


def test_duplicates_are_found_over_blocks_and_files(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one.jsonl", [{"id": n, "prompt": "a"} for n in range(20)])
    two = write_corpus(tmp_path / "two.jsonl", [{"id": 7, "prompt": "a"}])
    [(row, error)] = read_store(tmp_path, [one, two], block_bytes=30).errors()
    assert (row, error["message"][:47]) == (20, 'two.jsonl:1: "id" is 7, as at one.jsonl:8 alrea')


def test_errors_come_by_row_whatever_they_are(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "a"}, "{", {"id": "x", "prompt": "a"}, "[]", {"id": "x", "prompt": "a"}, "{"]
    assert list(refused(stored(tmp_path, *rows)).items()) == [
        (1, "not_json"),
        (2, "duplicate_id"),
        (3, "not_object"),
        (4, "duplicate_id"),
        (5, "not_json"),
    ]


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 16])
def test_prompts_come_back_whatever_the_blocks(tmp_path: Path, block_bytes: int) -> None:
    texts = ["a", "bcd", "", "éé", "x" * 100]
    tokens = stored(tmp_path, *[{"prompt": text} for text in texts], "{", block_bytes=block_bytes)
    expected = [list(text.encode()) for text in (*texts, "")]
    assert [tokens.tokens(row).tolist() for row in range(tokens.num_rows)] == expected


def test_lengths_are_those_of_the_prompts(tmp_path: Path) -> None:
    tokens = stored(tmp_path, {"prompt": "a"}, "{", {"prompt": "bcd"})
    assert tokens.prompt_tokens.tolist() == [1, 0, 3]


def test_lengths_of_some_rows_are_those_of_their_prompts(tmp_path: Path) -> None:
    tokens = stored(tmp_path, {"prompt": "a"}, {"prompt": "bc"}, {"prompt": "bcd"})
    assert tokens.prompt_lengths(np.array([2, 0])).tolist() == [3, 1]


def test_a_request_comes_back_as_it_was_asked(tmp_path: Path) -> None:
    defaults = SamplingParams(max_new_tokens=9, seed=4)
    row = {"id": "é", "prompt": "abc", "sampling": {"temperature": 0.5, "stop": ["x"], "stop_token_ids": [3]}}
    tokens = stored(tmp_path, {"prompt": "z"}, row, sampling=defaults)
    line = tokens.request_line(1)
    request = parse_request(line, 1, tokens.tokens(1), tokens.key(1), 8, defaults)
    sampling = SamplingParams(max_new_tokens=9, seed=4, temperature=0.5, stop=("x",), stop_token_ids=(3,))
    assert (request.id, request.token_ids.tolist(), request.sampling) == ("é", list(b"abc"), sampling)
    assert request.key == completion_key(request.token_ids, sampling, "é")


def test_new_tokens_are_as_clamped_to_the_context(tmp_path: Path) -> None:
    tokens = stored(tmp_path, {"prompt": "a" * 2000}, {"prompt": "a"}, sampling=SamplingParams(max_new_tokens=100))
    assert tokens.new_tokens.tolist() == [48, 100]


def test_rows_with_equal_prompts_share_a_key(tmp_path: Path) -> None:
    tokens = stored(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    assert (tokens.key(0) == tokens.key(2), tokens.key(0) == tokens.key(1)) == (True, False)


@pytest.mark.parametrize("key", [bytes(KEY_BYTES), b"k" * 15 + b"\0", b"\0" * 15 + b"k"])
def test_a_key_keeps_its_zero_bytes(tmp_path: Path, key: bytes) -> None:
    block = Block(0, "corpus.jsonl", "jsonl", 1, 0, 1, b'{"prompt": "a"}')
    rows = make_checker().check_block(block)
    writer = StoreWriter(tmp_path)
    writer.append(block, {**rows, "keys": np.frombuffer(key, dtype=np.uint8).reshape(1, KEY_BYTES)})
    assert writer.finish({}, []).key(0) == key


def test_inputs_and_digests_come_back(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    writer.finish({"limit": None, "files": [["a", 1]]}, ["0f"])
    tokens = TokenStore(tmp_path)
    assert (tokens.inputs, tokens.digests) == ({"limit": None, "files": [["a", 1]]}, ["0f"])


def test_a_store_without_rows_can_be_opened(tmp_path: Path) -> None:
    tokens = stored(tmp_path, "")
    assert (tokens.num_rows, len(tokens.keys), tokens.good.tolist(), list(tokens.errors())) == (0, 0, [], [])


def test_a_store_of_refused_rows_alone_can_be_opened(tmp_path: Path) -> None:
    tokens = stored(tmp_path, "{", "[]")
    assert (tokens.good.tolist(), tokens.prompt_tokens.tolist()) == ([False, False], [0, 0])


def test_a_folder_without_a_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no complete token store .* run the job again"):
        TokenStore(tmp_path)


def test_a_store_that_is_being_written_is_no_store(tmp_path: Path) -> None:
    block = Block(0, "corpus.jsonl", "jsonl", 1, 0, 1, b'{"prompt": "a"}')
    writer = StoreWriter(tmp_path)
    writer.append(block, make_checker().check_block(block))
    with pytest.raises(StoreError):
        TokenStore(tmp_path)
    writer.close()


def test_a_writer_that_gives_up_leaves_nothing(tmp_path: Path) -> None:
    StoreWriter(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_gives_up_leaves_the_earlier_store(tmp_path: Path) -> None:
    stored(tmp_path, {"prompt": "abc"})
    StoreWriter(tmp_path).close()
    assert TokenStore(tmp_path).tokens(0).tolist() == list(b"abc")


def test_closing_a_finished_writer_leaves_its_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    writer.finish({"a": 1}, [])
    writer.close()
    assert TokenStore(tmp_path).inputs == {"a": 1}


def test_a_later_store_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    stored(tmp_path, {"prompt": "abc"}, "{")
    stored(tmp_path, {"prompt": "x"})
    tokens = TokenStore(tmp_path)
    assert (tokens.num_rows, tokens.tokens(0).tolist(), list(tokens.errors())) == (1, list(b"x"), [])


@pytest.mark.parametrize(
    ("name", "bytes_left"), [("tokens.i32", 4), ("keys.b16", 16), ("requests.jsonl", 10), ("tokens.i32", 0)]
)
def test_a_store_with_a_shortened_file_is_refused(tmp_path: Path, name: str, bytes_left: int) -> None:
    stored(tmp_path, {"prompt": "abc"}, {"prompt": "def"})
    with open(tmp_path / name, "r+b") as file:
        file.truncate(bytes_left)
    with pytest.raises(StoreError, match="run the job again"):
        TokenStore(tmp_path)


def test_a_request_line_says_only_what_differs() -> None:
    assert json.loads(request_line(3, {})) == {"id": 3}
