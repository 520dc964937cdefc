"""The responses of OpenAI's batch API: a line for every row, whatever became of it.

The shapes are those of the `openai` package's own types, which the tests check them with.
"""

import hashlib
import json
from typing import Any

from hpc.corpus.openai import COMPLETIONS, endpoint, is_batch_line
from hpc.output.facts import Facts
from hpc.output.formats.jsonl import encode
from hpc.output.formats.lines import Lines
from hpc.output.row import OutputRow
from hpc.request import Completion, RowId, Sample, TokenLogprobs

NOT_RUN = {"code": "not_run", "message": "the run has not come to this line yet; run the same command again"}
_ID_BYTES = 12


class OpenAI(Lines):
    """A line says the answer of the API to a request."""

    has_missing = True

    def __init__(self, facts: Facts, packing: str = "") -> None:
        super().__init__(packing)
        self._facts = facts

    def entry(self, row: OutputRow) -> bytes:
        """Return the line of a row, also of one that has no answer yet."""
        name = self._custom_id(row)
        # Of the completion's key, so that it is the same after a resume; rows with one key differ in their ids.
        key = b"" if isinstance(row.answer, dict) else self._facts.tokens.key(row.row)
        seed = key + json.dumps([name, row.error["message"] if row.error and name is None else None]).encode()
        digest = hashlib.blake2b(seed, digest_size=_ID_BYTES).hexdigest()
        value: dict[str, Any] = {"id": f"batch_req_{digest}", "custom_id": name, "response": None, "error": None}
        if row.answer is None:
            value["error"] = NOT_RUN
        else:
            code, body = (200, self._body(row, key)) if row.error is None else _refusal(row)
            value["response"] = {"status_code": code, "request_id": f"req_{digest}", "body": body}
        return encode(value)

    def name_of(self, identity: RowId | None, error: dict[str, str] | None) -> str:
        """Return the id, which is a string in this format."""
        return super().name_of(identity if identity is None else str(identity), error)

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the name that a line says."""
        if value is None:
            return self.name_of(None, None)
        error: Any = value.get("response")
        for key in ("body", "error"):
            error = error.get(key) if isinstance(error, dict) else None
        known = isinstance(error, dict) and isinstance(error.get("message"), str)
        return self.name_of(value.get("custom_id"), error if known else None)

    def without_meta(self, entry: bytes) -> Any:
        """Return what a line says without the form of its body, which follows from the url that was asked for."""
        value = self.value(entry)
        body = ((value or {}).get("response") or {}).get("body") or {}
        if value is None or "choices" not in body:
            return entry
        choices = [
            (choice.get("text", (choice.get("message") or {}).get("content")), choice.get("finish_reason"))
            for choice in body["choices"]
        ]
        return {**value, "response": {"choices": choices, "usage": body.get("usage")}}

    def value(self, entry: Any) -> dict[str, Any] | None:
        """Return the object of a line."""
        return entry if isinstance(entry, dict) else super().value(entry)

    def _custom_id(self, row: OutputRow) -> str | None:
        given = row.id if row.source is None else row.source.get("custom_id", row.id)
        return given if given is None or isinstance(given, str) else str(given)

    def _body(self, row: OutputRow, key: bytes) -> dict[str, Any]:
        chat = not _asks_for_text(row.source or {})
        choice = self._chat_choice if chat else self._text_choice
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{key.hex()}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._facts.created,
            "model": self._facts.model,
            "choices": [choice(index, sample) for index, sample in enumerate(row.samples)],
            "usage": {
                "prompt_tokens": row.prompt_tokens,
                "completion_tokens": row.completion_tokens,
                "total_tokens": row.prompt_tokens + row.completion_tokens,
            },
        }

    def _chat_choice(self, index: int, sample: Sample) -> dict[str, Any]:
        logprobs: Any = None
        if sample.logprobs is not None:
            content = [self._token(*each) for each in zip(sample.token_ids, sample.logprobs, strict=True)]
            logprobs = {"content": content, "refusal": None}
        return {
            "index": index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
        }

    def _token(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        chosen, top = logprobs
        return {
            **self._written(token),
            "logprob": chosen,
            "top_logprobs": [{**self._written(each), "logprob": logprob} for each, logprob in top],
        }

    def _text_choice(self, index: int, sample: Sample) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if sample.logprobs is not None:
            tokens = [self._written(token)["token"] for token in sample.token_ids]
            offsets, end = [], 0
            for token in tokens:
                offsets.append(end)
                end += len(token)
            tops: list[dict[str, float]] = []
            for _, top in sample.logprobs:
                named: dict[str, float] = {}
                for each, logprob in top:  # the more probable of two that are written alike
                    named.setdefault(self._written(each)["token"], logprob)
                tops.append(named)
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [chosen for chosen, _ in sample.logprobs],
                "top_logprobs": tops if any(tops) else None,
                "text_offset": offsets,
            }
        return {"index": index, "text": sample.text, "logprobs": logprobs, "finish_reason": sample.finish_reason}

    def _written(self, token: int) -> dict[str, Any]:
        """Return how a token is written: its text and bytes, or its number where they are not known."""
        data = self._facts.token_bytes(token)
        if data is None:
            return {"token": f"token_id:{token}", "bytes": None}
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}


def _asks_for_text(source: dict[str, Any]) -> bool:
    """Say whether a row asks for the completion of a text, and not of a chat."""
    if is_batch_line(source):
        return endpoint(source) == COMPLETIONS
    return source.get("messages") is None and not isinstance(source.get("prompt"), list)


def _refusal(row: OutputRow) -> tuple[int, dict[str, Any]]:
    """Return status code and body of a row with an error: the request's fault, or the server's."""
    error = row.error or {}
    server = isinstance(row.answer, Completion)
    kind = "server_error" if server else "invalid_request_error"
    about = {"message": error.get("message"), "type": kind, "param": None, "code": error.get("kind")}
    return 500 if server else 400, {"error": about}
