"""Find and check the files of a model directory: weights, headers of tensors, tokenizer.

It reads headers only, so that faults are found before anything is loaded. It imports neither torch nor transformers.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hpc.exit import Refusal

POINTER = b"version https://git-lfs"
"""The first bytes of a file that Git LFS leaves in the place of a large one."""

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights, in the order in which transformers looks for them."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
_VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".spm", ".vocab")
_SMALL_SUFFIXES = (".json", ".py", ".jinja", *_VOCABULARY_SUFFIXES)
"""Files beside the weights: configuration, code, chat template, vocabulary."""


class Tensor(NamedTuple):
    """The entry of a tensor in the header of a safetensors file."""

    dtype: str
    """As safetensors spells it: "F32", "BF16", …"""
    shape: tuple[int, ...]


def check(folder: Path) -> None:
    """Raise `Refusal`, naming the file and the way out, for a folder that lacks a part of a model."""
    if (folder / "adapter_config.json").exists():
        base = (_read_json(folder, "adapter_config.json") or {}).get("base_model_name_or_path") or "its base model"
        raise Refusal(
            f'model "{folder}" has an adapter (adapter_config.json), which is not loaded: merge it into {base} '
            "(merge_and_unload of peft, then save_pretrained of model and tokenizer) and name the result, or "
            "remove adapter_config.json if that is done"
        )
    if not (folder / "config.json").exists():
        raise Refusal(f'model "{folder}" is a folder without a config.json; name the folder that has the weights')
    for path in small_files(folder):
        refuse_pointer(path)
    if _read_json(folder, "config.json") is None:
        raise Refusal(f'model "{folder}": config.json holds no object of JSON; copy or download it again')
    for path in weight_files(folder):
        _check_weights(path)
    _check_tokenizer(folder)


def small_files(folder: Path) -> list[Path]:
    """Return the files beside the weights that a model is made from, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in _SMALL_SUFFIXES and path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers takes the weights from, sorted.

    Raises `Refusal` if there are none, or if one that an index names is not there.
    """
    for name in _NAMES:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix != ".json":
            return [path]
        refuse_pointer(path)
        parts = (_read_json(folder, name) or {}).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise Refusal(f'model "{folder}": {name} has no "weight_map" that names files; copy or download it again')
        files = sorted({folder / str(part) for part in parts.values()})
        if gone := [file.name for file in files if not file.exists()]:
            raise Refusal(
                f'model "{folder}": {name} names {len(files)} files of weights, and {len(gone)} of them '
                f"({_first(gone)}) are not there; copy or download the rest"
            )
        return files
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".h5")]
    raise Refusal(
        f'model "{folder}" has no weights: none of {", ".join(_NAMES)} is there'
        + (f", but {_first(others)}" if others else "")
        + "; name a folder that save_pretrained of transformers has written, or copy the weights into this one"
    )


def tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name; raise `Refusal` if it is not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else None
            found = {
                name: entry for name, entry in (header if header is not None else {}).items() if name != "__metadata__"
            }
            end = 8 + length + max((int(entry["data_offsets"][1]) for entry in found.values()), default=0)
            result = {name: Tensor(str(entry["dtype"]), tuple(entry["shape"])) for name, entry in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(f'the weights "{path}" are no safetensors file; copy or download it again') from error
    if size < end:
        raise Refusal(
            f'the weights "{path}" are cut off: it has {size:,} bytes, and should have {end:,} or more; copy or '
            "download it again"
        )
    if size > end:
        raise Refusal(
            f'the weights "{path}" have {size - end:,} bytes that its header does not name; copy or download it again'
        )
    return result


def _check_weights(path: Path) -> None:
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        tensors(path)
        return
    with open(path, "rb") as file:
        start = file.read(4)
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):  # the directory is at the end
        raise Refusal(f'the weights "{path}" are cut off; copy or download it again')


def _check_tokenizer(folder: Path) -> None:
    if any((folder / name).exists() for name in _VOCABULARIES):
        return
    if any(path.suffix in _VOCABULARY_SUFFIXES for path in folder.iterdir()):
        return
    config = _read_json(folder, "tokenizer_config.json") or {}
    if "auto_map" not in config and config.get("tokenizer_class") != "ByT5Tokenizer":  # bytes need no vocabulary
        raise Refusal(
            f'model "{folder}" has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json and vocab.txt is '
            "there; copy the tokenizer's files of the model that it was made from into it"
        )


def refuse_pointer(path: Path) -> None:
    """Raise `Refusal` for a file that Git LFS has not fetched."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise Refusal(
                f'"{path}" is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull` in a clone of '
                "the model, or let `scattergen fetch` with the hub's id store the model"
            )


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / name).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _first(names: list[str], count: int = 3) -> str:
    """Write the first few names."""

    def parts() -> Iterator[str]:
        yield from names[:count]
        if len(names) > count:
            yield "…"

    return ", ".join(parts())
