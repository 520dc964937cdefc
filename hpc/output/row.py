"""OutputRow: a row of the output as a value, whatever the format it is written in."""

from dataclasses import dataclass
from typing import Any

from hpc.output.journal import Spans, text_of
from hpc.request import Completion, RowId, Sample

Answer = Spans | Completion | dict[str, str]
"""The pieces of a record that holds a completion, a completion, or the error of a row that was refused."""


@dataclass(slots=True)
class OutputRow:
    """One row of the output. Not frozen, because making a frozen one takes as long as writing it."""

    row: int
    """Index of the row of the corpus."""
    id: RowId | None
    """None for a row whose id cannot be read."""
    meta: dict[str, Any]
    """What the row of the corpus carries."""
    answer: Answer | None
    """None while its completion is missing."""
    prompt_tokens: int = 0
    return_token_ids: bool = False
    source: dict[str, Any] | None = None
    """The row of the corpus; None where it cannot be read."""

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated for it, over all samples."""
        answer = self.answer
        if isinstance(answer, Spans):
            return answer.num_tokens
        return answer.num_tokens if isinstance(answer, Completion) else 0

    @property
    def error(self) -> dict[str, str] | None:
        """`kind` and `message` of what went wrong with it."""
        answer = self.answer
        if answer is None or isinstance(answer, Spans):
            return None
        return answer.error if isinstance(answer, Completion) else answer

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What was generated for it; nothing for an error or while it is missing."""
        answer = self.answer
        if isinstance(answer, Spans):
            token_ids = tuple(map(int, answer.token_ids.split(b","))) if answer.token_ids else ()
            return (Sample(token_ids, text_of(answer), answer.finish_reason.decode()),)  # type: ignore[arg-type]
        return answer.samples if isinstance(answer, Completion) and answer.error is None else ()

    @property
    def value(self) -> dict[str, Any]:
        """The output row, as it stands in JSONL; raise `ValueError` while its completion is missing."""
        if self.answer is None:
            raise ValueError(f"row {self.row} has no completion yet")
        samples, error = self.samples, self.error
        output: dict[str, Any] = {
            "id": self.id,
            "text": samples[0].text if samples else None,
            "finish_reason": samples[0].finish_reason if samples else "error",
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens},
            "error": error,
        }
        if self.meta:
            output["meta"] = self.meta
        if self.return_token_ids:
            output["token_ids"] = list(samples[0].token_ids if samples else ())
        if samples and samples[0].logprobs is not None:
            output["logprobs"] = _logprobs(samples[0])
        if len(samples) > 1:
            output["samples"] = [_sample(sample, self.return_token_ids) for sample in samples]
        return output


def _sample(sample: Sample, return_token_ids: bool) -> dict[str, Any]:
    output: dict[str, Any] = {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "usage": {"completion_tokens": len(sample.token_ids)},
    }
    if return_token_ids:
        output["token_ids"] = list(sample.token_ids)
    if sample.logprobs is not None:
        output["logprobs"] = _logprobs(sample)
    return output


def _logprobs(sample: Sample) -> dict[str, Any]:
    """Return log probabilities as lists beside that of the tokens."""
    values = sample.logprobs or ()
    output: dict[str, Any] = {
        "token_ids": list(sample.token_ids),
        "token_logprobs": [chosen for chosen, _ in values],
    }
    if any(top for _, top in values):
        output["top_logprobs"] = [top for _, top in values]
    return output
