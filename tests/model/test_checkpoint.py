"""A model directory that is not whole is refused, naming the file and the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.model.checkpoint import POINTER, Tensor, check, tensors, weight_files

POINTED = POINTER + b"/spec/v1\noid sha256:00\nsize 12345678\n"


def weights(**shapes: tuple[int, ...]) -> bytes:
    """The bytes of a safetensors file of bytes."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in one file of weights."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "tokenizer.json").write_text("{}")
    (made / "model.safetensors").write_bytes(weights(w=(3, 4)))
    return made


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A model in two files of weights."""
    (folder / "model.safetensors").unlink()
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name, file in names.items():
        (folder / file).write_bytes(weights(**{name: (5,)}))
    return folder


def test_a_whole_model_is_taken(folder: Path) -> None:
    check(folder)


def test_a_whole_model_in_parts_is_taken(sharded: Path) -> None:
    check(sharded)


def test_weights_are_the_parts_that_the_index_names(sharded: Path) -> None:
    assert [path.name for path in weight_files(sharded)] == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


def test_weights_of_safetensors_go_before_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


def test_tensors_have_the_names_and_shapes_of_the_header(folder: Path) -> None:
    assert tensors(folder / "model.safetensors") == {"w": Tensor("U8", (3, 4))}


def rewritten(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def gone(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewritten("model.safetensors", POINTED), r'model\.safetensors" is a pointer of Git LFS.*git lfs pull'),
        (rewritten("tokenizer.json", POINTED), r'tokenizer\.json" is a pointer of Git LFS'),
        (rewritten("config.json", POINTED), r'config\.json" is a pointer of Git LFS'),
        (rewritten("config.json", b'{"model_type": "ll'), "config.json holds no object of JSON; copy"),
        (rewritten("config.json", b"[]"), "config.json holds no object of JSON; copy"),
        (gone("config.json"), "is a folder without a config.json; name the folder that has the weights"),
        (rewritten("model.safetensors", b""), "are cut off: it has 0 bytes, .*; copy or download it again"),
        (rewritten("model.safetensors", weights(w=(9,))[:30]), "are cut off: it has 30 bytes, .*; copy"),
        (rewritten("model.safetensors", weights(w=(9,))[:-1]), "are cut off: it has .* and should have .*; copy"),
        (rewritten("model.safetensors", weights(w=(9,)) + b"!"), "have 1 bytes that its header does not name; copy"),
        (rewritten("model.safetensors", b"\x02" + bytes(7) + b"{]"), "are no safetensors file; copy"),
        (rewritten("model.safetensors", b"\x02" + bytes(7) + b"[]"), "are no safetensors file; copy"),
        (gone("model.safetensors"), "has no weights: none of .*; name a folder"),
        (gone("tokenizer.json"), "has no tokenizer: none of .* is there; copy"),
        (rewritten("adapter_config.json", b'{"base_model_name_or_path": "me/base"}'), "an adapter .* into me/base"),
        (rewritten("adapter_config.json", b"{"), "an adapter .* into its base model"),
    ],
    ids=range(16),
)
def test_what_is_not_all_of_a_model_is_refused(folder: Path, change: Callable[[Path], object], said: str) -> None:
    change(folder)
    with pytest.raises(Refusal, match=said):
        check(folder)


def test_an_adapter_alone_is_refused_as_one(folder: Path) -> None:
    gone("config.json", "model.safetensors", "tokenizer.json")(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"has an adapter .* merge it into its base model"):
        check(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (gone("model-2-of-2.safetensors"), r"names 2 files .*, and 1 of them \(model-2-of-2.safetensors\) are not"),
        (rewritten("model-2-of-2.safetensors", POINTED), r'model-2-of-2\.safetensors" is a pointer of Git LFS'),
        (rewritten("model-2-of-2.safetensors", weights(b=(5,))[:-2]), "model-2-of-2.safetensors.* are cut off"),
        (rewritten("model.safetensors.index.json", POINTED), r'index\.json" is a pointer of Git LFS'),
        (rewritten("model.safetensors.index.json", b"{}"), 'has no "weight_map" that names files'),
        (rewritten("model.safetensors.index.json", b"{"), 'has no "weight_map" that names files'),
    ],
    ids=range(6),
)  # fmt: skip
def test_parts_that_are_not_whole_are_refused(sharded: Path, change: Callable[[Path], object], said: str) -> None:
    change(sharded)
    with pytest.raises(Refusal, match=said):
        check(sharded)


@pytest.mark.parametrize(
    ("data", "said"),
    [(POINTED, "is a pointer of Git LFS"), (b"", "are cut off"), (b"PK\x03\x04 and the rest is lost", "are cut off")],
    ids=["pointer", "empty", "cut"],
)
def test_pickles_that_are_not_whole_are_refused(folder: Path, data: bytes, said: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(Refusal, match=said):
        check(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "spiece.model", "qwen.tiktoken"])
def test_every_kind_of_vocabulary_is_one(folder: Path, name: str) -> None:
    (folder / "tokenizer.json").rename(folder / name)
    check(folder)


def test_a_tokenizer_of_its_own_code_needs_no_known_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    check(folder)
