"""A folder stands for its corpus files where it is clear which they are."""

import json
from pathlib import Path

import pytest

from hpc.corpus.errors import CorpusError
from hpc.corpus.files import find_files


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def names_of(*patterns: Path) -> list[str]:
    return [path.name for path in find_files([str(pattern) for pattern in patterns])]


def test_a_folder_stands_for_its_files_in_sorted_order(tmp_path: Path) -> None:
    assert names_of(folder_of(tmp_path, "b.parquet", "a.parquet")) == ["a.parquet", "b.parquet"]


def test_what_is_no_corpus_file_by_its_name_is_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jsonl.gz", "README.md", ".hidden.jsonl", "_old.jsonl", "inner/b.jsonl")
    assert names_of(tmp_path) == ["a.jsonl.gz"]


def test_json_and_jsonl_are_one_kind(tmp_path: Path) -> None:
    assert names_of(folder_of(tmp_path, "a.json", "b.jsonl")) == ["a.json", "b.jsonl"]


def test_a_folder_of_several_kinds_is_refused_with_a_glob(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r'csv and parquet files; say which, .*/\*\.csv"'):
        names_of(folder_of(tmp_path, "a.csv", "b.parquet"))


def test_a_folder_without_corpus_files_is_refused_with_the_folder_within(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r'folder without a file .* for example ".*/data"'):
        names_of(folder_of(tmp_path, "README.md", "data/a.parquet"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="folder without a file"):
        names_of(tmp_path)


def test_a_data_set_stands_for_its_files_in_the_order_of_its_state(tmp_path: Path) -> None:
    folder_of(tmp_path / "set", "b.arrow", "a.arrow", "cache-1.arrow")
    (tmp_path / "set/state.json").write_text(
        json.dumps({"_data_files": [{"filename": f} for f in ("b.arrow", "a.arrow")]})
    )
    assert names_of(tmp_path / "set") == ["b.arrow", "a.arrow"]
    assert names_of(tmp_path / "s*") == ["b.arrow", "a.arrow"]


def test_a_data_set_that_misses_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "b.arrow"}]}))
    with pytest.raises(CorpusError, match=r"b\.arrow is missing; save it again"):
        names_of(tmp_path)


@pytest.mark.parametrize("state", ["{", "{}", "[]", '{"_data_files": [5]}'])
def test_a_data_set_whose_state_is_broken_is_refused(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(CorpusError, match="no whole data set"):
        names_of(tmp_path)


def test_splits_are_named_and_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(CorpusError, match=r'has the splits train, test; say which: ".*/train"'):
        names_of(tmp_path)
