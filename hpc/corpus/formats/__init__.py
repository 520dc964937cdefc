"""Input formats: each cuts a corpus file into blocks, and makes rows of a block.

Rank 0 iterates over `blocks`; whoever gets a block, on any rank, asks `rows` for what is in it: for each row its index
in the corpus, its place for messages, and a dict of JSON values or the `RowError` that is in its place. The corpus is
read twice, for the requests and for the output; both times blocks and rows are the same.
"""

from hpc.corpus.formats.block import Block, CorpusFile, Format, Place, Row
from hpc.corpus.formats.registry import FORMATS, rows

__all__ = ["FORMATS", "Block", "CorpusFile", "Format", "Place", "Row", "rows"]
