"""Find the model that a job names, and say by what it is known. Loads nothing.

A directory is known by a fingerprint, a GGUF file by its SHA-256, a hub model by its commit.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from hpc.job import Refusal

LOGGER = logging.getLogger(__name__)

_CONVERSION = 1
"""Counts the ways in which GGUF files were converted, so that no old conversion is taken for a new one."""

_SAMPLES, _SAMPLE_BYTES = 32, 4096
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class Model:
    """A model directory and what identifies it."""

    path: Path
    revision: str
    tokenizer: str
    template: str


def resolve(model: str, cache: Path | None = None) -> Model:
    """Return the directory of a model directory, .gguf file or hub id; raise `Refusal` if there is none.

    A GGUF file is converted once, into `cache` (default: the user's), keyed by its SHA-256.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise Refusal(f'model "{model}" is a folder without a config.json; name the folder that has the weights')
        folder = path.absolute()
        revision = _fingerprint(folder)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise Refusal(f'model "{model}": no such file')
        folder, revision = _from_gguf(path, cache or user_cache())
    elif path.exists():
        raise Refusal(f'model "{model}" is neither a folder nor a .gguf file')
    else:
        folder, revision = _from_hub(model)
    return Model(folder, revision, *_tokenizer_hashes(folder))


def user_cache() -> Path:
    """Return the folder for what can be made again: below XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scattergen"


def _from_gguf(gguf: Path, cache: Path) -> tuple[Path, str]:
    digest = hashlib.sha256()
    with open(gguf, "rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    folder = cache / "models" / f"{gguf.stem}-{digest.hexdigest()[:16]}-{_CONVERSION}"
    if not (folder / "config.json").exists():
        from hpc.engine import load  # torch and transformers, for this once

        folder.parent.mkdir(parents=True, exist_ok=True)
        LOGGER.info("converting %s into %s, once: this takes a minute", gguf.name, folder)
        load.quiet()
        try:
            load.convert_gguf(gguf.absolute(), folder)
        except ValueError as error:  # not GGUF, or of an architecture that transformers does not read
            raise Refusal(f'model "{gguf}" cannot be converted: {error}') from error
    return folder, f"sha256:{digest.hexdigest()}"


def _from_hub(model: str) -> tuple[Path, str]:
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(model, ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack"])
        )
    except Exception as error:  # an id that is none, no network, no such model: the hub has many exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f'model "{model}" is no folder or .gguf file here, and the hub did not give it: {reason}. On a machine '
            f"with a way to the hub, `scattergen fetch {model}` stores it"
        ) from error
    return folder, f"hub:{model}@{folder.name}"


def _fingerprint(folder: Path) -> str:
    """Hash configuration, and of each weight file its name, size and samples of its bytes.

    Reading all of a large model would take minutes; a retrained model differs in nearly every byte.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name in ("config.json", "generation_config.json"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with open(path, "rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return f"directory:{digest.hexdigest()}"


def _tokenizer_hashes(folder: Path) -> tuple[str, str]:
    """Return hashes of the tokenizer's files and of the chat template."""
    tokenizer = hashlib.blake2b(digest_size=16)
    template = hashlib.blake2b(digest_size=16)
    for name in _TOKENIZER_FILES:
        path = folder / name
        if not path.exists():
            continue
        data = path.read_bytes()
        if name == "tokenizer_config.json":
            config = json.loads(data)
            template.update(json.dumps(config.pop("chat_template", None)).encode())
            data = json.dumps(config, sort_keys=True).encode()
        tokenizer.update(name.encode() + data)
    for path in sorted(folder.glob("chat_template*")):
        template.update(path.name.encode() + path.read_bytes())
    return tokenizer.hexdigest(), template.hexdigest()
