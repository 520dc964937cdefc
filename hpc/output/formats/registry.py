"""The formats by their names, and by the ends of file names."""

from collections.abc import Callable, Mapping

from hpc.output.facts import Facts
from hpc.output.formats.delimited import Csv
from hpc.output.formats.format import Format
from hpc.output.formats.jsonl import Jsonl
from hpc.output.formats.openai import OpenAI
from hpc.output.formats.packed import PACKINGS
from hpc.output.formats.parquet import Parquet

_PACKED = ("", *PACKINGS)
FORMATS: Mapping[str, tuple[str, tuple[str, ...], Callable[[Facts, str], Format]]] = {
    "jsonl": (".jsonl", _PACKED, lambda facts, packing: Jsonl(packing)),
    "openai": (".jsonl", _PACKED, OpenAI),
    "csv": (".csv", _PACKED, Csv),
    "parquet": (".parquet", ("",), lambda facts, packing: Parquet(facts)),
}
"""The end of a file's name, what may stand behind it, and what makes the format."""
