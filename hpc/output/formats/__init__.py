"""Output formats: each writes rows, which are values, to a file, and reads what stands in one."""

from hpc.output.formats.format import Format
from hpc.output.formats.registry import FORMATS

__all__ = ["FORMATS", "Format"]
