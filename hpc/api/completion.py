"""The completion that a Python call returns."""

from dataclasses import dataclass, field

from hpc.request import Completion as Generated
from hpc.request import FinishReason, RowId, Sample, TokenLogprobs


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt, and of all samples that were generated for it."""

    prompt_tokens: int
    completion_tokens: int
    """The ending tokens included."""


@dataclass(frozen=True)
class CompletionError:
    """Why a row has no completion."""

    kind: str
    """A word for programs: "too_long", "sampling", "engine", …"""
    message: str
    """The row, the value, the rule and the way out."""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Completion:
    """The answer to one row: its first sample, as in the output of a job, and all of them where it asked for several.

    A row that breaks a rule, or that the engine cannot generate, has an `error`, no text and no samples.
    """

    index: int
    """Place of its row among those that were given, from 0."""
    id: RowId | None
    """The row's "id"; its index where it has none; None where it cannot be read."""
    text: str | None
    """Text before the ending token or the stop string; None with an error."""
    finish_reason: FinishReason
    """"stop", "length" or "error"."""
    usage: Usage
    error: CompletionError | None = None
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    """Generated tokens, the ending one included."""
    logprobs: tuple[TokenLogprobs, ...] | None = field(default=None, repr=False)
    """Of each token, where asked for: its log probability, and pairs of the most probable tokens with theirs."""
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    """All `n` samples, the first too; each has text, token_ids, finish_reason and logprobs."""

    @property
    def texts(self) -> list[str | None]:
        """The text of every sample."""
        return [sample.text for sample in self.samples]


def refused(index: int, identity: RowId | None, error: dict[str, str]) -> Completion:
    """Return the completion of a row that cannot be a request."""
    return Completion(index, identity, None, "error", Usage(0, 0), CompletionError(**error))


def completed(index: int, identity: RowId | None, prompt_tokens: int, generated: Generated) -> Completion:
    """Return the completion of a row that a generated completion answers."""
    usage = Usage(prompt_tokens, generated.num_tokens)
    if generated.error is not None:
        return Completion(index, identity, None, "error", usage, CompletionError(**generated.error))
    first, samples = generated.samples[0], generated.samples
    return Completion(
        index, identity, first.text, first.finish_reason, usage, None, first.token_ids, first.logprobs, samples
    )
