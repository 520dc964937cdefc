"""A planned step as arrays: where each token stands, what it attends to, and whose logits are wanted."""

import numpy as np
import pytest

from hpc.engine.layers.attention import Span
from hpc.engine.native.input_batch import InputBatch, InputBatchBuilder
from hpc.engine.native.scheduled_step import Chunk, LiveSequence, ScheduledStep
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepShape
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request


def row_of(prompt: list[int], generated: list[int], start: int = 0) -> LiveSequence:
    asked = request(prompt, start, SamplingParams(max_new_tokens=9))
    return LiveSequence(asked.token_ids, start, 64, sequence=Sequence(asked, list(generated)))


def decoding(*rows: LiveSequence) -> ScheduledStep:
    return ScheduledStep(
        list(rows), [len(row.tokens) + len(row.sequence.token_ids) - 1 for row in rows if row.sequence]
    )


def spans(packed: InputBatch) -> list[Span]:
    return [Span(*line) for line in packed.spans.tolist()]


ONE, TWO = row_of([1, 2, 3], [50], 64), row_of([4, 5], [60, 61], 128)
PROMPT = row_of(list(range(20, 30)), [], 192)


def plain() -> InputBatchBuilder:
    return InputBatchBuilder(share=True, known=True, multiple=1)


def advanced(row: LiveSequence, token: int) -> LiveSequence:
    assert row.sequence is not None
    row.sequence.token_ids.append(token)
    return row


def assert_same(packed: InputBatch, expected: InputBatch) -> None:
    for name, own, other in zip(InputBatch._fields, packed, expected, strict=True):
        assert np.array_equal(own, other) if isinstance(own, np.ndarray) else own == other, name


def test_of_a_row_that_decodes_the_newest_token_is_computed() -> None:
    assert plain().pack(decoding(ONE, TWO)).token_ids.tolist() == [50, 61]


def test_of_a_row_that_decodes_the_position_is_the_newest_tokens() -> None:
    assert plain().pack(decoding(ONE, TWO)).positions.tolist() == [3, 3]


def test_each_row_attends_in_its_own_extent() -> None:
    assert spans(plain().pack(decoding(ONE, TWO))) == [Span(0, 1, 3, 64, 0, 0), Span(1, 1, 3, 128, 0, 0)]


def test_a_chunk_of_a_prompt_follows_the_rows_that_decode() -> None:
    plan = decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 4, 3, False)]
    packed = plain().pack(plan)
    assert (packed.token_ids.tolist(), packed.positions.tolist()) == ([50, 24, 25, 26], [3, 4, 5, 6])


def test_after_a_chunk_that_is_not_the_last_nothing_is_chosen() -> None:
    plan = decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 4, 3, False)]
    packed = plain().pack(plan)
    assert (packed.kept.tolist(), packed.choosing) == ([0], [ONE])


def test_after_the_last_chunk_a_token_is_chosen() -> None:
    plan = decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 4, 6, True)]
    packed = plain().pack(plan)
    assert (packed.kept.tolist(), packed.choosing) == ([0, 6], [ONE, PROMPT])


def test_guesses_follow_the_newest_token_of_their_row() -> None:
    packed = plain().pack(decoding(ONE, TWO), [[7, 8], []])
    assert (packed.token_ids.tolist(), packed.positions.tolist()) == ([50, 7, 8, 61], [3, 4, 5, 3])


def test_the_logits_of_guesses_come_after_those_of_rows() -> None:
    assert plain().pack(decoding(ONE, TWO), [[7, 8], []]).kept.tolist() == [0, 3, 1, 2]


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    prefix = LiveSequence(np.arange(2), 256, 2)
    behind = row_of([0, 1, 2], [50], 64)
    behind.prefix, behind.cut = prefix, 2
    assert spans(plain().pack(decoding(behind))) == [Span(0, 1, 3, 64, 256, 2)]


def test_where_prefixes_are_copied_a_row_has_all_in_its_own_extent() -> None:
    behind = row_of([0, 1, 2], [50], 64)
    behind.prefix, behind.cut = LiveSequence(np.arange(2), 256, 2), 2
    packer = InputBatchBuilder(share=False, known=True, multiple=1)
    assert spans(packer.pack(decoding(behind))) == [Span(0, 1, 3, 64, 0, 0)]


def test_tokens_are_filled_up_to_the_multiple() -> None:
    packed = InputBatchBuilder(share=True, known=True, multiple=8).pack(decoding(ONE, TWO))
    assert (len(packed.token_ids), len(packed.positions), len(packed.kept)) == (8, 8, 8)


