"""Sequences whose rotary frequencies change as they grow (Phi-3 with LongRoPE) are as `generate` makes them alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from hpc.engine.extents import Extents
from hpc.engine.layers.attention import Unsupported
from hpc.engine.native.build import unsupported
from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.native.scheduler import Scheduler
from hpc.sampling_params import SamplingParams
from tests.engine.models import CONFIGS, ROOMY, WAYS, build_engine, plain_of, tiny, with_rope
from tests.engine.oracle import generated, prompts, request
from tests.fakes import ListSource

LIMIT, NEW = 40, 12
LENGTHS = (5, LIMIT - NEW, LIMIT - NEW + 1, LIMIT - 3, LIMIT - 1, LIMIT, LIMIT + 1, 90)
LIMITS = replace(ROOMY, context_tokens=256)


def config() -> Any:
    values = {**CONFIGS["phi3"].to_dict(), "max_position_embeddings": 512, "original_max_position_embeddings": LIMIT}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT}
    return hf.Phi3Config(**{**values, "rope_parameters": {**rope, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}})


def by_row(found: dict[Any, list[int]]) -> list[list[int]]:
    return [found[row] for row in sorted(found)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What `generate` makes of each prompt."""
    return plain_of(tiny(config()), prompts(LENGTHS), NEW)


def test_the_frequencies_of_short_sequences_matter(alone: list[list[int]]) -> None:
    other = config()
    other.rope_parameters["short_factor"] = [3.0] * 8
    assert plain_of(tiny(other), prompts(LENGTHS), NEW) != alone


@pytest.mark.parametrize("max_seqs", [1, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_sequences_of_all_lengths_beside_each_other_are_those_of_generate_alone(
    alone: list[list[int]], way: str, max_seqs: int
) -> None:
    engine = build_engine(tiny(config()), way, replace(LIMITS, max_seqs=max_seqs))
    sampling = SamplingParams(max_new_tokens=NEW)
    found = generated(engine, [request(prompt, row, sampling) for row, prompt in enumerate(prompts(LENGTHS))])
    assert by_row(found) == alone


@pytest.mark.parametrize("length", [LIMIT - 3, LIMIT + 9])
def test_sequences_behind_a_prefix_are_those_of_generate_alone(length: int) -> None:
    [header] = prompts([length - 8], seed=1)
    both = [header + tail for tail in prompts([8, 8], seed=2)]
    engine = build_engine(tiny(config()), "torch", LIMITS)
    sampling = SamplingParams(max_new_tokens=NEW)
    requests = [replace(request(prompt, row, sampling), prefix=len(header)) for row, prompt in enumerate(both)]
    assert by_row(generated(engine, requests)) == plain_of(tiny(config()), both, NEW)


@pytest.mark.parametrize("drafts", [False, True])
def test_drafts_and_sampling_go_on_where_a_sequence_is_computed_anew(drafts: bool) -> None:
    def model() -> Any:
        return tiny(config(), scale=3.0)  # whose greedy output goes in circles, and is drafted

    one = [7, 8, 9] * ((LIMIT - 6) // 3)
    hot = SamplingParams(max_new_tokens=NEW, temperature=0.8, repetition_penalty=1.3)
    requests = [request(one, 0, SamplingParams(max_new_tokens=4 * NEW)), request(one, 1, hot)]
    made = [
        by_row(generated(build_engine(model(), "kernel", replace(LIMITS, drafts=drafts)), some))
        for some in ([requests[0]], [requests[1]], requests)
    ]
    assert made[2] == [*made[0], *made[1]]
    assert made[0] == plain_of(model(), [one], 4 * NEW)


def decoding(usual: int | None = None) -> tuple[Scheduler, LiveSequence]:
    """Return a row of 36 prompt tokens that decodes; memory for so many new tokens is reserved, or for all 30."""
    scheduler = Scheduler(Extents(1024), 4, 512, True, long_from=LIMIT)
    scheduler._usual = usual
    [row] = scheduler.admit(ListSource([request(prompts([36])[0], 0, SamplingParams(max_new_tokens=30))]))
    return scheduler, row


def step(scheduler: Scheduler) -> ScheduledStep:
    plan = scheduler.next()
    for row in scheduler.rows:
        assert row.sequence is not None
        row.sequence.token_ids.append(1)
    return plan


def test_no_draft_token_lies_where_the_frequencies_are_others() -> None:
    scheduler, row = decoding()
    assert [(step(scheduler), row.done, scheduler.lookahead(row))[1:] for _ in range(5)] == [
        (36, 4), (37, 3), (38, 2), (39, 1), (40, 0),
    ]  # fmt: skip


def test_a_sequence_is_computed_anew_with_its_generated_tokens_as_a_prompt() -> None:
    scheduler, row = decoding()
    plans = [step(scheduler) for _ in range(7)]
    assert [(chunk.position, chunk.count, chunk.chooses) for chunk in plans[5].prompts] == [(0, 41, True)]
    assert (plans[6].positions, row.num_scheduled, row.is_long) == ([41], 7, True)


def test_a_sequence_that_is_computed_anew_has_memory_for_all_its_tokens() -> None:
    scheduler, row = decoding(usual=5)
    before = row.capacity
    for _ in range(6):
        step(scheduler)
    assert (before, row.capacity > before) == (LIMIT, True)


def test_a_gpu_which_is_a_token_ahead_of_the_host_leaves_them_to_another_engine() -> None:
    assert "grows beyond 40 tokens" in str(unsupported(config(), 256, device="cuda"))


def test_a_model_that_keeps_its_cache_when_its_frequencies_change_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="grows beyond 64 tokens"):
        build_engine(tiny(with_rope("longrope")), "torch", replace(ROOMY, context_tokens=65))


def test_a_step_without_long_sequences_is_computed_by_the_models_own_embedding() -> None:
    engine = build_engine(tiny(config()), "torch", LIMITS)
    rotary = engine._model.model.rotary_emb
    x, positions = torch.zeros(1, 3, 64), torch.arange(3)[None]
    assert torch.equal(rotary(x, positions)[0], type(rotary).forward(rotary, x, positions)[0])
