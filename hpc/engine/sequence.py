"""A sample of a request while it grows."""

from dataclasses import dataclass, field

from hpc.request import Request, TokenLogprobs


@dataclass(slots=True)
class Sequence:
    """A sample of a request while it grows, and when it has ended."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    """Generated so far; an engine may run past the end, which is then trimmed."""
    error: str | None = None
    """Why this request cannot be completed, for example that it alone does not fit in memory."""
    sample: int = 0
    """Index among the `n` samples of its request, each of which is a sequence of its own."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each token, where the request asks for them."""
    cut: bool = False
    """Its ending token is there only because it was at its limit: the decoder of an encoder-decoder may force one."""
    guessed: int = 0
    """Tokens that were guessed while it grew."""
    accepted: int = 0
    """Those among them that the model chose."""
