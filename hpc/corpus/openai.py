"""Read a line of OpenAI's batch format as a row of our own, parameter by parameter. Pure.

Nothing of a body is ignored in silence: a parameter is honoured, changes nothing here, or makes an error row. The table
stands in docs/formats.md.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hpc.corpus.decode import short
from hpc.corpus.errors import RowError
from hpc.corpus.turns import CHAT_KEYS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LINE_KEYS = {"custom_id", "method", "url"}
COMPLETIONS_MAX_TOKENS = 16
"""`max_tokens` of a completion that says none, for the API and for vLLM."""

_SAMPLING: Mapping[str, str] = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "n": "n", "seed": "seed",
    "stop": "stop", "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "min_tokens": "min_new_tokens",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
}  # fmt: skip
"""Parameters that we have, by our names; of two that give one, the later goes before."""

_NO_EFFECT = frozenset({
    "model", "stream", "stream_options", "user", "store", "metadata", "service_tier", "parallel_tool_calls",
    "priority", "request_id", "cache_salt", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "spaces_between_special_tokens",
})  # fmt: skip
"""Parameters that change nothing of a completion here, whatever their value."""

_LATER = "it is not served yet"
_UNSERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), _LATER),
    "structured_outputs": ((), _LATER),
    "guided_json": ((), _LATER),
    "guided_regex": ((), _LATER),
    "guided_choice": ((), _LATER),
    "guided_grammar": ((), _LATER),
    "guided_decoding_backend": ((), _LATER),
    "guided_whitespace_pattern": ((), _LATER),
    "logit_bias": (({},), _LATER),
    "allowed_token_ids": ((), _LATER),
    "bad_words": (([],), _LATER),
    "prompt_logprobs": ((), _LATER),
    "logprob_token_ids": ((), _LATER),
    "echo": ((False,), _LATER),
    "suffix": (("",), "text in the middle is not filled in"),
    "thinking_token_budget": ((), _LATER),
    "include_reasoning": ((True,), "reasoning stays in the text"),
    "truncate_prompt_tokens": ((), "prompts are cut by --truncate-prompts left or right alone"),
    "truncation_side": ((), "prompts are cut by --truncate-prompts left or right alone"),
    "skip_special_tokens": ((True,), "special tokens are always left out of the text"),
    "include_stop_str_in_output": ((False,), "the text always ends before the stop string"),
    "return_token_ids": ((False,), "token ids are returned for all rows, with --return-token-ids"),
    "return_tokens_as_token_ids": ((False,), "token ids are returned with --return-token-ids"),
    "add_special_tokens": ((), "a completion's prompt has them, a chat's has those of its template"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "best_of": ((1,), 'ask for all samples with "n"'),
    "modalities": ((["text"],), "only text comes out"),
    "audio": ((), "only text comes out"),
    "tool_choice": (("auto", "none"), "no call of a tool can be forced yet"),
    "functions": ((), 'it is the old name; write "tools"'),
    "function_call": (("auto", "none"), 'it is the old name; write "tools"'),
    "web_search_options": ((), "nothing outside the cluster is reached"),
    "verbosity": ((), _LATER),
    "mm_processor_kwargs": (({},), "only text goes in"),
    "vllm_xargs": (({},), _LATER),
}
"""Parameters that make an error row, but for these values, which ask for nothing; and the reason."""

_CHAT_ONLY = frozenset({"messages", "top_logprobs", "reasoning_effort", "tool_choice", *CHAT_KEYS})
_COMPLETIONS_ONLY = frozenset({"prompt"})


@dataclass(frozen=True)
class BatchRules:
    """What a job says of the lines of a batch."""

    unknown_parameters: Literal["refuse", "ignore"] = "refuse"
    served: frozenset[str] = frozenset()
    """Names by which the job's model may be asked for; empty where any will do."""
    temperature: float = 0.0
    """That of the job, which holds where a body says none."""
    token_ids: bool = False
    """Whether the job returns token ids."""


@dataclass(frozen=True)
class BatchRow:
    """A line of a batch as a row of our own."""

    row: dict[str, Any]
    """In the keys of our own rows, without an id."""
    names: Mapping[str, str]
    """Parameters that the body calls by another name: ours and theirs."""
    exact_length: bool
    """Whether the body says how many tokens it wants: fewer than these are not what it asks for."""
    notes: tuple[str, ...]
    """What the user should hear of once."""


def is_batch_line(value: Mapping[str, Any]) -> bool:
    """Say whether a row is a line of a batch: by its keys alone, however broken their values are."""
    marked = ("custom_id" in value or "url" in value) if "body" in value else value.keys() >= _LINE_KEYS
    return marked and value.get("prompt") is None and value.get("messages") is None


def endpoint(value: Mapping[str, Any]) -> str:
    """Return the url that a line asks for, where it says none by what its body has; raise `RowError` for another."""
    url = value.get("url")
    if url is None:
        body = value.get("body")
        return COMPLETIONS if isinstance(body, dict) and "messages" not in body and "prompt" in body else CHAT
    if url not in (CHAT, COMPLETIONS):
        raise RowError("url", f'"url" is {short(url)}; it must be {CHAT} or {COMPLETIONS}, others are not served')
    return str(url)


def batch_id(value: Mapping[str, Any]) -> str:
    """Return the id of a line; raise `RowError` if it is no string."""
    given = value.get("custom_id")
    if not isinstance(given, str):
        raise RowError("id", f'"custom_id" is {short(given)}; it must be a string')
    return given


