"""The token store: what reading a corpus found, as files in the run directory, so that rank 0 need not hold it.

`tokens.i32`      the prompts' token ids, one after the other
`offsets.i64`     [rows + 1, 7]: see `Column`; the last line ends the others
`keys.b16`        [rows, 16] bytes: the key of each row's completion
`requests.jsonl`  a line a row: its id, and its sampling parameters where they are not the job's
`errors.jsonl`    a line a refused row, in the order of rows: its index and what was wrong
`store.json`      what was read, and that it was read to its end: written last
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hpc.arrays import Ints, Keys, Tokens
from hpc.corpus.files import name_files
from hpc.corpus.formats import Block, CorpusFile, Place
from hpc.request import KEY_BYTES, Request, RowId
from hpc.rundir import atomic
from hpc.sampling_params import SamplingParams


@dataclass(frozen=True)
class Prompts:
    """The prompts of a corpus, as far as a plan needs them; arrays of shape [prompts]."""

    tokens: Tokens
    """All of them, one behind the other."""
    starts: Ints
    lengths: Ints
    new_tokens: Ints
    """Most tokens to generate for a sample."""
    samples: Ints


Arrays = dict[str, npt.NDArray[Any]]

_TOKENS, _OFFSETS, _KEYS = "tokens.i32", "offsets.i64", "keys.b16"
_REQUESTS, _ERRORS, _STORE = "requests.jsonl", "errors.jsonl", "store.json"


class Column(IntEnum):
    """Columns of offsets.i64."""

    TOKENS = 0
    """where the row's tokens begin in tokens.i32, in tokens"""
    REQUEST = 1
    """where its line begins in requests.jsonl, in bytes"""
    NEW_TOKENS = 2
    """max_new_tokens, as clamped to the context"""
    FILE = 3
    """index of its corpus file"""
    LINE = 4
    """number of its line, or row, in that file, from 1"""
    REFUSED = 5
    """1 for a row with an error"""
    SAMPLES = 6
    """samples to generate of its prompt"""


class StoreError(Exception):
    """There is no complete token store here."""


