"""Gather: rank 0 pulls the completions of each rank in the order of their rows, piece by piece."""

import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpc.arrays import Ints, Record
from hpc.mpi.comm import Buffer, Comm, Message, Tag, pack, unpack, wait_for

_AT_ONCE = 1 << 12
"""Places of records that are taken in one go."""


@dataclass
class OwnRecords:
    """Rows, offsets and lengths of the records that this rank has written to its journal."""

    path: Path
    _places: "array[int]" = field(default_factory=lambda: array("q"))
    """Row, offset, length: 24 bytes a record; as objects 200."""
    _sorted: Ints = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    _sent: int = 0

    def add(self, row: int, offset: int, length: int) -> None:
        """Add the record at `offset`, which answers `row`."""
        self._places.extend((row, offset, length))

    def sort(self) -> None:
        """Sort the records by row; nothing may be added afterwards."""
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        self._sorted = places[np.argsort(places[:, 0], kind="stable")]
        self._places = array("q")

    def __iter__(self) -> Iterator[Record]:
        """Yield the records that have not been sent."""
        if not len(self._sorted):
            return
        file = os.open(self.path, os.O_RDONLY)
        try:
            while self._sent < len(self._sorted):  # places one by one take longer than the reading
                for row, offset, length in self._sorted[self._sent : self._sent + _AT_ONCE].tolist():
                    self._sent += 1
                    yield row, os.pread(file, length, offset)
        finally:
            os.close(file)

    def next_piece(self, max_bytes: int) -> Buffer:
        """Return the next records, up to `max_bytes` but at least one."""
        rows, records, size = [], [], 0
        for row, record in self:
            rows.append(row)
            records.append(record)
            size += len(record)
            if size >= max_bytes:
                break
        return pack(
            {"last": self._sent == len(self._sorted)},
            rows=np.array(rows, dtype=np.int64),
            lengths=np.array([len(record) for record in records], dtype=np.int64),
            records=np.frombuffer(b"".join(records), dtype=np.uint8),
        )


class Gathering:
    """Rank 0 pulls records: one stream for each other rank that has any, which fetches one piece ahead."""

    def __init__(self, comm: Comm, ranks: list[int], on_message: Callable[[Message], None]) -> None:
        self._comm = comm
        self._on_message = on_message
        self._pieces: dict[int, deque[Buffer]] = {rank: deque() for rank in ranks}
        self.waited_s = 0.0
        """Seconds that merging has waited for pieces."""
        for rank in ranks:
            comm.send(rank, Tag.PULL, pack())

    def streams(self) -> list[Iterator[Record]]:
        """Return an iterator for each rank: its records in the order of their rows."""
        return [self._stream(rank) for rank in self._pieces]

    def _stream(self, rank: int) -> Iterator[Record]:
        last = False
        while not last:
            began = time.monotonic()
            wait_for(lambda: self._has_piece(rank))
            self.waited_s += time.monotonic() - began
            values, arrays = unpack(self._pieces[rank].popleft())
            last = values["last"]
            if not last:  # let it come while this one is being merged
                self._comm.send(rank, Tag.PULL, pack())
            data = arrays["records"].tobytes()
            end = 0
            for row, length in zip(arrays["rows"].tolist(), arrays["lengths"].tolist(), strict=True):
                begin, end = end, end + length
                yield row, data[begin:end]

    def _has_piece(self, rank: int) -> bool:
        for message in self._comm.poll():
            if message.tag == Tag.RECORDS:
                self._pieces[message.source].append(message.array)
            else:
                self._on_message(message)
        return bool(self._pieces[rank])
