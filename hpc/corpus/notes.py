"""Notes: messages about rows that the log shows once, with the number of rows and the place of the first."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MAX_NOTES = 64
"""Number of different notes that are kept: names from the rows stand in them, and there may be any number of those."""


@dataclass
class Note:
    """The rows that a message is about."""

    first: str
    """Place of the first row."""
    rows: int


def note_lines(found: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """Return the notes of a block as JSON lines for `Notes`, given place and messages of each row."""
    notes: dict[str, Note] = {}
    for place, texts in found:
        for text in texts:
            _add(notes, text.encode("utf-8", "backslashreplace").decode(), place, 1)
    return b"".join(json.dumps([text, note.first, note.rows]).encode() + b"\n" for text, note in notes.items())


class Notes:
    """The notes of all blocks; blocks come in the order of the corpus."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def add(self, lines: bytes) -> None:
        """Add the notes of the next block."""
        for line in lines.splitlines():
            _add(self._notes, *json.loads(line))

    def __iter__(self) -> Iterator[str]:
        """Yield a message for each."""
        for text, note in self._notes.items():
            yield f"{note.first}{f' and {note.rows - 1:,} more rows' if note.rows > 1 else ''}: {text}"


def _add(notes: dict[str, Note], text: str, place: str, rows: int) -> None:
    if text in notes:
        notes[text].rows += rows
    elif len(notes) < _MAX_NOTES:
        notes[text] = Note(place, rows)
