"""Run vLLM in the process of a rank, behind the `Engine` interface. Only this package imports vLLM.

vLLM plans batches, cache and workers; this project decides order, seeds, the end of a completion and how many requests
a rank takes. The tested versions have the private names that are used here.
"""

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hpc.engine.bounds import Bounds
from hpc.engine.failure import EngineFault, one_line
from hpc.engine.interface import OnStep, Source, begin, pull
from hpc.engine.sampling.choice import written
from hpc.engine.sampling.draw import stream
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog, StepShape
from hpc.request import TokenLogprobs
from hpc.trim import Decode, ending_tokens, ends_with_stop

MIN_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one without an error."""


class VllmEngine:
    """One replica of a model, driven by vLLM's LLMEngine.

    `decode` turns token ids into text; only requests with stop strings need it. vLLM gets no stop strings: it may
    decode some tokens differently, and then end a request where `trim` would not. So this class checks the text
    after each step and aborts a request that has ended.
    """

    def __init__(self, engine: Any, eos_token_ids: Collection[int], decode: Decode) -> None:
        self._engine = engine
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        config = engine.vllm_config
        self._context_tokens = int(config.model_config.max_model_len)
        self._max_seqs = int(config.scheduler_config.max_num_seqs)
        self.bounds = Bounds(self._max_seqs, int(config.scheduler_config.max_num_batched_tokens), *_cache(config))
        # Where the next step is planned before the last one has been read, a place that falls free is seen late.
        self._inside = self._max_seqs + (self._max_seqs // 16 if config.scheduler_config.async_scheduling else 0)
        self.steps = StepLog()
        self._computed: list[Any] = []
        self._watch(engine.engine_core.engine_core.scheduler)
        # Else its end-of-sequence tokens would be kept from rows that ignore them, up to their min_new_tokens.
        engine.input_processor.generation_config_fields.pop("eos_token_id", None)

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield sequences in the step in which they end, until the source is exhausted or `on_step` returns True."""
        live: dict[str, Sequence] = {}
        waiting: deque[Sequence] = deque()
        try:
            while live or waiting or (requests := pull(source, 1, on_step)):
                if not (live or waiting):
                    waiting.extend(begin(requests))
                began = time.perf_counter()
                ended = self._admit(live, waiting, source)
                ended += self._step(live) if live else []
                if ended:
                    yield ended
                over = on_step()
                self._note(time.perf_counter() - began)  # with what the rank does between two steps
                if over:
                    return
        finally:
            self._abort(live)

    def _admit(self, live: dict[str, Sequence], waiting: deque[Sequence], source: Source) -> list[Sequence]:
        """Add requests to vLLM while it has room, in the order of the source; return those that it refuses."""
        from vllm.exceptions import VLLMClientError

        refused = []
        while len(live) < self._inside:
            if not waiting:
                waiting.extend(begin(source.pull(1)))
            if not waiting:
                break
            sequence = waiting.popleft()
            name = f"{sequence.request.row}-{sequence.sample}"
            try:
                prompt = {"prompt_token_ids": sequence.request.token_ids.tolist()}
                self._engine.add_request(name, prompt, self._parameters(sequence))
                live[name] = sequence
            except (ValueError, VLLMClientError) as error:  # of this request alone
                sequence.error = one_line(error)
                refused.append(sequence)
        return refused

    def _parameters(self, sequence: Sequence) -> Any:
        """Return vLLM's sampling parameters of a sample; raise `ValueError` for a value that it does not support."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = sequence.request.sampling
        if 0 < asked.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"the temperature is {asked.temperature}; vLLM knows 0 (greedy), and none between it and "
                f"{MIN_TEMPERATURE}"
            )
        endings = ending_tokens(asked, self._eos_token_ids)
        return SamplingParams(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            seed=None if asked.greedy else stream(asked.seed, sequence.request.id, sequence.sample) >> 1,  # signed
            max_tokens=asked.max_new_tokens,
            min_tokens=asked.min_new_tokens,
            ignore_eos=True,  # the endings are told one by one
            stop_token_ids=sorted(endings),
            logprobs=asked.logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if asked.stop else RequestOutputKind.FINAL_ONLY,
        )

    def _step(self, live: dict[str, Sequence]) -> list[Sequence]:
        """Compute a step; remove the sequences that have ended from `live` and return them."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            raise EngineFault(
                f"vLLM has failed with {len(live)} requests under way: {one_line(error)}; see this rank's log"
            ) from error
        ended, stopped = [], []
        for output in outputs:
            sequence, [found] = live[output.request_id], output.outputs
            self._extend(sequence, found)
            asked = sequence.request.sampling
            stops = ends_with_stop(
                sequence.token_ids, asked.stop, self._decode, asked.min_new_tokens, sequence.request.token_ids
            )
            if stops and not output.finished:
                stopped.append(output.request_id)
            if stops or output.finished:
                del live[output.request_id]
                if not stops and found.finish_reason == "length" and len(sequence.token_ids) < asked.max_new_tokens:
                    sequence.error = (
                        f"it reached vLLM's limit of {self._context_tokens} tokens after "
                        f"{len(sequence.token_ids)} new ones; give a larger --vllm.max-model-len"
                    )
                elif found.finish_reason not in (None, "stop", "length"):
                    sequence.error = f'vLLM ended it with "{found.finish_reason}"'
                ended.append(sequence)
        if stopped:
            self._engine.abort_request(stopped)
        return ended

    @property
    def context_tokens(self) -> int:
        """Maximum tokens of a sequence, the prompt included."""
        return self._context_tokens

    @staticmethod
    def _extend(sequence: Sequence, found: Any) -> None:
        """Append the tokens and log probabilities of an output, which has the newest tokens or all of them."""
        sequence.token_ids += found.token_ids
        count = sequence.request.sampling.logprobs
        if count is not None:
            places = zip(found.token_ids, found.logprobs, strict=True)
            sequence.logprobs += [_logprobs(token, entries, count) for token, entries in places]

    def _abort(self, live: Mapping[str, Sequence]) -> None:
        if live:
            with contextlib.suppress(Exception):  # it may be dead; then that is said already
                self._engine.abort_request(list(live))

    def _watch(self, scheduler: Any) -> None:
        """Wrap the scheduler so that it records the plan of each computed step."""
        update = scheduler.update_from_output

        def noting(planned: Any, *arguments: Any) -> Any:
            if planned.total_num_scheduled_tokens:
                self._computed.append(planned)
            return update(planned, *arguments)

        scheduler.update_from_output = noting

    def _note(self, seconds: float) -> None:
        """Log the computed steps with their shapes, dividing the time evenly; the first plan computes none."""
        for planned in self._computed:
            self.steps.add(shape(planned), seconds / len(self._computed))
            self.steps.totals.cached_tokens += sum(new.num_computed_tokens for new in planned.scheduled_new_reqs)
        self._computed.clear()


