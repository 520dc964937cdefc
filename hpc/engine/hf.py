"""The `hf` engine: transformers' `generate` on padded batches of one length bucket.

It is the reference that other engines are compared with, and serves every causal language model (padded on the left)
and every encoder-decoder (padded on the right, where no position of the source moves). In float32 its output is that of
`generate` on one prompt at a time: a batch changes the logits by rounding only, and a row with a choice that rounding
could have changed is generated again alone.
"""

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hpc.engine import bucket, memory
from hpc.engine.bounds import Bounds
from hpc.engine.cost import CostModel
from hpc.engine.decoder import DecoderRules
from hpc.engine.failure import Bisector
from hpc.engine.frequencies import tokens_before_change
from hpc.engine.interface import OnStep, Source, begin, pull
from hpc.engine.registry import Checkpoint, Loaded
from hpc.engine.sampling.choice import SamplerOutput
from hpc.engine.sampling.rounding import Rounding
from hpc.engine.sampling.sampler import Sampler
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog
from hpc.request import Request, TokenLogprobs
from hpc.trim import Decode, ending_tokens, ends_with_stop

LOGGER = logging.getLogger(__name__)


SIDES_NOISE = 1e-4
"""Rounding for encoder-decoders, as `NOISE` is for others: three times the 3.2e-5 seen of a
T5, whose attention scores are not scaled down."""

NEVER = -2e9
"""The logit of a token that an encoder-decoder may not generate: finite, so that log probabilities can be written."""


def load(checkpoint: Checkpoint) -> Loaded:
    """Load the model and make an engine of it."""
    model = checkpoint.load()
    return Loaded(of_model(checkpoint, model), "hf", checkpoint.size(model))


def of_model(checkpoint: Checkpoint, model: Any, num_buckets: int = 0) -> "HFEngine":
    """Return the engine of a loaded model. With `num_buckets` it makes length buckets, for a plan without any."""
    return HFEngine(
        model,
        checkpoint.eos_token_ids,
        checkpoint.decode,
        checkpoint.job.batch_tokens,
        num_buckets=num_buckets,
        rules=checkpoint.decoder_rules,
    )


