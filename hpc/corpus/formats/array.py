"""JSON whose objects are not one on each line: an array of objects, or objects that go over several lines."""

import codecs
import json
import re
from collections.abc import Iterator

from hpc.corpus.decode import decode_row, short
from hpc.corpus.errors import CorpusError
from hpc.corpus.formats.block import Block, Columns, CorpusFile, Digest, Piece, Row
from hpc.corpus.formats.lines import rows_of_lines
from hpc.corpus.formats.stream import TextStream

_DECODER = json.JSONDecoder()
_SPACES = re.compile(r"[ \t\r\n]*")


class JsonArray:
    """An element of the array is a row; without brackets, each of the values that follow one another."""

    in_lines = False

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield pieces of JSON lines, an element on each; raise `CorpusError` where the text is no JSON."""
        first, lines, size = 1, list[bytes](), 0
        for text in _elements(file, block_bytes, digest):
            # A line break stands only between the tokens of valid JSON.
            line = text.replace("\n", " ").encode("utf-8", "surrogateescape")
            lines.append(line)
            size += len(line)
            if size >= block_bytes:
                yield Piece(first, len(lines), b"\n".join(lines))
                first, lines, size = first + len(lines), [], 0
        if lines:
            yield Piece(first, len(lines), b"\n".join(lines))

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:  # noqa: ARG002  (it costs nothing)
        """Yield the object of each element, or what is wrong with it."""
        return rows_of_lines(block, decode_row)

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return None: each object has keys of its own."""


def _elements(file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[str]:
    """Yield the text of each element."""
    with TextStream(file.path, file.name) as stream:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        text, at, number, ended = "", 0, 1, False

        def more() -> bool:
            """Read on; what was read before `at` is dropped."""
            nonlocal text, at, ended
            if ended:
                return False
            # As much as is held already, so that an element of any length is tried a few times alone.
            data = stream.read(max(block_bytes, len(text) - at))
            digest.update(data)
            ended = not data
            text, at = text[at:] + decoder.decode(data, ended), 0
            return True

        def behind_spaces() -> str:
            """Go to the next character that is no white space, and return it; nothing at the end."""
            nonlocal at
            while True:
                at = _SPACES.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                if at < len(text) or not more():
                    return text[at : at + 1]

        in_array = behind_spaces() == "["
        at += in_array
        while (next_one := behind_spaces()) and not (in_array and next_one == "]"):
            while True:
                try:
                    _, end = _DECODER.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    if not more():
                        raise _broken(file, number, text[at:], str(error)) from None
                    continue
                # A number may go on behind what was read, and so may a value that ends with it.
                if end < len(text) or not more():
                    break
            yield text[at:end]
            at, number = end, number + 1
            separator = behind_spaces()
            if in_array and separator == ",":
                at += 1
            elif in_array and separator not in ("]", ""):
                raise _broken(file, number, text[at:], 'neither "," nor "]" stands here')
        if in_array and next_one != "]":
            raise _broken(file, number, "", 'the file ends before the "]" of its array')
        at += in_array
        if behind_spaces():
            raise _broken(file, number, text[at:], "it stands behind the end of the array")
        while more():
            pass


def _broken(file: CorpusFile, number: int, text: str, reason: str) -> CorpusError:
    what = f"{short(text[:80])} is not JSON" if text else "it is not JSON"
    return CorpusError(
        f"{file.name} row {number}: {what} ({reason}), and what is behind it cannot be found; mend the file, or write "
        "each object on one line, where a broken one costs no other"
    )
