"""A sequence: one sample of a request, from its first token until it has ended."""

from dataclasses import dataclass, field

from hpc.request import Request, TokenLogprobs


@dataclass(slots=True)
class Sequence:
    """One sample of a request, while it grows and when it has ended."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens; those behind the end, if an engine ran past it, are trimmed later."""
    error: str | None = None
    """Why this request cannot be completed, for example because it does not fit in memory alone."""
    sample: int = 0
    """Index among the `n` samples of its request, each of which is a sequence of its own."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry per token, if the request asks for log probabilities."""
    cut: bool = False
    """Its ending token is there only because it was at its limit: the decoder of an encoder-decoder may force one."""
    guessed: int = 0
    """Draft tokens that were computed for it."""
    accepted: int = 0
    """Draft tokens among them that the model chose itself."""
