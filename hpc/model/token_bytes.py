"""What tokens are in a text, one by one, for log probabilities in the API's shape; read from tokenizer.json alone."""

import functools
from collections.abc import Callable
from pathlib import Path

from hpc.model.detokenizer import ByToken, detokenizer


def token_bytes(model: Path) -> Callable[[int], bytes | None]:
    """Return what makes bytes of a token of a model, None where its tokenizer is not known.

    The tokenizer is read when it is first asked for a token.
    """

    @functools.cache
    def table() -> ByToken | None:
        from tokenizers import Tokenizer

        file = model / "tokenizer.json"
        if not file.is_file():
            return None
        found = detokenizer(Tokenizer.from_file(str(file)))
        return found if isinstance(found, ByToken) else None

    def look_up(token: int) -> bytes | None:
        known = table()
        return None if known is None else known.written(token)

    return look_up