def read_batch_line(value: Mapping[str, Any], rules: BatchRules) -> BatchRow:
    """Return a line as a row of our own; raise `RowError`, which names the parameter, for what is not served."""
    if value.get("method") not in (None, "POST"):
        raise RowError("method", f'"method" is {short(value["method"])}; it must be POST')
    url = endpoint(value)
    body = value.get("body")
    if not isinstance(body, dict):
        raise RowError("body", f'"body" is {short(body)}; it must be an object, the parameters of {url}')
    body = {name: given for name, given in body.items() if given is not None}
    notes = _check_names(body, url, rules)
    row = _chat(body) if url == CHAT else _prompt(body)
    sampling, names = _sampling(body, url)
    if sampling:
        row["sampling"] = sampling
    if "temperature" not in body:
        notes.append(
            f'lines without "temperature" take the job\'s, {rules.temperature:g}, where the API would take 1: '
            "--sampling.temperature 1 does so"
        )
    if "model" in body and rules.served and str(body["model"]) not in rules.served:
        notes.append(f"lines ask for the model {short(body['model'])}; {min(rules.served, key=len)} answers them")
    return BatchRow(row, names, "max_tokens" in body or "max_completion_tokens" in body, tuple(notes))


def _check_names(body: Mapping[str, Any], url: str, rules: BatchRules) -> list[str]:
    """Return what is to be said of parameters that are ignored; raise `RowError` for one that cannot be served."""
    known = known_parameters(url)
    notes = []
    for name, given in body.items():
        if name not in known:
            if rules.unknown_parameters == "refuse":
                [nearest] = difflib.get_close_matches(name, sorted(known), 1, 0.0)
                raise RowError(
                    "parameter",
                    f'"{short(name)}" is no parameter of {url} that is known here; the nearest is "{nearest}". '
                    "--unknown-parameters ignore leaves such out",
                )
            notes.append(f'the parameter "{short(name)}" of lines is unknown, and ignored (--unknown-parameters)')
        elif name in _UNSERVED and not _asks_for_nothing(name, given, body, url, rules):
            raise RowError("parameter", f'"{name}" is {short(given)}; {_UNSERVED[name][1]}: leave it out')
    return notes


def _asks_for_nothing(name: str, given: Any, body: Mapping[str, Any], url: str, rules: BatchRules) -> bool:
    if name == "return_token_ids" and rules.token_ids:
        return True
    if name == "best_of" and given == body.get("n", 1):
        return True
    if name == "add_special_tokens":
        return given is (url == COMPLETIONS)
    return any(type(given) is type(off) and given == off for off in _UNSERVED[name][0])


@functools.cache
def known_parameters(url: str) -> frozenset[str]:
    """Return the names of all parameters of which it is known what to do with them."""
    names = _NO_EFFECT | _UNSERVED.keys() | _SAMPLING.keys() | {"logprobs"} | _CHAT_ONLY | _COMPLETIONS_ONLY
    return frozenset(names - (_COMPLETIONS_ONLY if url == CHAT else _CHAT_ONLY))


def _sampling(body: Mapping[str, Any], url: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the sampling parameters of a body, and by our names theirs where they differ."""
    sampling, names = {}, {}
    for theirs, ours in _SAMPLING.items():
        if theirs in body:
            sampling[ours] = body[theirs]
            if theirs != ours:
                names[ours] = theirs
    if "max_new_tokens" not in sampling and url == COMPLETIONS:
        sampling["max_new_tokens"] = COMPLETIONS_MAX_TOKENS
    asked = body.get("logprobs")
    if url == COMPLETIONS:
        if asked is not None:
            sampling["logprobs"] = asked
        return sampling, names
    if asked is not None and not isinstance(asked, bool):
        raise RowError("sampling", f'"logprobs" is {short(asked)}; of a chat it must be true or false')
    top = body.get("top_logprobs")
    if asked:
        sampling["logprobs"] = 0 if top is None else top
        names["logprobs"] = "top_logprobs"
    elif top not in (None, 0):
        raise RowError("sampling", f'"top_logprobs" is {short(top)}; it needs "logprobs": true beside it')
    return sampling, names


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the turns of a body, and what else goes to the chat template."""
    if "messages" not in body:
        raise RowError("prompt", f'"body" has no "messages" but {short(list(body))}; a line of {CHAT} must have them')
    row = {name: body[name] for name in ("messages", *CHAT_KEYS) if name in body}
    if "reasoning_effort" in body:
        effort = body["reasoning_effort"]
        if not isinstance(effort, str):
            raise RowError("parameter", f'"reasoning_effort" is {short(effort)}; it must be a word')
        own = row.get("chat_template_kwargs", {})
        if isinstance(own, dict):
            row["chat_template_kwargs"] = {"reasoning_effort": effort, "enable_thinking": effort != "none", **own}
    return row


def _prompt(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt of a completion: a text, or token ids; a list of one stands for the one."""
    if "prompt" not in body:
        raise RowError(
            "prompt", f'"body" has no "prompt" but {short(list(body))}; a line of {COMPLETIONS} must have it'
        )
    prompt = body["prompt"]
    if isinstance(prompt, list) and any(isinstance(each, str | list) for each in prompt):
        if len(prompt) != 1:
            raise RowError(
                "prompt", f'"prompt" is a list of {len(prompt)} prompts; a line must have one: make lines of them'
            )
        [prompt] = prompt
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else {"prompt": prompt}
