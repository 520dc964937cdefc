"""A Generator returns, in order, what a job would: with the echo engine, in this process."""

import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from hpc import Completion, Generator, Refusal, SamplingParams
from hpc.api.parameters import make_job
from hpc.engine.interface import OnStep, Source
from hpc.engine.sequence import Sequence as Growing
from hpc.job import Job
from hpc.model.loader import Replica
from hpc.mpi.binding import Binding
from tests.fakes import CONTEXT, EchoEngine, EchoLoader


class CountingLoader(EchoLoader):
    """An echo that counts how often it is loaded."""

    loads = 0

    def load(self, job: Job, path: Any, place: Binding) -> Replica:
        self.loads += 1
        return super().load(job, path, place)


class InterruptingEngine(EchoEngine):
    """At its third step somebody presses Ctrl-C, so many times; later it is left alone."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Growing]]:
        steps = 0

        def interrupted() -> bool:
            nonlocal steps
            steps += 1
            if steps == 3:
                times, self.times = self.times, 0
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return on_step()

        return super().generate(source, interrupted)


class BreakingEngine(EchoEngine):
    """Breaks the first time."""

    broken = False

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Growing]]:
        if not self.broken:
            self.broken = True
            raise MemoryError("no room")
        return super().generate(source, on_step)


class CallingEngine(EchoEngine):
    """While it generates another thread calls its Generator."""

    generator: Generator | None = None
    raised: BaseException | None = None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Growing]]:
        thread = threading.Thread(target=self.call)
        thread.start()
        thread.join()
        return super().generate(source, on_step)

    def call(self) -> None:
        generator, self.generator = self.generator, None
        if generator is not None:  # the first time
            try:
                generator.generate(["from elsewhere"])
            except RuntimeError as error:
                self.raised = error


def echoing(engine: EchoEngine | None = None, **parameters: Any) -> Generator:
    return Generator("echo", loader=EchoLoader(engine), **{"max_new_tokens": 4, **parameters})


def texts(completions: Sequence[Completion]) -> list[str | None]:
    return [completion.text for completion in completions]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("xyz", "xyzx"),
        ({"prompt": "ab"}, "abab"),
        ([65, 66], "ABAB"),
        (np.array([65, 66]), "ABAB"),
        ((np.int64(65),), "AAAA"),
        ([{"role": "user", "content": "u"}], "[use"),
        ({"prompt_token_ids": np.array([67]), "sampling": {"max_new_tokens": np.int64(2)}}, "CC"),
    ],
)
def test_a_prompt_is_text_a_row_token_ids_or_turns(prompt: Any, text: str) -> None:
    assert texts(echoing().generate([prompt])) == [text]


def test_completions_come_in_the_order_of_their_prompts() -> None:
    prompts = [chr(97 + n % 26) * (1 + 37 * n % 50) for n in range(40)]
    assert texts(echoing().generate(iter(prompts))) == [prompt[0] * 4 for prompt in prompts]


def test_a_stream_yields_each_completion_with_its_index_as_it_ends() -> None:
    rows = [{"prompt": "ab", "sampling": {"max_new_tokens": tokens}} for tokens in (9, 1, 5)]
    assert [completion.index for completion in echoing().stream(rows)] == [1, 2, 0]


def test_no_prompts_have_no_completions() -> None:
    assert echoing().generate([]) == []


def test_chats_are_given_as_messages() -> None:
    assert texts(echoing().generate(messages=[[{"role": "user", "content": "u"}]])) == ["[use"]


def test_a_completion_has_tokens_reason_usage_and_log_probabilities() -> None:
    [found] = echoing(logprobs=0).generate(["AB"])
    assert (found.token_ids, found.finish_reason, found.usage.prompt_tokens, found.usage.completion_tokens) == (
        (65, 66, 65, 66), "length", 2, 4,
    )  # fmt: skip
    assert found.logprobs == ((-0.5, ()),) * 4


def test_all_samples_of_a_prompt_are_there_and_the_first_is_the_text() -> None:
    [found] = echoing(temperature=1, n=3).generate(["abc"])
    assert (found.texts, found.text, found.usage.completion_tokens) == (["abca", "bcab", "cabc"], "abca", 12)


@pytest.mark.parametrize(
    ("prompt", "kind", "named"),
    [
        ("", "empty", "prompt"),
        (None, "prompt", "prompt"),
        (float("nan"), "not_json", "NaN"),
        ({"prompt": "x", "sampling": {"temperature": "hot"}}, "sampling", "hot"),
        ({"prompt": object()}, "prompt", "object object"),
        ("x" * 3000, "too_long", "3000 tokens"),
        ([70_000], "token_ids", "70000"),
    ],
)
def test_a_wrong_row_has_an_error_and_costs_the_others_nothing(prompt: Any, kind: str, named: str) -> None:
    good, bad = echoing().generate(["ab", prompt])
    assert bad.error is not None
    assert (good.text, bad.text, bad.finish_reason, bad.error.kind) == ("abab", None, "error", kind)
    assert named in str(bad.error)


def test_an_error_says_the_index_of_its_row() -> None:
    error = echoing().generate(["a", "b", ""])[2].error
    assert error is not None
    assert "prompts row 2:" in error.message


def test_a_row_that_contains_itself_has_an_error() -> None:
    row: dict[str, Any] = {"prompt": "x"}
    row["self"] = row
    assert echoing().generate([row])[0].finish_reason == "error"


def test_equal_greedy_prompts_share_a_completion() -> None:
    found = echoing().generate([{"prompt": "same", "id": "a"}, {"prompt": "same", "id": "b"}])
    assert [(completion.index, completion.id, completion.text) for completion in found] == [
        (0, "a", "same"), (1, "b", "same"),
    ]  # fmt: skip


def test_parameters_of_a_call_go_before_those_of_the_generator() -> None:
    generator = echoing(max_new_tokens=2)
    assert texts(generator.generate(["x"], max_new_tokens=3) + generator.generate(["x"])) == ["xxx", "xx"]


def test_what_a_call_asks_for_is_bounded_by_the_context() -> None:
    [found] = echoing().generate(["x" * (CONTEXT - 8)], max_new_tokens=100)
    assert found.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("parameters", "row", "text"),
    [
        ({"column": {"prompt": "question"}}, {"question": "ab"}, "abab"),
        ({"column": "prompt=question"}, {"question": "ab"}, "abab"),
        ({"prompt_template": "<{of}>"}, {"of": "ab"}, "<ab>"),
        ({"system": "s", "max_new_tokens": 9}, "ab", "[system]s"),
    ],
)
def test_columns_and_templates_are_those_of_a_job(parameters: dict[str, Any], row: Any, text: str) -> None:
    assert texts(echoing(**parameters).generate([row])) == [text]


def test_variables_of_the_chat_template_are_a_mapping() -> None:
    assert make_job("m", {"chat_template_kwargs": {"b": 1, "a": True}}).chat_template_kwargs == '{"a": true, "b": 1}'


def test_a_whole_set_of_parameters_can_be_given() -> None:
    assert texts(echoing().generate(["x"], sampling=SamplingParams(max_new_tokens=1))) == ["x"]


def test_a_model_stays_loaded_between_calls() -> None:
    loader = CountingLoader()
    with Generator("echo", loader=loader) as generator:
        generator.generate(["a"])
        generator.generate(["b"])
    assert loader.loads == 1


def test_no_weights_are_loaded_where_every_row_is_wrong() -> None:
    loader = CountingLoader()
    Generator("echo", loader=loader).generate([""])
    assert loader.loads == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": "one text"}, "list"),
        ({"prompts": {"prompt": "x"}}, "list"),
        ({"prompts": 3}, "list"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"\[\[…\], …\]"),
        ({}, "messages"),
        ({"prompts": ["x"], "messages": [[]]}, "one of the two"),
        ({"prompts": ["x"], "max_tokens": 3}, 'did you mean "max_new_tokens"'),
        ({"prompts": ["x"], "engine": "hf"}, "give it to Generator"),
        ({"prompts": ["x"], "limit": 3}, "hpc.run"),
    ],
)
def test_a_wrong_call_is_a_type_error_that_names_the_way_out(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        echoing().generate(**arguments)


def test_a_table_is_refused_with_the_way_to_its_rows() -> None:
    import pandas

    with pytest.raises(TypeError, match="to_dict"):
        echoing().generate(pandas.DataFrame({"prompt": ["x"]}))


def test_a_column_of_a_table_is_a_list_of_prompts() -> None:
    import pandas

    assert texts(echoing().generate(pandas.DataFrame({"prompt": ["ab", "c"]})["prompt"])) == ["abab", "cccc"]


def test_a_column_of_pyarrow_is_a_list_of_prompts() -> None:
    import pyarrow

    assert texts(echoing().generate(pyarrow.table({"prompt": ["ab", "c"]})["prompt"])) == ["abab", "cccc"]


@pytest.mark.parametrize(
    ("parameters", "named"), [({"engine": "vlm"}, "native"), ({"temperature": -1}, "0 .greedy"), ({"buckets": 0}, "32")]
)
def test_a_wrong_value_is_a_value_error_that_names_the_rule(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Generator("echo", loader=EchoLoader(), **parameters)


def test_ctrl_c_raises_and_leaves_the_model_loaded() -> None:
    loader = CountingLoader(InterruptingEngine(1))
    generator = Generator("echo", loader=loader, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(["abc"] * 20)
    assert (texts(generator.generate(["ab"])), loader.loads) == (["abababab"], 1)


def test_a_second_ctrl_c_waits_for_no_step_and_the_model_is_loaded_again() -> None:
    loader = CountingLoader(InterruptingEngine(2))
    generator = Generator("echo", loader=loader, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(["abc"])
    assert (texts(generator.generate(["ab"])), loader.loads) == (["abababab"], 2)


def test_after_a_fault_of_the_engine_the_model_is_loaded_again() -> None:
    loader = CountingLoader(BreakingEngine())
    generator = Generator("echo", loader=loader, max_new_tokens=2)
    with pytest.raises(MemoryError):
        generator.generate(["ab"])
    assert (texts(generator.generate(["ab"])), loader.loads) == (["ab"], 2)


def test_a_call_while_another_thread_generates_is_refused() -> None:
    engine = CallingEngine()
    engine.generator = generator = echoing(engine)
    assert texts(generator.generate(["ab"])) == ["abab"]
    assert "one call at a time" in str(engine.raised)


def test_a_call_in_another_thread_alone_is_taken() -> None:
    generator, found = echoing(), list[Completion]()
    thread = threading.Thread(target=lambda: found.extend(generator.generate(["ab"])))
    thread.start()
    thread.join()
    assert texts(found) == ["abab"]


def test_a_stream_that_a_later_call_has_ended_says_so() -> None:
    generator = echoing(EchoEngine(slots=1))
    stream = generator.stream(["ab", "cd"])
    next(stream)
    generator.generate(["x"])
    with pytest.raises(RuntimeError, match="later call"):
        next(stream)


def test_a_stream_that_was_read_to_its_end_just_ends_after_a_later_call() -> None:
    generator = echoing()
    stream = generator.stream(["ab"])
    list(stream)
    generator.generate(["x"])
    assert list(stream) == []


def test_a_closed_generator_says_so() -> None:
    with echoing() as generator:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        generator.generate(["x"])


def test_one_of_several_processes_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.raises(Refusal, match="mpirun -n 3 scattergen run --model echo"):
        echoing()
