"""The formats by their names."""

from collections.abc import Iterator, Mapping

from hpc.corpus.formats.array import JsonArray
from hpc.corpus.formats.arrow import Arrow
from hpc.corpus.formats.block import Block, Columns, Format, Row
from hpc.corpus.formats.delimited import Delimited
from hpc.corpus.formats.lines import Lines, TextFiles, prompt_of_line
from hpc.corpus.formats.parquet import Parquet

FORMATS: Mapping[str, Format] = {
    "jsonl": Lines(),
    "json": JsonArray(),
    "csv": Delimited(",;"),
    "tsv": Delimited("\t"),
    "text": Lines(prompt_of_line),
    "file": TextFiles(),
    "parquet": Parquet(),
    "arrow": Arrow(),
}


def rows(block: Block, columns: Columns = None) -> Iterator[Row]:
    """Yield the rows of a block, whatever its format."""
    return FORMATS[block.format].rows(block, columns)
