"""A model is known by what is in it, and what is no model is refused."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.exit import Refusal
from hpc.model.find import Model, as_bound, find, resolve, user_cache
from hpc.model.identity import samples

HEADER = json.dumps({"w": {"dtype": "U8", "shape": [100_000], "data_offsets": [0, 100_000]}}).encode()
START = 8 + len(HEADER)
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + os.urandom(100_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"vocab_size": 9}')
    (made / "generation_config.json").write_text('{"eos_token_id": 2}')
    (made / "model.safetensors").write_bytes(WEIGHTS)
    (made / "tokenizer.json").write_text('{"vocab": {}}')
    (made / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "T"}')
    return made


def rewrite(name: str, data: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def flip(at: int) -> Callable[[Path], object]:
    data = bytearray(WEIGHTS)
    data[START + at] ^= 1
    return rewrite("model.safetensors", bytes(data))


def changed(folder: Path, change: Callable[[Path], object]) -> set[str]:
    """The names of what tells the model apart from itself before the change."""
    before = resolve(str(folder))
    change(folder)
    after = resolve(str(folder))
    return {name for name in ("revision", "tokenizer", "template") if getattr(before, name) != getattr(after, name)}


def test_a_folder_is_found_by_its_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve("model").path == folder


def test_a_copy_of_a_model_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    one, other = resolve(str(folder)), resolve(str(copy))
    assert other == Model(copy, one.revision, one.tokenizer, one.template)


@pytest.mark.parametrize(
    "change",
    [
        *[flip(at) for at in (0, 1, 4096, 33_333, 50_000, 99_998, 99_999)],
        rewrite("config.json", '{"vocab_size": 10}'),
        rewrite("generation_config.json", '{"eos_token_id": 3}'),
        rewrite("special_tokens_map.json", "{}"),
        rewrite("modeling_own.py", "import torch"),
        lambda folder: (folder / "generation_config.json").unlink(),
    ],
)
def test_another_configuration_or_weight_is_another_revision(folder: Path, change: Callable[[Path], object]) -> None:
    assert changed(folder, change) == {"revision"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (rewrite("tokenizer.json", '{"vocab": {"a": 0}}'), {"tokenizer"}),
        (rewrite("merges.txt", "a b"), {"tokenizer"}),
        (rewrite("tokenizer_config.json", '{"eos_token": "<e>", "chat_template": "T"}'), {"tokenizer"}),
        (rewrite("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": "U"}'), {"template"}),
        (rewrite("tokenizer_config.json", '{"eos_token": "</s>"}'), {"template"}),
        (rewrite("chat_template.jinja", "U"), {"template"}),
    ],
)
def test_another_tokenizer_or_template_is_told_apart(
    folder: Path, change: Callable[[Path], object], names: set[str]
) -> None:
    assert changed(folder, change) == names


@pytest.mark.parametrize(
    "change",
    [
        rewrite("README.md", "read me"),
        rewrite("consolidated.safetensors", "what transformers does not load"),
        rewrite("tokenizer_config.json", '{"chat_template":"T","eos_token":"</s>"}'),
        lambda folder: os.utime(folder / "model.safetensors", (0, 0)),
    ],
)
def test_what_changes_no_token_changes_nothing(folder: Path, change: Callable[[Path], object]) -> None:
    assert changed(folder, change) == set()


def test_weights_that_an_index_names_are_told_apart(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    rewrite("model.safetensors.index.json", '{"weight_map": {"w": "part.safetensors"}}')(folder)
    assert changed(folder, lambda _: (folder / "part.safetensors").write_bytes(WEIGHTS[:-1] + b"!")) == {"revision"}


def test_weights_of_pickles_are_told_apart(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    rewrite("pytorch_model.bin", b"one")(folder)
    assert changed(folder, rewrite("pytorch_model.bin", b"two")) == {"revision"}


def test_a_model_is_found_where_it_is_resolved(folder: Path, tmp_path: Path) -> None:
    assert find(str(folder), tmp_path / "cache") == resolve(str(folder), tmp_path / "cache").path


def test_a_run_that_knows_its_model_by_samples_goes_on_if_they_are_the_same(folder: Path) -> None:
    known = {"model": samples(folder)}
    assert as_bound(resolve(str(folder)), {"model": "new", "dtype": "float32"}, known) == {**known, "dtype": "float32"}


def test_a_run_that_knows_its_model_by_other_samples_does_not_go_on(folder: Path) -> None:
    known = {"model": samples(folder)}
    flip(0)(folder)
    assert as_bound(resolve(str(folder)), {"model": "new"}, known) == {"model": "new"}


@pytest.mark.parametrize("known", [{}, {"model": "blake2b:0"}, {"model": "hub:me/mine@0"}])
def test_a_run_that_knows_its_model_otherwise_is_compared_by_that(folder: Path, known: dict[str, str]) -> None:
    assert as_bound(resolve(str(folder)), {"model": "new"}, known) == {"model": "new"}


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"is a folder without a config\.json; name the folder that has the weights"):
        resolve(str(tmp_path))


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"missing\.gguf\": no such file"):
        resolve(str(tmp_path / "missing.gguf"))


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(Refusal, match=r"is neither a folder nor a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


def test_a_path_that_is_nothing_is_refused_without_a_word_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(
        Refusal, match=r'missing": no such folder; --model is a folder with config\.json, a \.gguf file'
    ):
        resolve(str(tmp_path / "missing"))


def test_an_id_that_the_hub_does_not_give_is_refused() -> None:
    with pytest.raises(
        Refusal, match=r"is no folder or \.gguf file here, and the hub did not give it: (.|\n)*`scattergen fetch "
    ):
        resolve("not//an-id")


@pytest.fixture
def gguf(tmp_path: Path, folder: Path) -> dict[str, Any]:
    """A file, and a cache that has its conversion already."""
    file = tmp_path / "small.gguf"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    converted = tmp_path / "cache" / "models" / f"small-{digest[:16]}-1"
    shutil.copytree(folder, converted)
    return {"file": file, "cache": tmp_path / "cache", "converted": converted, "digest": digest}


def test_a_gguf_file_is_found_where_it_was_converted(gguf: dict[str, Any]) -> None:
    assert resolve(str(gguf["file"]), gguf["cache"]).path == gguf["converted"]


def test_a_gguf_file_is_known_by_its_sha_256(gguf: dict[str, Any]) -> None:
    assert resolve(str(gguf["file"]), gguf["cache"]).revision == f"sha256:{gguf['digest']}"


def test_a_gguf_file_has_the_tokenizer_of_its_conversion(gguf: dict[str, Any]) -> None:
    converted = resolve(str(gguf["converted"]))
    assert resolve(str(gguf["file"]), gguf["cache"]).tokenizer == converted.tokenizer


def test_the_cache_is_below_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/scattergen")


def test_the_cache_is_in_the_home_folder_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_cache() == Path("/home/someone/.cache/scattergen")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"weights")
    with pytest.raises(Refusal, match="cannot be converted"):
        resolve(str(tmp_path / "small.gguf"), tmp_path / "cache")


def test_a_gguf_file_that_git_lfs_has_not_fetched_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678\n")
    with pytest.raises(Refusal, match=r'small\.gguf" is a pointer of Git LFS'):
        resolve(str(tmp_path / "small.gguf"), tmp_path / "cache")
