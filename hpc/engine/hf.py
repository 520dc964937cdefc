"""The `hf` engine: transformers' `generate` on batches of one length bucket, left-padded.

Other engines are compared with it, and it serves every causal language model. In float32 its output is that of
`generate` on one prompt at a time: a batch changes the logits by rounding alone, and a row with a choice that rounding
could have changed is generated again alone.
"""

import contextlib
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


def load(checkpoint: Checkpoint) -> Loaded:
    """Load the model and make an engine of it."""
    model = checkpoint.load()
    return Loaded(of_model(checkpoint, model), "hf", checkpoint.size(model))


def of_model(checkpoint: Checkpoint, model: Any, num_buckets: int = 0) -> "HFEngine":
    """Return the engine of a loaded model; it makes `num_buckets` length buckets itself if the plan has none."""
    batch_tokens = checkpoint.job.batch_tokens
    return HFEngine(model, checkpoint.eos_token_ids, checkpoint.decode, batch_tokens, num_buckets=num_buckets)


class HFEngine:
    """One replica of a model, driven by `generate`.

    `decode` turns token ids into text, for requests with stop strings only.
    `batch_tokens` bounds a batch: its rows times its longest prompt and completion. In a step that
    takes longer than `long_step_s`, `on_step` is called between the layers too, so that the rank is
    not deaf meanwhile.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Collection[int],
        decode: Decode,
        batch_tokens: int,
        long_step_s: float = 5.0,
        num_buckets: int = 0,
    ) -> None:
        """Hold the model; with `num_buckets`, requests are put into so many length buckets here, not by a plan."""
        self._model = model
        self._long_step_s = long_step_s
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._batch_tokens = batch_tokens
        self._num_buckets = num_buckets
        self._max_together = tokens_before_change(model.config.get_text_config())
        self.steps = StepLog()  # `generate` does not tell of its steps
        self.bounds: Bounds | None = None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield the sequences of a batch when its longest has ended, or those that have when told to stop."""
        stop = _Stop(on_step, self._long_step_s)
        bisector = Bisector(lambda batch: self._generate_batch(batch, stop), self._shrink)
        with stop.between_layers(self._model):
            while not stop.told and (requests := pull(source, self._batch_tokens, stop)):
                if self._num_buckets:
                    requests = bucketed(requests, self._num_buckets, self._batch_tokens)
                for batch in batches(begin(requests), self._batch_tokens, self._max_together):
                    yield from bisector.run(batch)
                    if stop.told:
                        return
            yield from bisector.flush()

    @torch.inference_mode()
    def _generate_batch(self, batch: list[Sequence], on_step: "_Stop") -> list[Sequence]:
        device = self._model.device
        prompts = [torch.from_numpy(sequence.request.token_ids.astype("int64")) for sequence in batch]
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            # Whatever stands in the padding is masked, but 0 * NaN is NaN: a token of the row's own does no harm.
            input_ids[row] = prompt[0]
            input_ids[row, width - len(prompt) :] = prompt
            attention_mask[row, width - len(prompt) :] = 1
        growing = _Growing(batch, self._eos_token_ids, self._decode, on_step)
        exact = len(batch) > 1 and self._model.dtype == torch.float32
        sampler = Sampler(len(batch), device, self._eos_token_ids, Rounding() if exact else None)
        for slot, sequence in enumerate(batch):
            sampler.set(slot, sequence.request, sequence.sample)
        config = GenerationConfig(
            max_new_tokens=max(sequence.request.sampling.max_new_tokens for sequence in batch),
            do_sample=False,
            pad_token_id=0,
        )
        with contextlib.suppress(_Stopped):
            self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Chooser(sampler, growing)]),
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

    For those of a plan that pads nothing: there every length is a bucket of its own, and a batch one row.
    """
    lengths = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    new_tokens = np.array([request.sampling.max_new_tokens for request in requests], dtype=np.int64)
    cost = CostModel()
    chosen = bucket.choose(lengths, new_tokens, num_buckets, 1, batch_tokens, cost.prefill_token, cost.step)
    padded = bucket.assign(lengths, chosen).tolist()
    order = sorted(range(len(requests)), key=lambda index: -padded[index])
    return [replace(requests[index], bucket=padded[index]) for index in order]


def batches(sequences: list[Sequence], batch_tokens: int, max_together: int | None = None) -> Iterator[list[Sequence]]:
    """Cut sequences into batches of one bucket that hold at most `batch_tokens`, padding included.

    Of those in which a row could grow beyond `max_together` tokens every sequence is a batch of its own.
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
    """Asks whether to stop, and remembers that the answer was yes."""

    def __init__(self, on_step: OnStep, long_step_s: float) -> None:
        self._on_step = on_step
        self._long_step_s = long_step_s
        self._asked_at = time.monotonic()
        self.told = False

    def __call__(self) -> bool:
        self.told = self.told or self._on_step()
        self._asked_at = time.monotonic()
        return self.told

    @contextlib.contextmanager
    def between_layers(self, model: torch.nn.Module) -> Iterator[None]:
        """Ask between the layers of a long step too: the prefill of a large batch on a CPU takes a minute."""

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
    """Follows each row of a batch, and tells `generate` which need no more tokens."""

    def __init__(
        self,
        batch: list[Sequence],
        eos_token_ids: Collection[int],
        decode: Decode,
        on_step: Callable[[], bool],
    ) -> None:
        self.sequences = [Sequence(begun.request, sample=begun.sample) for begun in batch]
        self.ended = [False] * len(batch)
        self._batch = batch
        self._was_close = [False] * len(batch)
        self._endings = [ending_tokens(begun.request.sampling, eos_token_ids) for begun in batch]
        self._decode = decode
        self._on_step = on_step
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

    def close(self) -> list[Sequence]:
        """Return the sequences that must be generated again, alone."""
        return [begun for begun, close in zip(self._batch, self._was_close, strict=True) if close]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Append the token just chosen for each row; return which rows need no more, shape [rows]."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not (self.ended[row] or self._was_close[row]):
                self.sequences[row].token_ids.append(token)
                if row in self._logprobs:
                    self.sequences[row].logprobs.append(self._logprobs[row])
                self.ended[row] = self._has_ended(row, token)
        if self._on_step():
            return torch.ones(len(self.ended), dtype=torch.bool, device=input_ids.device)
        enough = [ended or close for ended, close in zip(self.ended, self._was_close, strict=True)]
        return torch.tensor(enough, dtype=torch.bool, device=input_ids.device)

    def _has_ended(self, row: int, token: int) -> bool:
        sequence = self.sequences[row]
        request, sampling = sequence.request, sequence.request.sampling
        return (
            token in self._endings[row]
            or len(sequence.token_ids) >= sampling.max_new_tokens
            or ends_with_stop(
                sequence.token_ids, sampling.stop, self._decode, sampling.min_new_tokens, request.token_ids
            )
        )


class _Chooser(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Chooses the tokens: `generate`'s own argmax finds only the chosen one."""

    def __init__(self, sampler: Sampler, growing: _Growing) -> None:
        self._sampler = sampler
        self._growing = growing

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return scores of shape [rows, vocabulary] that are 0 at the chosen token and -inf elsewhere."""
        choice = self._sampler.choose(scores, list(range(len(scores))))
        self._growing.note(choice)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice.tokens[:, None], 0.0)
