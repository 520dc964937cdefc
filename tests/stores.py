"""Corpora to blocks, checked rows and token stores, as reading makes them, with the byte tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from hpc.corpus.columns import Columns
from hpc.corpus.files import Blocks, name_files
from hpc.corpus.limits import PromptLimits
from hpc.corpus.store import StoreWriter, TokenStore
from hpc.corpus.tokenize import Checker, Encoder
from hpc.sampling_params import SamplingParams
from tests.fakes import CONTEXT, VOCABULARY, ByteTokenizer


def make_checker(
    sampling: SamplingParams | None = None,
    context_tokens: int | None = CONTEXT,
    truncate_prompts: str = "none",
    encoder: Encoder | None = None,
    chat_ending: int | None = None,
    columns: Columns | None = None,
) -> Checker:
    """Return a checker whose tokens are bytes."""
    limits = PromptLimits(VOCABULARY, context_tokens, truncate_prompts, chat_ending)
    return Checker(sampling or SamplingParams(), limits, encoder or ByteTokenizer(), columns or Columns())


def read_store(
    folder: Path, files: Sequence[Path], sampling: SamplingParams | None = None, block_bytes: int = 1 << 16
) -> TokenStore:
    """Read corpus files into a token store in `folder`."""
    checker, blocks, writer = make_checker(sampling), Blocks(name_files(files), block_bytes), StoreWriter(folder)
    for block in blocks:
        writer.append(block, checker.check_block(block))
    return writer.finish({"files": [[str(file), 0, 0] for file in files]}, blocks.digests)