def shape(planned: Any) -> StepShape:
    """Return the shape of a step that vLLM's scheduler has planned.

    vLLM samples a token after every part of a prompt, and discards it unless the prompt is complete.
    """
    counts: Mapping[str, int] = planned.num_scheduled_tokens
    prompts = [(counts[new.req_id], new.num_computed_tokens) for new in planned.scheduled_new_reqs]
    kv, cached = 0, planned.scheduled_cached_reqs
    for name, stored, generated in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        if generated:
            kv += stored
        else:
            prompts.append((counts[name], stored))
    return StepShape(
        tokens=planned.total_num_scheduled_tokens,
        prompt=sum(count for count, _ in prompts),
        chosen=len(counts),
        pairs=float(sum(count * (stored + count / 2) for count, stored in prompts)),
        kv=kv,
    )


def _logprobs(token: int, entries: Mapping[int, Any], count: int) -> TokenLogprobs:
    """Return the log probability of a token and the top `count`; vLLM adds the chosen token to these."""
    top = sorted(((other, entry.logprob) for other, entry in entries.items()), key=lambda pair: -pair[1])[:count]
    return written(entries[token].logprob), tuple((other, written(value)) for other, value in top)


def _cache(config: Any) -> tuple[int, int]:
    """Return the capacity of vLLM's cache in tokens, and the bytes of a token."""
    model, cache = config.model_config, config.cache_config
    heads = model.get_total_num_kv_heads()
    layers = getattr(model.hf_text_config, "num_hidden_layers", 1)
    size = 1 if str(cache.cache_dtype).startswith("fp8") else model.dtype.itemsize
    return int(cache.num_gpu_blocks * cache.block_size), int(2 * layers * heads * model.get_head_size() * size)
