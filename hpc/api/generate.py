"""`hpc.generate`: completions for prompts, in this process, with a model that is loaded for one call."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.api.completion import Completion
from hpc.api.generator import Generator
from hpc.api.rows import Chats, Prompts


class Generate:
    """Generate completions in this process: `generate(…)` returns them in order, `generate.stream(…)` as they end."""

    def __call__(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Chats | None = None,
        model: str | Path,
        **parameters: Any,
    ) -> list[Completion]:
        """Return a completion for each prompt or chat, in their order.

        >>> completions = generate(["The sky is", "Once upon a time"], model="MODEL", max_new_tokens=8)
        >>> [completion.finish_reason for completion in completions]
        ['length', 'length']
        >>> chat = [{"role": "user", "content": "Name a colour."}]
        >>> [completion] = generate(messages=[chat], model="MODEL", temperature=0.7, n=4, max_new_tokens=8)
        >>> len(completion.texts)
        4

        A prompt is a text, a list of token ids, a list of turns, or a row as a corpus has it: `{"prompt": "…", "id": 7,
        "sampling": {"temperature": 1}}`. Completions are those of a job with the same rows and parameters. A row that
        is wrong has a completion with an `error`, and costs the others nothing:

        >>> [good, bad] = generate(["fine", ""], model="MODEL", max_new_tokens=8)
        >>> bad.error.kind, bad.text, good.error
        ('empty', None, None)

        `parameters` are those of `hpc.Generator`, which keeps a model loaded between calls; its errors are these.
        """
        with Generator(model, **parameters) as generator:
            return generator.generate(prompts, messages=messages)

    def stream(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Chats | None = None,
        model: str | Path,
        **parameters: Any,
    ) -> Iterator[Completion]:
        """Return an iterator of completions as they end, each with the `index` of its prompt or chat.

        >>> found = {}
        >>> for completion in generate.stream(["one", "two", "three"], model="MODEL", max_new_tokens=8):
        ...     found[completion.index] = completion.text
        >>> sorted(found)
        [0, 1, 2]

        All prompts are read before the first is generated, the longest first.
        """
        generator = Generator(model, **parameters)
        return _closing(generator, generator.stream(prompts, messages=messages))


def _closing(generator: Generator, completions: Iterator[Completion]) -> Iterator[Completion]:
    with generator:
        yield from completions


generate = Generate()
