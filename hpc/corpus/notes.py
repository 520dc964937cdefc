"""Notes: what the user should hear of once, however many rows it is true of."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MAX_NOTES = 64
"""So many different ones are told; a corpus that gives reason for more is strange in one way."""


@dataclass
class Note:
    """Something that is true of rows."""

    first: str
    """The place of the first of them."""
    rows: int


def note_lines(found: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """Return the notes of a block's rows, given each row's place and notes, as JSON lines that `Notes` adds up."""
    notes: dict[str, Note] = {}
    for place, texts in found:
        for text in texts:
            _add(notes, text.encode("utf-8", "backslashreplace").decode(), place, 1)
    return b"".join(json.dumps([text, note.first, note.rows]).encode() + b"\n" for text, note in notes.items())


class Notes:
    """The notes of all blocks, which come in the order of the corpus."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def add(self, lines: bytes) -> None:
        """Add those of the next block."""
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
