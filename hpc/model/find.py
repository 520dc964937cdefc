"""Find the model that a job names, and identify it. Loads nothing.

A directory is identified by a hash of its files, a GGUF file by its SHA-256, a hub model by its commit.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.exit import Refusal
from hpc.model import checkpoint, identity

LOGGER = logging.getLogger(__name__)


_CONVERSION = 1
"""Version of the conversion of GGUF files: raised when it changes, so that old conversions are not used."""


@dataclass(frozen=True)
class Model:
    """A model directory and what identifies it."""

    path: Path
    revision: str
    tokenizer: str
    template: str


def resolve(model: str, cache: Path | None = None) -> Model:
    """Return the directory of a model directory, .gguf file or hub id, and what identifies it.

    Raises `Refusal` if there is no model, or only a part of one. A GGUF file is converted once, into `cache` (default:
    the user's), keyed by its SHA-256.
    """
    cache = cache or user_cache()
    folder, revision = _find(model, cache)
    checkpoint.check(folder)
    if not revision:
        revision = identity.fingerprint(folder, cache)
    elif revision.startswith("hub:") and identity.is_edited(folder, cache):
        LOGGER.warning("%s was changed after it came from the hub", folder)
        revision += f"+{identity.fingerprint(folder, cache)}"
    return Model(folder, revision, *_tokenizer_hashes(folder))


def find(model: str, cache: Path | None = None) -> Path:
    """Return the directory of a model, without reading all of it; raise `Refusal` as `resolve` does."""
    folder, _ = _find(model, cache or user_cache())
    checkpoint.check(folder)
    return folder


def with_template(model: Model, template: str) -> Model:
    """Return a model as it is known with the chat template of a file in the place of its own, if one is named."""
    if not template:
        return model
    return replace(
        model, template=f"file:{hashlib.blake2b(read_template(template).encode(), digest_size=16).hexdigest()}"
    )


def read_template(file: str) -> str:
    """Return the chat template in a file; raise `Refusal` if it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Refusal(f'the chat template "{file}" cannot be read: {error}') from error


def as_bound(model: Model, bound: Mapping[str, str], earlier: Mapping[str, str]) -> dict[str, str]:
    """Return `bound`, with the model identified as in earlier attempts of the run.

    Runs of older versions identified a folder by samples of its bytes. A folder with the same samples keeps that name.
    """
    known = earlier.get("model", "")
    if known.startswith("directory:") and known == identity.samples(model.path):
        LOGGER.info(
            "this run knows its model by samples of the weights, which are the same; from now on by all of them"
        )
        return {**bound, "model": known}
    return dict(bound)


def _find(model: str, cache: Path) -> tuple[Path, str]:
    """Return the directory of a model and its revision; empty for a folder, whose files must be hashed for it."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.absolute(), ""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise Refusal(f'model "{model}": no such file')
        checkpoint.refuse_pointer(path)
        return _from_gguf(path, cache)
    if path.exists():
        raise Refusal(f'model "{model}" is neither a folder nor a .gguf file')
    if model.startswith((".", "/", "~")):
        raise Refusal(
            f'model "{model}": no such folder; --model is a folder with config.json, a .gguf file or a hub id, such as '
            "Qwen/Qwen3-0.6B"
        )
    return _from_hub(model)


def user_cache() -> Path:
    """Return the user's cache folder: below XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scattergen"


def _from_gguf(gguf: Path, cache: Path) -> tuple[Path, str]:
    [revision] = identity.hashes([gguf.absolute()], cache, "sha256")
    folder = cache / "models" / f"{gguf.stem}-{revision.removeprefix('sha256:')[:16]}-{_CONVERSION}"
    if not (folder / "config.json").exists():
        from hpc.model import load
        from hpc.model.gguf import convert_gguf  # torch and transformers, for this once

        folder.parent.mkdir(parents=True, exist_ok=True)
        LOGGER.info("converting %s into %s, once: this takes a minute", gguf.name, folder)
        load.quiet()
        try:
            convert_gguf(gguf.absolute(), folder)
        except (OSError, Refusal):
            raise
        except Exception as error:  # not GGUF, cut off, or of an architecture that transformers does not read
            raise Refusal(f'model "{gguf}" cannot be converted: {error or type(error).__name__}') from error
    return folder, revision


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


def _tokenizer_hashes(folder: Path) -> tuple[str, str]:
    """Return hashes of the tokenizer's files and of the chat template."""
    tokenizer = hashlib.blake2b(digest_size=16)
    template = hashlib.blake2b(digest_size=16)
    for name in identity.TOKENIZER_FILES:
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