def test_with_fixed_sizes_a_step_that_only_decodes_has_the_first() -> None:
    assert len(InputBatchBuilder(False, True, 1, (4, 16)).pack(decoding(ONE, TWO)).token_ids) == 4


def test_with_fixed_sizes_a_step_with_prompts_has_the_second() -> None:
    plan = decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 0, 10, True)]
    assert len(InputBatchBuilder(False, True, 1, (4, 16)).pack(plan).token_ids) == 16


def test_fixed_sizes_are_halved_until_a_step_fills_its_own() -> None:
    packer, plan = InputBatchBuilder(False, True, 1, (4, 16)), decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 0, 7, True)]
    halved = [packer.shrink(packer.pack(plan).shape) for _ in range(3)]
    assert (halved, len(packer.pack(plan).token_ids)) == ([True, False, False], 8)


def test_fixed_sizes_are_as_at_first_when_what_did_not_fit_is_gone() -> None:
    packer = InputBatchBuilder(share=False, known=False, multiple=1, fixed=(8, 64))
    packer.shrink(StepShape(1, 0, 1, 0.0, 1))
    packer.reset()
    assert packer.fixed == (8, 64)


def test_a_step_larger_than_its_fixed_size_has_its_own() -> None:
    plan = decoding(ONE)
    plan.prompts = [Chunk(PROMPT, 0, 10, True)]
    assert len(InputBatchBuilder(False, True, 1, (1, 4)).pack(plan).token_ids) == 11


def test_a_token_that_the_host_does_not_know_is_left_out() -> None:
    assert InputBatchBuilder(share=True, known=False, multiple=1).pack(decoding(ONE)).token_ids.tolist() == [0]


def test_what_a_step_computes_is_counted() -> None:
    plan = decoding(ONE, TWO)
    plan.prompts = [Chunk(PROMPT, 4, 6, True)]
    shape = plain().pack(plan).shape
    assert (shape.tokens, shape.prompt, shape.chosen, shape.pairs, shape.kv) == (8, 6, 3, 6 * (4 + 3), 8)


# A step of the rows of the step before is laid out from that one.


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_next_step_of_the_same_rows_is_as_if_it_were_the_first(multiple: int) -> None:
    prefix = LiveSequence(np.arange(2), 256, 2)
    one, two = row_of([1, 2, 3], [50], 64), row_of([0, 1, 2], [60], 128)
    two.prefix, two.cut = prefix, 2
    packer, fresh = (InputBatchBuilder(share=True, known=True, multiple=multiple) for _ in range(2))
    packer.pack(decoding(one, two))
    plan = decoding(advanced(one, 51), advanced(two, 61))
    assert_same(packer.pack(plan), fresh.pack(plan))


def test_the_arrays_of_a_step_are_left_alone_by_the_next() -> None:
    packer, row = InputBatchBuilder(share=True, known=True, multiple=1), row_of([1, 2, 3], [50], 64)
    before = packer.pack(decoding(row))
    packer.pack(decoding(advanced(row, 51)))
    assert (spans(before)[0].position, before.positions.tolist(), before.token_ids.tolist()) == (3, [3], [50])


def test_a_row_that_has_moved_is_read_at_its_new_place() -> None:
    packer, row = InputBatchBuilder(share=True, known=True, multiple=1), row_of([1, 2, 3], [50], 64)
    packer.pack(decoding(row))
    plan = decoding(advanced(row, 51))
    plan.copies, row.start = [(64, 512, 4)], 512
    assert [span.start for span in spans(packer.pack(plan))] == [512]


def test_a_row_that_moved_while_it_was_guessed_is_read_at_its_new_place() -> None:
    packer, row = InputBatchBuilder(share=True, known=True, multiple=1), row_of([1, 2, 3], [50], 64)
    packer.pack(decoding(row))
    plan = decoding(advanced(row, 51))
    plan.copies, row.start = [(64, 512, 4)], 512
    packer.pack(plan, [[52]])
    assert [span.start for span in spans(packer.pack(decoding(advanced(row, 52))))] == [512]


def test_when_a_row_has_ended_the_others_are_laid_out_without_it() -> None:
    packer, one, two = (
        InputBatchBuilder(share=True, known=True, multiple=1),
        row_of([1, 2, 3], [50], 64),
        row_of([4], [60], 128),
    )
    packer.pack(decoding(one, two))
    plan = decoding(advanced(two, 61))
    assert_same(packer.pack(plan), plain().pack(plan))
