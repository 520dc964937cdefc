"""Journals: a file of finished completions for each rank and attempt, with which a later attempt goes on.

A record is one JSON line whose first two fields stand at fixed places, so that a journal is indexed
without parsing it: `{"crc":"…8 hex digits…","key":"…32…", …}`. The CRC-32 covers everything
behind its own field. One process writes a journal, once, and nobody opens it for writing again.
"""

import json
import logging
import os
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpc import quick_json
from hpc.arrays import Ints
from hpc.request import KEY_BYTES, Completion, Sample, TokenLogprobs
from hpc.rundir import atomic

LOGGER = logging.getLogger(__name__)


FSYNC_S = 5.0
"""Seconds after which a finished completion is on the disk, and not only with the kernel: a crash of the node costs
so much work."""

_HEAD = len('{"crc":"00000000",')
_KEY = slice(_HEAD + len('"key":"'), _HEAD + len('"key":"') + 2 * KEY_BYTES)
_NO_ERROR = b'"error":null}\n'
_TOKEN_IDS, _TEXT, _END = b',"token_ids":[', b'],"text":"', b'",' + _NO_ERROR
_READ_BYTES = 1 << 24
_AT_ONCE = 1 << 12
"""Places of records that are taken from the index in one go: one by one they take longer than the reading."""
_JSON = json.JSONEncoder(separators=(",", ":"))


class JournalError(OSError):
    """A completion could not be written down."""


@dataclass(frozen=True)
class Damage:
    """A record in the middle of a journal that is not what was written."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}; its row is generated again"


def encode(completion: Completion) -> bytes:
    """Return the record of a completion, one line."""
    value: dict[str, Any] = {
        "key": completion.key.hex(),
        "row": completion.row,
        "id": completion.id,
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids,
        "text": completion.text,
    }
    if completion.logprobs is not None:
        value["logprobs"] = completion.logprobs
    if completion.others:
        value["others"] = [asdict(sample) for sample in completion.others]
    value["error"] = completion.error  # last: an index knows errors by how a record ends
    # ASCII only: any string JSON can write comes through, and no line separator is mistaken for one.
    body = _JSON.encode(value).encode()[1:]
    return b'{"crc":"%08x",' % zlib.crc32(body) + body + b"\n"


def decode(record: bytes) -> Completion:
    """Return the completion of a record; raise `ValueError` if it is not what was written."""
    problem = _problem(record)
    if problem:
        raise ValueError(problem)
    value = json.loads(record)
    return Completion(
        key=bytes.fromhex(value["key"]),
        row=value["row"],
        id=value["id"],
        token_ids=tuple(value["token_ids"]),
        text=value["text"],
        finish_reason=value["finish_reason"],
        error=value["error"],
        logprobs=_logprobs(value.get("logprobs")),
        others=tuple(
            Sample(
                tuple(sample["token_ids"]), sample["text"], sample["finish_reason"], _logprobs(sample.get("logprobs"))
            )
            for sample in value.get("others", ())
        ),
    )


class Spans(NamedTuple):
    """What a record says of a good completion with one sample and nothing else, as pieces of its JSON.

    Most of a record's bytes are token ids: without decoding them it is read several times as fast.
    """

    finish_reason: bytes
    """Without its quotes."""
    token_ids: bytes
    """Without its brackets; numbers and commas alone."""
    text: bytes
    """With its quotes, and all that is not ASCII escaped."""
    num_tokens: int


def spans(record: bytes) -> Spans | None:
    """Return the pieces of a record, None for one that has more; raise `ValueError` if it is not what was written."""
    problem = _problem(record)
    if problem:
        raise ValueError(problem)
    # Within a string of JSON no quote stands without a backslash before it, so that these marks are keys. What ends
    # in a quote before the error has nothing between text and error.
    head, _, rest = record.partition(_TOKEN_IDS)
    token_ids, _, text = rest.partition(_TEXT)
    if not text.endswith(_END):
        return None
    return Spans(
        head[head.rfind(b'"', 0, -1) + 1 : -1],
        token_ids,
        b'"' + text[: 1 - len(_END)],
        token_ids.count(b",") + 1 if token_ids else 0,
    )


def text_of(pieces: Spans) -> str:
    """Return the text of a record."""
    return quick_json.decode_string(pieces.text)


def _logprobs(values: list[Any] | None) -> tuple[TokenLogprobs, ...] | None:
    if values is None:
        return None
    return tuple((chosen, tuple((token, logprob) for token, logprob in top)) for chosen, top in values)


class JournalWriter:
    """One rank's journal of one attempt. The file comes into being with the first record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._size = 0
        self._synced, self._synced_at = 0, time.monotonic()

    def append(self, completions: Iterable[Completion]) -> list[tuple[int, int]]:
        """Write records in one call, and return offset and length of each.

        Raises `JournalError` if the disk does not take all of it; what was written before stays valid,
        and the torn record is dropped by readers.
        """
        records = [encode(completion) for completion in completions]
        places, at = [], self._size
        for record in records:
            places.append((at, len(record)))
            at += len(record)
        data = b"".join(records)
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                atomic.force(self.path.parent)  # the file's name must outlive a crash as its records do
            written = os.write(self._file, data)
            while written < len(data):  # a disk that is filling up takes a part, and the next call says why
                written += os.write(self._file, data[written:])
        except OSError as error:
            raise JournalError(
                error.errno,
                f"cannot write the journal ({error.strerror}); what is in it is valid: make room or mend the "
                "file system, and run the same command again",
                str(self.path),
            ) from error
        self._size = at
        self.sync(FSYNC_S)
        return places

    def sync(self, after_s: float = 0.0) -> None:
        """Force what was written to the disk if the last time was at least `after_s` seconds ago."""
        now = time.monotonic()
        if self._file is not None and self._synced < self._size and now - self._synced_at >= after_s:
            os.fsync(self._file)
            self._synced, self._synced_at = self._size, now

    def close(self) -> None:
        """Force everything to the disk and close the file."""
        self.sync()
        if self._file is not None:
            os.close(self._file)
            self._file = None