class HFEngine:
    """One replica of a model, driven by `generate`.

    `decode` turns token ids into text; only requests with stop strings need it.
    `batch_tokens` bounds a batch: its rows times its longest prompt and completion. In a step that
    takes longer than `long_step_s`, `on_step` is called between the layers too, so that the rank still
    notices signals and messages.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Collection[int],
        decode: Decode,
        batch_tokens: int,
        long_step_s: float = 5.0,
        num_buckets: int = 0,
        rules: DecoderRules | None = None,
    ) -> None:
        """Hold the model. With `num_buckets`, the engine puts requests into as many length buckets itself.

        `rules` are those of an encoder-decoder, None for a causal language model. Raises `ValueError` for a model and
        rules that are not of one kind.
        """
        if model.config.is_encoder_decoder != (rules is not None):
            raise ValueError(f"{type(model).__name__} is given the decoder rules {rules}")
        self._model = model
        self._long_step_s = long_step_s
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._batch_tokens = batch_tokens
        self._num_buckets = num_buckets
        self._rules = rules
        self._max_together = tokens_before_change(model.config.get_text_config())
        self.steps = StepLog()  # `generate` does not tell of its steps
        self.bounds: Bounds | None = None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield the sequences of a batch when all have ended; when told to stop, those that have ended."""
        stop = _Stop(on_step, self._long_step_s)
        bisector = Bisector(lambda batch: self._generate_batch(batch, stop), self._shrink)
        with stop.between_layers(self._model):
            while not stop.told and (requests := pull(source, self._batch_tokens, stop)):
                if self._num_buckets:
                    requests = bucketed(requests, self._num_buckets, self._batch_tokens)
                for batch in batches(begin(requests), self._batch_tokens, self._max_together):
                    yield from bisector.run(batch)
                    if stop.told:
                        stop.raise_error()
                        return
            yield from bisector.flush()
            stop.raise_error()

    @torch.inference_mode()
    def _generate_batch(self, batch: list[Sequence], on_step: "_Stop") -> list[Sequence]:
        device, rules = self._model.device, self._rules
        inputs = _padded(batch, left=rules is None)
        growing = _Growing(batch, self._eos_token_ids, self._decode, on_step, rules)
        exact = len(batch) > 1 and self._model.dtype == torch.float32
        rounding = Rounding() if rules is None else Rounding(SIDES_NOISE)
        sampler = Sampler(len(batch), device, self._eos_token_ids, rounding if exact else None)
        for slot, sequence in enumerate(batch):
            sampler.set(slot, sequence.request if rules is None else _begun(sequence.request, rules), sequence.sample)
        config = GenerationConfig(
            max_new_tokens=max(sequence.request.sampling.max_new_tokens for sequence in batch),
            do_sample=False,
            pad_token_id=0,
            decoder_start_token_id=rules and rules.start,
        )
        if _has_global_attention(self._model):  # its first token sees all others, and they see it
            inputs["global_attention_mask"] = torch.zeros_like(inputs["attention_mask"])
            inputs["global_attention_mask"][:, 0] = 1
        with contextlib.suppress(_Stopped):
            self._model.generate(
                **{name: tensor.to(device) for name, tensor in inputs.items()},
                generation_config=config,
                logits_processor=LogitsProcessorList([_Chooser(sampler, growing, rules.banned if rules else ())]),
                stopping_criteria=StoppingCriteriaList([growing]),
            )
        done = [sequence for row, sequence in enumerate(growing.sequences) if growing.ended[row]]
        for sequence in growing.close():
            if not on_step():
                done += self._generate_batch([sequence], on_step)
        return done

    def _shrink(self) -> None:
        self._batch_tokens = max(1, self._batch_tokens // 2)
        LOGGER.warning("out of memory: batches have at most %d tokens from now on", self._batch_tokens)
        memory.free()


def bucketed(requests: list[Request], num_buckets: int, batch_tokens: int) -> list[Request]:
    """Return requests in length buckets, at most `num_buckets` of them, the longest first.

    For a plan without padding, in which every length is a bucket of its own and a batch has one row.
    """
    lengths = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    new_tokens = np.array([request.sampling.max_new_tokens for request in requests], dtype=np.int64)
    cost = CostModel()
    chosen = bucket.choose(lengths, new_tokens, num_buckets, 1, batch_tokens, cost.prefill_token, cost.step)
    padded = bucket.assign(lengths, chosen).tolist()
    order = sorted(range(len(requests)), key=lambda index: -padded[index])
    return [replace(requests[index], bucket=padded[index]) for index in order]


def _padded(batch: list[Sequence], left: bool) -> dict[str, torch.Tensor]:
    """Return the prompts of a batch and their mask, int64 of shape [rows, longest prompt], padded at one side."""
    prompts = [torch.from_numpy(sequence.request.token_ids.astype("int64")) for sequence in batch]
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        own = slice(width - len(prompt), None) if left else slice(len(prompt))
        # Whatever stands in the padding is masked, but 0 * NaN is NaN: a token of the row's own does no harm.
        input_ids[row] = prompt[0]
        input_ids[row, own] = prompt
        attention_mask[row, own] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _begun(request: Request, rules: DecoderRules) -> Request:
    """Return a request as the decoder of an encoder-decoder sees it: penalties do not count the source."""
    return replace(request, token_ids=np.array([rules.start], dtype=np.int32))


def _has_global_attention(model: Any) -> bool:
    """Return whether a model (LED) is told which tokens of a long source attend to all others."""
    return "global_attention_mask" in inspect.signature(model.forward).parameters


def batches(sequences: list[Sequence], batch_tokens: int, max_together: int | None = None) -> Iterator[list[Sequence]]:
    """Cut sequences into batches of one bucket that hold at most `batch_tokens`, padding included.

    If a row of a batch could grow beyond `max_together` tokens, each of its sequences is a batch of its own.
    """
    for batch in _full(sequences, batch_tokens):
        prompt = max(len(sequence.request.token_ids) for sequence in batch)
        new = max(sequence.request.sampling.max_new_tokens for sequence in batch)
        if max_together is None or prompt + new <= max_together:
            yield batch
        else:
            yield from ([sequence] for sequence in batch)


def _full(sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    batch: list[Sequence] = []
    longest = 0
    for sequence in sequences:
        request = sequence.request
        width = max(longest, request.sample_tokens)
        if batch and (request.bucket != batch[0].request.bucket or width * (len(batch) + 1) > batch_tokens):
            yield batch
            batch, width = [], request.sample_tokens
        batch.append(sequence)
        longest = width
    if batch:
        yield batch


class _Stopped(Exception):
    """Raised to leave a forward pass when the rank was told to stop."""


class _Stop:
    """Asks `on_step` whether to stop, and remembers a yes.

    An exception of `on_step` (a full disk, a lost rank) is a yes too. It is kept until the batch has been left, where
    it would be taken for a failure of the batch.
    """

    def __init__(self, on_step: OnStep, long_step_s: float) -> None:
        self._on_step = on_step
        self._long_step_s = long_step_s
        self._asked_at = time.monotonic()
        self._error: Exception | None = None
        self.told = False

    def __call__(self) -> bool:
        if not self.told:
            try:
                self.told = self._on_step()
            except Exception as error:
                self._error, self.told = error, True
        self._asked_at = time.monotonic()
        return self.told

    def raise_error(self) -> None:
        """Raise what `on_step` has raised, if it has."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def between_layers(self, model: torch.nn.Module) -> Iterator[None]:
        """Ask between the layers of a long step: the prefill of a large batch takes a minute on a CPU."""

        def ask(module: torch.nn.Module, inputs: Any) -> None:  # noqa: ARG001  (the signature of a hook)
            if time.monotonic() - self._asked_at > self._long_step_s and self():
                raise _Stopped

        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        hooks = [layer.register_forward_pre_hook(ask) for layers in lists for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Growing(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Follows each row of a batch, and tells `generate` which rows have ended."""

    def __init__(
        self,
        batch: list[Sequence],
        eos_token_ids: Collection[int],
        decode: Decode,
        on_step: Callable[[], bool],
        rules: DecoderRules | None = None,
    ) -> None:
        self.sequences = [Sequence(begun.request, sample=begun.sample) for begun in batch]
        self.ended = [False] * len(batch)
        self._batch = batch
        self._was_close = [False] * len(batch)
        self._endings = [ending_tokens(begun.request.sampling, eos_token_ids) for begun in batch]
        self._decode = decode
        self._on_step = on_step
        self._rules = rules
        self._logprobs: dict[int, TokenLogprobs] = {}

    def note(self, choice: SamplerOutput) -> None:
        """Record whether each row's next token is close or not finite, before the token itself is appended."""
        for row, close in enumerate(choice.close.tolist() if choice.close is not None else ()):
            self._was_close[row] |= close and not self.ended[row]
        for row, finite in enumerate(choice.finite.tolist()):
            if not (finite or self.ended[row] or self._was_close[row]):
                self.sequences[row].error = "the model's logits are not finite numbers; try another dtype"
                self.ended[row] = True
        self._logprobs = choice.logprobs.read() if choice.logprobs else {}

    def forced(self) -> dict[int, int]:
        """Return the tokens that rows must have next, by row."""
        if self._rules is None:
            return {}
        found = {}
        for row, sequence in enumerate(self.sequences):
            token = self._rules.forced(sequence.request.sampling, len(sequence.token_ids), self._endings[row])
            if token is not None and not (self.ended[row] or self._was_close[row]):
                found[row] = token
        return found

    def close(self) -> list[Sequence]:
        """Return the sequences to generate again, each in a batch of its own."""
        return [begun for begun, close in zip(self._batch, self._was_close, strict=True) if close]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Take the token just chosen for each row; return which rows have ended, shape [rows]."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not (self.ended[row] or self._was_close[row]):
                self.sequences[row].token_ids.append(token)
                if row in self._logprobs:
                    self.sequences[row].logprobs.append(self._logprobs[row])
                self.ended[row] = self._has_ended(row, token)
                self._note_cut(row)
        if self._on_step():
            return torch.ones(len(self.ended), dtype=torch.bool, device=input_ids.device)
        enough = [ended or close for ended, close in zip(self.ended, self._was_close, strict=True)]
        return torch.tensor(enough, dtype=torch.bool, device=input_ids.device)

    def _has_ended(self, row: int, token: int) -> bool:
        sequence = self.sequences[row]
        sampling = sequence.request.sampling
        before = sequence.request.token_ids if self._rules is None else ()
        return (
            token in self._endings[row]
            or len(sequence.token_ids) >= sampling.max_new_tokens
            or ends_with_stop(sequence.token_ids, sampling.stop, self._decode, sampling.min_new_tokens, before)
        )

    def _note_cut(self, row: int) -> None:
        sequence = self.sequences[row]
        if self._rules is not None:
            at = len(sequence.token_ids) - 1
            sequence.cut = self._rules.cuts(sequence.request.sampling, at, self._endings[row])


class _Chooser(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Chooses the tokens with our sampler, and leaves `generate` only the chosen one to find."""

    def __init__(self, sampler: Sampler, growing: _Growing, banned: Collection[int] = ()) -> None:
        self._sampler = sampler
        self._growing = growing
        self._banned = list(banned)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return scores of shape [rows, vocabulary] that are 0 at the chosen token and -inf elsewhere."""
        if self._banned:
            scores[:, self._banned] = NEVER
        for row, token in self._growing.forced().items():
            scores[row] = NEVER
            scores[row, token] = 0.0
        choice = self._sampler.choose(scores, list(range(len(scores))))
        self._growing.note(choice)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice.tokens[:, None], 0.0)
