"""Sampling parameters, in transformers' and vLLM's names, checked when they are made."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INT_MAX = 2**31 - 1
_MAX_SAMPLES = 10_000
_MAX_LOGPROBS = 20
_WHOLE = ("max_new_tokens", "top_k", "n", "min_new_tokens", "logprobs", "seed")
_FIRST_PARAMETERS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "seed",
)  # fmt: skip


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise `ValueError` with name, value and rule unless a condition holds."""
    if not condition:
        raise ValueError(f'"{name}" is {value!r}; {rule}')


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends."""

    max_new_tokens: int = 256
    """Maximum tokens to generate for a row; fewer where the model's context leaves less."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 is greedy."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this; 1 is all."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 or -1 is all."""
    min_p: float = 0.0
    """Draw from the tokens that have this share of the highest probability, or more; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens so far, multiplies negative; 1 is off. Counts prompt and completion."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that has been generated; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated; 0 is off."""
    n: int = 1
    """Samples of each prompt; several need a temperature above 0."""
    min_new_tokens: int = 0
    """Minimum tokens: before, no ending token is chosen and no stop string counts; only the limit ends a row."""
    logprobs: int | None = None
    """Add log probabilities, of the raw logits; 0 adds that of each chosen token, k (at most 20) of the k most probable
    too."""
    stop: tuple[str, ...] = ()
    """End where one of these strings appears; the text is cut before it."""
    stop_token_ids: tuple[int, ...] = ()
    """End at one of these tokens, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-sequence tokens."""
    forced_bos_token_id: int | None = None
    """First token of an encoder-decoder's output; tells NLLB or M2M100 the target language, which --target-lang does by
    its name. The model's own otherwise."""
    seed: int = 0
    """Seed of a row's random numbers, together with its id."""

    def __post_init__(self) -> None:
        require(_is_int(self.max_new_tokens), "max_new_tokens", self.max_new_tokens, "it must be an integer")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "it must be at least 1")
        require(
            self.max_new_tokens <= _INT_MAX, "max_new_tokens", self.max_new_tokens, f"it must be at most {_INT_MAX}"
        )
        require(_is_number(self.temperature), "temperature", self.temperature, "it must be a number")
        require(
            self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "temperature",
            self.temperature,
            "it must be 0 (greedy), or from 0.0001 to 10000",
        )
        require(_is_number(self.top_p), "top_p", self.top_p, "it must be a number")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "it must be above 0 and at most 1 (1 is off)")
        require(_is_int(self.top_k), "top_k", self.top_k, "it must be an integer")
        if self.top_k == -1:  # vLLM's word for all
            object.__setattr__(self, "top_k", 0)
        require(0 <= self.top_k <= _INT_MAX, "top_k", self.top_k, f"it must be from 0 or -1 (off) to {_INT_MAX}")
        for name, minimum, maximum, rule in (
            ("min_p", 0, 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.01, 100, "from 0.01 to 100 (1 is off)"),
            ("presence_penalty", -2, 2, "from -2 to 2 (0 is off)"),
            ("frequency_penalty", -2, 2, "from -2 to 2 (0 is off)"),
        ):
            value = getattr(self, name)
            require(_is_number(value), name, value, "it must be a number")
            require(minimum <= value <= maximum, name, value, f"it must be {rule}")
        require(_is_int(self.n), "n", self.n, "it must be an integer")
        require(1 <= self.n <= _MAX_SAMPLES, "n", self.n, f"it must be from 1 to {_MAX_SAMPLES}")
        require(
            self.n == 1 or not self.greedy,
            "n",
            self.n,
            "it must be 1 where the temperature is 0, since all samples would be the same; set a temperature above 0",
        )
        require(_is_int(self.min_new_tokens), "min_new_tokens", self.min_new_tokens, "it must be an integer")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"it must be from 0 (off) to max_new_tokens ({self.max_new_tokens})",
        )
        require(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= _MAX_LOGPROBS),
            "logprobs",
            self.logprobs,
            f"it must be an integer from 0 (the chosen tokens' alone) to {_MAX_LOGPROBS}, or none at all",
        )
        require(
            isinstance(self.stop, tuple) and all(_is_text(string) for string in self.stop),
            "stop",
            self.stop,
            "it must be a list of non-empty strings of Unicode text",
        )
        require(
            isinstance(self.stop_token_ids, tuple)
            and all(_is_int(t) and 0 <= t <= _INT_MAX for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            f"it must be a list of token ids (integers from 0 to {_INT_MAX})",
        )
        require(
            self.forced_bos_token_id is None
            or (_is_int(self.forced_bos_token_id) and 0 <= self.forced_bos_token_id <= _INT_MAX),
            "forced_bos_token_id",
            self.forced_bos_token_id,
            f"it must be a token id (an integer from 0 to {_INT_MAX}), or none at all",
        )
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "it must be true or false")
        require(_is_int(self.seed), "seed", self.seed, "it must be an integer")
        # 1 and 1.0, 0.0 and -0.0 are the same and must give the same key.
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at every step."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits of the next."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def override(self, values: Mapping[str, Any]) -> "SamplingParams":
        """Return these parameters with some of them replaced.

        `values` comes from JSON: lists stand for tuples, one string for a list of one, null for what is not
        given, a float for the whole number that it is. Raises `ValueError` for a name that is none of the
        parameters, or a value that breaks its rule.
        """
        names = [f.name for f in dataclasses.fields(self)]
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:  # absent; what is not given is as it was
                continue
            if name not in names:
                raise ValueError(f'"{name}" is no sampling parameter; the parameters are {", ".join(names)}')
            if name == "stop" and isinstance(value, str):
                value = [value]
            if isinstance(value, float) and value.is_integer() and name in _WHOLE:  # pandas' integers beside gaps
                value = int(value)
            changes[name] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(self, **changes)

    def overridden(self, values: Mapping[str, Any]) -> "SamplingParams":
        """Return `override(values)`, cached, since rows tend to ask for the same."""
        return _overridden(self, json.dumps(values))

    def identity(self) -> dict[str, Any]:
        """Return what a completion depends on: for a greedy request, no parameter of drawing.

        A parameter that is younger than the first journals is left out where it has its default, so
        that their completions are found again.
        """
        values = dict(vars(self))
        if self.greedy:
            for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
                del values[name]
        for younger in dataclasses.fields(self):
            if younger.name not in _FIRST_PARAMETERS and values.get(younger.name) == younger.default:
                values.pop(younger.name, None)
        return values


@functools.lru_cache(maxsize=1 << 14)
def _overridden(defaults: SamplingParams, values: str) -> SamplingParams:
    return defaults.override(json.loads(values))
