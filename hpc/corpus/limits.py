"""What the model and the job allow of a request: which tokens, and how many; a prompt that is too long may be cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hpc.corpus.errors import RowError
from hpc.sampling_params import SamplingParams

Frame = Callable[[], tuple[int, int]]
"""Returns how many tokens of the tokenizer stand before and behind a text."""
Fitted = tuple[list[int], SamplingParams]
"""The tokens of a prompt, and what it asks for, as they fit the model."""


@dataclass(frozen=True)
class OutputLimits:
    """What an encoder-decoder allows of a completion."""

    vocab_size: int
    tokens: int | None
    """Max tokens of a completion; None is no limit."""
    begins: bool = False
    """The model itself says how the output begins: no target language needs to be named."""


@dataclass(frozen=True)
class PromptLimits:
    """What the model and the job allow."""

    vocab_size: int
    context_tokens: int | None
    """Max tokens of prompt and completion together, of an encoder-decoder those of the prompt; None is no limit."""
    truncate_prompts: str = "none"
    chat_ending: int | None = None
    """A token that ends the completion of a chat, besides the model's end-of-sequence tokens."""
    output: OutputLimits | None = None
    """The limits of an encoder-decoder's completions; None for a causal language model."""

    def check_given(self, token_ids: Sequence[int]) -> None:
        """Raise `RowError` for the first of a row's own token ids that the model has not."""
        for index, token in enumerate(token_ids):
            if not 0 <= token < self.vocab_size:
                raise RowError(
                    "token_ids",
                    f'"prompt_token_ids"[{index}] is {token}; the token ids of the model are '
                    f"0 to {self.vocab_size - 1}",
                )

    def check_tokenized(self, token_ids: Sequence[int], name: Callable[[int], str]) -> None:
        """Raise `RowError` for a text for which the tokenizer has tokens that the model has not."""
        if token_ids and max(token_ids) >= self.vocab_size:
            token = next(token for token in token_ids if token >= self.vocab_size)
            raise RowError(
                "token_ids",
                f"the tokenizer makes token {token} ({name(token)!r}) of this text, and the token ids of "
                f"the model are 0 to {self.vocab_size - 1}: tokenizer or chat template are not this model's; "
                "give the folder of the model the files that it was trained with",
            )

    def check_forced(self, first: int | None) -> None:
        """Raise `RowError` for a `forced_bos_token_id` that the model's output does not have."""
        if first is None:
            return
        if self.output is None:
            raise RowError(
                "sampling",
                f'"forced_bos_token_id" is {first}; it is for models with an encoder and a decoder: leave it out',
            )
        if first >= self.output.vocab_size:
            raise RowError(
                "sampling",
                f'"forced_bos_token_id" is {first}; the model\'s output has tokens 0 to {self.output.vocab_size - 1}',
            )

    def fit(self, token_ids: list[int], sampling: SamplingParams, exact: bool, frame: Frame) -> Fitted:
        """Return what of a prompt and of its `max_new_tokens` fits the model.

        With `exact` the row is to have as many new tokens as it asks for. Raises `RowError` for an empty prompt, and
        for one that must not be cut.
        """
        if not token_ids:
            raise RowError("empty", "the prompt has no tokens; it must have at least one")
        if self.output is not None:
            return self._fit_sides(token_ids, sampling, self.output, frame)
        return self._fit_context(token_ids, sampling, exact)

    def _fit_context(self, token_ids: list[int], sampling: SamplingParams, exact: bool) -> Fitted:
        """Fit prompt and completion to the context that they share."""
        context, new, count = self.context_tokens, sampling.max_new_tokens, len(token_ids)
        if context is None:
            return token_ids, sampling
        if exact and (new >= context or (count + new > context and not self.truncates)):
            raise RowError(
                "too_long",
                f"the prompt has {count} tokens and asks for {new} more, and the model's context is "
                f"{context}; ask for fewer, or leave max_tokens out to get what is left",
            )
        if count + (new if exact else 0) >= context + exact:
            if not self.truncates:
                raise RowError(
                    "too_long",
                    f"the prompt has {count} tokens; at most {context - 1} leave room for one more in "
                    f"the model's context of {context}; shorten it, or cut it with --truncate-prompts left or right",
                )
            token_ids = self._cut(token_ids, context - (new if exact else min(new, context // 2)))
        return token_ids, _at_most(sampling, context - len(token_ids))

    def _fit_sides(self, token_ids: list[int], sampling: SamplingParams, output: OutputLimits, frame: Frame) -> Fitted:
        """Fit the source to the encoder of an encoder-decoder, and the completion to the decoder."""
        room, count = self.context_tokens, len(token_ids)
        if output.tokens is not None:
            sampling = _at_most(sampling, output.tokens)
        if room is None or count <= room:
            return token_ids, sampling
        if not self.truncates:
            raise RowError(
                "too_long",
                f"the prompt has {count} tokens; the encoder of the model takes at most {room}; shorten it, or cut it "
                "with --truncate-prompts left or right",
            )
        # What the tokenizer puts around a text stays: its language, and the token that ends it.
        head, end = frame()
        text = self._cut(token_ids[head : count - end], max(1, room - head - end))
        return [*token_ids[:head], *text, *token_ids[count - end :]][:room], sampling

    def _cut(self, token_ids: list[int], room: int) -> list[int]:
        return token_ids[-room:] if self.truncate_prompts == "left" else token_ids[:room]

    @property
    def truncates(self) -> bool:
        """Whether a prompt that is too long is cut."""
        return self.truncate_prompts != "none"


def _at_most(sampling: SamplingParams, new_tokens: int) -> SamplingParams:
    """Return parameters that ask for no more tokens than there is room for."""
    new = min(sampling.max_new_tokens, new_tokens)
    least = min(sampling.min_new_tokens, new)
    if (new, least) == (sampling.max_new_tokens, sampling.min_new_tokens):
        return sampling
    return replace(sampling, max_new_tokens=new, min_new_tokens=least)