class JournalIndex:
    """Finds the record of each key in any number of journals.

    The first record counts; a completion goes before an error, which may have been retried.
    """

    def __init__(self, paths: Sequence[Path], retry_errors: bool = False) -> None:
        """Index `paths` in their order; with `retry_errors` pass over records of errors."""
        self.paths = list(paths)
        self.damages: list[Damage] = []
        keys, places, failed = bytearray(), array("q"), bytearray()  # 41 bytes a record; as objects 200
        for number, path in enumerate(self.paths):
            for key, offset, length, is_error in self._scan(path):
                if not (is_error and retry_errors):
                    keys += key
                    places.extend((number, offset, length))
                    failed.append(is_error)
        order = np.argsort(np.frombuffer(bytes(failed), dtype=np.uint8), kind="stable")
        # np.unique returns the index of the first of equal keys.
        self._keys, first = np.unique(np.frombuffer(bytes(keys), dtype=f"S{KEY_BYTES}")[order], return_index=True)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)[order][first]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """Return for each key the number of its record here, or -1."""
        if not len(self._keys):
            return np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(self._keys, keys)
        at[at == len(self._keys)] = 0
        return np.where(self._keys[at] == keys, at, -1)

    def read(self, numbers: Ints) -> Iterator[bytes]:
        """Yield the records with these numbers."""
        files: dict[int, int] = {}
        try:
            for begin in range(0, len(numbers), _AT_ONCE):
                for journal, offset, length in self._places[numbers[begin : begin + _AT_ONCE]].tolist():
                    if journal not in files:
                        files[journal] = os.open(self.paths[journal], os.O_RDONLY)
                    yield os.pread(files[journal], length, offset)
        finally:
            for file in files.values():
                os.close(file)

    def _scan(self, path: Path) -> Iterator[tuple[bytes, int, int, bool]]:
        offset = 0
        with open(path, "rb", buffering=_READ_BYTES) as file:
            for line, record in enumerate(file, 1):
                problem = _problem(record)
                if not record.endswith(b"\n"):  # the process ended while writing it: nothing that was promised
                    LOGGER.info("%s:%d: the last record is torn and does not count", path, line)
                elif problem:
                    self.damages.append(Damage(path, line, problem))
                else:
                    yield bytes.fromhex(record[_KEY].decode()), offset, len(record), not record.endswith(_NO_ERROR)
                offset += len(record)


def _problem(record: bytes) -> str | None:
    body = record[_HEAD:-1] if record.endswith(b"\n") else record[_HEAD:]
    if not record.startswith(b'{"crc":"%08x",' % zlib.crc32(body)):
        return "the record's checksum is wrong"
    return None
