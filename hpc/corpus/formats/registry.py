"""The formats by their names."""

from collections.abc import Iterator, Mapping

from hpc.corpus.formats.block import Block, Format, Row
from hpc.corpus.formats.jsonl import JsonLines

FORMATS: Mapping[str, Format] = {"jsonl": JsonLines()}


def rows(block: Block) -> Iterator[Row]:
    """Yield the rows of a block, whatever its format."""
    return FORMATS[block.format].rows(block)