class StoreWriter:
    """Write a token store aside, block by block; `finish` puts it in place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {
            name: open(atomic.aside(folder / name), "wb")  # noqa: SIM115  (closed by finish or close)
            for name in (_TOKENS, _OFFSETS, _KEYS, _REQUESTS, _ERRORS)
        }
        self._id_hashes: list[npt.NDArray[np.uint64]] = []
        self._places: dict[int, Callable[[int], Place]] = {}
        """Of each file, where its row of a number is."""
        self._tokens = self._bytes = 0
        self.num_rows = 0

    def append(self, block: Block, rows: Arrays) -> None:
        """Append the rows of the next block, as `hpc.corpus.tokenize.Checker.check_block` returns them."""
        count = len(rows["lengths"])
        offsets = np.empty((count, len(Column)), dtype=np.int64)
        offsets[:, Column.TOKENS] = self._tokens + _starts(rows["lengths"])
        offsets[:, Column.REQUEST] = self._bytes + _starts(rows["request_bytes"])
        offsets[:, Column.NEW_TOKENS] = rows["new_tokens"]
        offsets[:, Column.FILE] = block.file
        offsets[:, Column.LINE] = rows["lines"]
        offsets[:, Column.REFUSED] = rows["refused"]
        offsets[:, Column.SAMPLES] = rows["samples"]
        self._files[_OFFSETS].write(offsets.tobytes())
        for name, array in ((_TOKENS, "tokens"), (_KEYS, "keys"), (_REQUESTS, "requests"), (_ERRORS, "errors")):
            self._files[name].write(rows[array].tobytes())
        self._id_hashes.append(rows["id_hashes"])
        self._places.setdefault(block.file, block.place)
        self._tokens += int(rows["lengths"].sum())
        self._bytes += int(rows["request_bytes"].sum())
        self.num_rows += count

    def finish(
        self,
        inputs: dict[str, Any],
        digests: Sequence[str],
        check: Callable[[Keys, npt.NDArray[np.uint64]], None] = lambda keys, ids: None,
    ) -> "TokenStore":
        """Refuse the later ones of rows with one id, put the files in place, and open them.

        `inputs` is all that the store depends on, `digests` are those of the corpus files. What
        `check` raises, given the keys of the rows and hashes of their ids, leaves an earlier store in place.
        """
        end = np.array([[self._tokens, self._bytes, 0, 0, 0, 0, 0]], dtype=np.int64)
        self._files[_OFFSETS].write(end.tobytes())
        for file in self._files.values():
            file.close()
        ids = np.concatenate([np.empty(0, np.uint64), *self._id_hashes])
        self._refuse_duplicates()
        check(_map(atomic.aside(self._folder / _KEYS), np.uint8).view(f"S{KEY_BYTES}"), ids)
        (self._folder / _STORE).unlink(missing_ok=True)  # from here on, the old store is none
        for name in (_TOKENS, _KEYS, _REQUESTS, _ERRORS, _OFFSETS):
            atomic.finish(self._folder / name)
        atomic.write(self._folder / _STORE, json.dumps({"inputs": inputs, "digests": list(digests)}) + "\n")
        return TokenStore(self._folder)

    def close(self) -> None:
        """Give up: leave the store of an earlier attempt as it is. After `finish`, nothing."""
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def _refuse_duplicates(self) -> None:
        hashes = np.concatenate([np.empty(0, np.uint64), *self._id_hashes])
        self._id_hashes.clear()
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(same):
            return
        mapped = np.memmap(atomic.aside(self._folder / _OFFSETS), np.int64, "r+")
        offsets = mapped.reshape(-1, len(Column))
        first_of: dict[tuple[type, Any], int] = {}
        added: list[bytes] = []
        with open(atomic.aside(self._folder / _REQUESTS), "rb") as file:
            for row in np.unique(np.concatenate([order[same], order[same + 1]])).tolist():
                if offsets[row, Column.REFUSED]:  # it has no claim on its id
                    continue
                file.seek(offsets[row, Column.REQUEST])
                identity = json.loads(file.readline())["id"]
                first = first_of.setdefault((type(identity), identity), row)
                if first != row:
                    at, before = (
                        self._places[offsets[r, Column.FILE]](int(offsets[r, Column.LINE])) for r in (row, first)
                    )
                    offsets[row, Column.REFUSED] = 1
                    message = (
                        f'{at}: "id" is {json.dumps(identity, ensure_ascii=False)}, as at {before} already; '
                        "ids must differ (a row without one has its index, from 0, for an id)"
                    )
                    added.append(error_line(row, "duplicate_id", message))
        mapped.flush()
        path = atomic.aside(self._folder / _ERRORS)
        lines = {int(json.loads(line)["row"]): line for line in [*path.read_bytes().splitlines(keepends=True), *added]}
        path.write_bytes(b"".join(lines[row] for row in sorted(lines)))


class TokenStore:
    """A complete token store, memory-mapped: prompts, keys and errors of every row."""

    def __init__(self, folder: Path) -> None:
        """Open the store in a run directory; raise `StoreError` if it is not there, or not whole."""
        try:
            self._open(folder)
        except (OSError, ValueError, LookupError) as error:
            raise StoreError(f"{folder}: the token store is damaged ({error}); run the job again") from error

    def _open(self, folder: Path) -> None:
        try:
            values = json.loads((folder / _STORE).read_text())
        except FileNotFoundError:
            raise StoreError(
                f"{folder} holds no complete token store ({_STORE} is missing): the corpus was not read to its "
                "end; run the job again"
            ) from None
        self._folder = folder
        self.inputs: dict[str, Any] = values["inputs"]
        self.digests: list[str] = values["digests"]
        self.offsets: Ints = _map(folder / _OFFSETS, np.int64).reshape(-1, len(Column))
        self.num_rows = len(self.offsets) - 1
        self._tokens = _map(folder / _TOKENS, np.int32)
        self._requests = _map(folder / _REQUESTS, np.uint8)
        # Byte strings of one length sort and compare as a whole.
        self.keys: Keys = _map(folder / _KEYS, np.uint8).view(f"S{KEY_BYTES}")
        found = [len(self._tokens), len(self._requests), len(self.keys)]
        expected = [*self.offsets[-1, : Column.REQUEST + 1].tolist(), self.num_rows]
        if found != expected:
            raise StoreError(
                f"{folder}: the token store holds {found} tokens, bytes and keys instead of {expected}; "
                "run the job again"
            )

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The corpus files, and how they were read."""
        paths = [Path(name) for name, *_ in self.inputs["files"]]
        return name_files(paths, self.inputs.get("formats", ()))

    @property
    def prompt_tokens(self) -> Ints:
        """Length of each row's prompt, shape [rows]; 0 for a refused row."""
        return np.where(self.good, np.diff(self.offsets[:, Column.TOKENS]), 0)

    @property
    def new_tokens(self) -> Ints:
        """Most tokens that each sample of each row may have, shape [rows]."""
        return self.offsets[:-1, Column.NEW_TOKENS]

    @property
    def samples(self) -> Ints:
        """How many samples each row asks for, shape [rows]."""
        return self.offsets[:-1, Column.SAMPLES]

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """Which rows were not refused, shape [rows]."""
        good: npt.NDArray[np.bool_] = self.offsets[:-1, Column.REFUSED] == 0
        return good

    def errors(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield index and error of each refused row, in order."""
        with open(self._folder / _ERRORS, "rb") as file:
            for line in file:
                value = json.loads(line)
                yield value["row"], value["error"]

    def tokens(self, row: int) -> npt.NDArray[np.int32]:
        """Return the prompt of a row."""
        begin, end = self.offsets[row : row + 2, Column.TOKENS]
        return self._tokens[begin:end]

    def prompts(self, rows: Ints) -> Prompts:
        """Return what a plan needs to know of the prompts of these rows."""
        starts: Ints = self.offsets[rows, Column.TOKENS]
        return Prompts(self._tokens, starts, self.prompt_lengths(rows), self.new_tokens[rows], self.samples[rows])

    def prompt_lengths(self, rows: Ints) -> Ints:
        """Return the lengths of the prompts of some rows, in tokens."""
        lengths: Ints = self.offsets[rows + 1, Column.TOKENS] - self.offsets[rows, Column.TOKENS]
        return lengths

    def request_bytes(self, rows: Ints) -> Ints:
        """Return the lengths of the lines of some rows in requests.jsonl, in bytes."""
        lengths: Ints = self.offsets[rows + 1, Column.REQUEST] - self.offsets[rows, Column.REQUEST]
        return lengths

    def key(self, row: int) -> bytes:
        """Return the key of a row, all of it: numpy drops zeros at the end of its byte strings."""
        return bytes(self.keys[row]).ljust(KEY_BYTES, b"\0")

    def all_tokens(self, rows: Ints) -> npt.NDArray[np.int32]:
        """Return the prompts of some rows, one behind the other."""
        return self._join(self._tokens, rows, Column.TOKENS)

    def request_lines(self, rows: Ints) -> npt.NDArray[np.uint8]:
        """Return the lines of some rows in requests.jsonl, as bytes, one behind the other."""
        return self._join(self._requests, rows, Column.REQUEST)

    def request_line(self, row: int) -> bytes:
        """Return the line of one row in requests.jsonl."""
        begin, end = self.offsets[row : row + 2, Column.REQUEST]
        return self._requests[begin:end].tobytes()

    def any_request_says(self, parameter: str) -> bool:
        """Say whether a row may have a sampling parameter of its own: its name stands in requests.jsonl."""
        mark, step = f'"{parameter}": '.encode(), 1 << 24
        return any(
            mark in self._requests[at : at + step + len(mark)].tobytes() for at in range(0, len(self._requests), step)
        )

    def id(self, row: int) -> RowId | None:
        """Return the id of a row; None for a refused one whose id cannot be read."""
        identity: RowId | None = json.loads(self.request_line(row))["id"]
        return identity

    def _join(self, values: npt.NDArray[Any], rows: Ints, column: Column) -> npt.NDArray[Any]:
        begins, ends = self.offsets[rows, column].tolist(), self.offsets[rows + 1, column].tolist()
        parts = [values[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return np.concatenate(parts) if parts else values[:0]


def id_hash(identity: RowId | None) -> int:
    """Return 64 bits that differ, but for chance, where ids differ in type or value."""
    return int.from_bytes(hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest(), "little")


def error_line(row: int, kind: str, message: str) -> bytes:
    """Return the line of errors.jsonl for a refused row."""
    return json.dumps({"row": row, "error": {"kind": kind, "message": message}}).encode() + b"\n"


def request_line(identity: int | str | None, sampling: dict[str, Any]) -> bytes:
    """Return the line of requests.jsonl for a row; `sampling` holds what differs from the job's."""
    value = {"id": identity, "sampling": sampling} if sampling else {"id": identity}
    return json.dumps(value).encode() + b"\n"


def parse_request(
    line: bytes,
    row: int,
    token_ids: npt.NDArray[np.int32],
    key: bytes,
    bucket: int,
    defaults: SamplingParams,
    prefix: int = 0,
) -> Request:
    """Make the request that a line of requests.jsonl and the arrays beside it stand for."""
    value = json.loads(line)
    sampling = defaults.overridden(value["sampling"]) if "sampling" in value else defaults
    return Request(row, value["id"], token_ids, sampling, key, bucket, prefix)


def _starts(lengths: Ints) -> Ints:
    return np.cumsum(lengths) - lengths


def _map(path: Path, dtype: Any) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # mmap refuses an empty file
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a slice of a memmap itself takes ten times as long
