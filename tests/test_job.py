"""Every knob refuses what it cannot mean, and says so."""

import dataclasses
import json
import re
from typing import Any

import pytest

from hpc.job import Job, Slurm
from hpc.sampling_params import SamplingParams

JOB = Job("model", ("corpus.jsonl",))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", -3, "at least 1"),
        ("max_new_tokens", 2.0, "an integer"),
        ("max_new_tokens", True, "an integer"),
        ("max_new_tokens", "2", "an integer"),
        ("max_new_tokens", None, "an integer"),
        ("temperature", -1.0, "from 0.0001 to 10000"),
        ("temperature", 0.00001, "from 0.0001 to 10000"),
        ("temperature", 10**400, "from 0.0001 to 10000"),
        ("max_new_tokens", 10**20, "at most 2147483647"),
        ("top_k", 10**20, "to 2147483647"),
        ("stop", ("\ud800",), "Unicode text"),
        ("temperature", float("inf"), "from 0.0001 to 10000"),
        ("temperature", float("nan"), "from 0.0001 to 10000"),
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("top_p", "0.5", "a number"),
        ("top_k", -2, "from 0 or -1 .off. to"),
        ("top_k", 1.5, "an integer"),
        ("stop", ("",), "non-empty strings"),
        ("stop", (1,), "non-empty strings"),
        ("stop", "END", "a list"),
        ("stop_token_ids", (-1,), "integers from 0"),
        ("stop_token_ids", ("a",), "integers from 0"),
        ("stop_token_ids", (True,), "integers from 0"),
        ("stop_token_ids", 5, "a list"),
        ("ignore_eos", 1, "true or false"),
        ("forced_bos_token_id", -1, "a token id"),
        ("seed", 0.5, "an integer"),
        ("seed", None, "an integer"),
        ("min_p", -0.1, "from 0 .off. to 1"),
        ("min_p", 1.1, "from 0 .off. to 1"),
        ("min_p", float("nan"), "from 0 .off. to 1"),
        ("min_p", "0.1", "a number"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("repetition_penalty", 101, "from 0.01 to 100"),
        ("repetition_penalty", float("inf"), "from 0.01 to 100"),
        ("repetition_penalty", True, "a number"),
        ("presence_penalty", -2.1, "from -2 to 2"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("presence_penalty", None, "a number"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("frequency_penalty", float("nan"), "from -2 to 2"),
        ("frequency_penalty", "1", "a number"),
        ("n", 0, "from 1 to 10000"),
        ("n", 10_001, "from 1 to 10000"),
        ("n", 2.0, "an integer"),
        ("n", True, "an integer"),
        ("n", 2, "1 where the temperature is 0.*set a temperature above 0"),
        ("min_new_tokens", -1, "from 0 .off. to max_new_tokens .256."),
        ("min_new_tokens", 257, "from 0 .off. to max_new_tokens .256."),
        ("min_new_tokens", 1.0, "an integer"),
        ("logprobs", -1, "from 0 .* to 20"),
        ("logprobs", 21, "from 0 .* to 20"),
        ("logprobs", True, "an integer"),
        ("logprobs", 1.5, "an integer"),
    ],
)
def test_a_wrong_sampling_value_is_refused_with_its_name_value_and_rule(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f'"{name}" is {value!r}; it must be ')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("temperature", 0.0001),
        ("temperature", 100),
        ("top_p", 1e-9),
        ("top_p", 1),
        ("top_k", 0),
        ("seed", -1),
        ("min_p", 1),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("min_new_tokens", 256),
        ("logprobs", 0),
        ("logprobs", 20),
        ("logprobs", None),
    ],
)
def test_a_sampling_value_at_the_edge_of_its_rule_is_taken(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("corpus", ()),
        ("limit", 0),
        ("context_tokens", 0),
        ("tail", -0.1),
        ("tail", 1.1),
        ("tail", float("nan")),
        ("buckets", 0),
        ("buckets", 33),
        ("batch_tokens", 0),
        ("max_error_rate", 1.01),
        ("show", -1),
        ("name", ".."),
        ("name", "a/b"),
    ],
)
def test_a_wrong_job_value_is_refused_with_its_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="; it must ") as caught:
        dataclasses.replace(JOB, **{name: value})
    assert str(caught.value).startswith(f'"{name}" is {value!r}')


def test_a_sampled_request_may_have_several_samples() -> None:
    assert SamplingParams(n=10_000, temperature=0.5).n == 10_000


def test_an_override_that_makes_several_samples_greedy_is_refused() -> None:
    with pytest.raises(ValueError, match='"n" is 4; it must be 1 where the temperature is 0'):
        SamplingParams(n=4, temperature=0.5).override({"temperature": 0})


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ({}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": 1}, True),
        ({"frequency_penalty": 1}, True),
    ],
)
def test_what_is_penalised(penalty: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**penalty).penalised == expected


def test_the_default_is_greedy() -> None:
    assert SamplingParams().greedy


def test_a_temperature_above_0_is_not_greedy() -> None:
    assert not SamplingParams(temperature=0.5).greedy


def test_1_and_1_point_0_are_the_same_temperature_in_json() -> None:
    one, one_point_0 = (json.dumps(SamplingParams(temperature=t, top_p=1).identity()) for t in (1, 1.0))
    assert one == one_point_0


def test_an_override_replaces_what_it_names_and_nothing_else() -> None:
    given = SamplingParams(max_new_tokens=7, seed=3)
    assert given.override({"temperature": 0.5}) == SamplingParams(max_new_tokens=7, seed=3, temperature=0.5)


def test_an_override_takes_lists_for_tuples() -> None:
    assert SamplingParams().override({"stop": ["a", "b"], "stop_token_ids": [1]}) == SamplingParams(
        stop=("a", "b"), stop_token_ids=(1,)
    )


def test_an_override_takes_one_stop_string_for_a_list_of_one() -> None:
    assert SamplingParams().override({"stop": "END"}).stop == ("END",)


def test_an_override_with_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match='"max_tokens" is no sampling parameter') as caught:
        SamplingParams().override({"max_tokens": 5})
    assert all(field.name in str(caught.value) for field in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_a_null_in_an_override_counts_as_absent(field: str) -> None:
    params = SamplingParams(temperature=0.5, n=3, logprobs=2, stop=("x",), seed=4, min_new_tokens=1)
    assert params.override({field: None}) == params


@pytest.mark.parametrize("value", [0, "5", [5], [None]])
def test_an_override_is_checked_as_a_value_is(value: Any) -> None:
    with pytest.raises(ValueError, match='"max_new_tokens" is '):
        SamplingParams().override({"max_new_tokens": value})


@pytest.mark.parametrize("drawing", [{"seed": 1}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_greedy_identity_does_not_depend_on_how_tokens_are_drawn(drawing: dict[str, Any]) -> None:
    assert SamplingParams(**drawing).identity() == SamplingParams().identity()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_a_sampled_identity_depends_on_every_parameter(field: str) -> None:
    other: dict[str, Any] = {
        "max_new_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 1,
        "stop": ("a",),
        "stop_token_ids": (1,),
        "ignore_eos": True,
        "seed": 1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "n": 2,
        "min_new_tokens": 1,
        "logprobs": 0,
        "forced_bos_token_id": 0,
    }
    drawn = SamplingParams(temperature=1.0)
    assert dataclasses.replace(drawn, **{field: other[field]}).identity() != drawn.identity()


@pytest.mark.parametrize(
    "other",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_new_tokens": 1},
        {"logprobs": 0},
        {"forced_bos_token_id": 0},
    ],
    ids=str,
)
def test_a_greedy_identity_depends_on_what_changes_the_output(other: dict[str, Any]) -> None:
    assert SamplingParams(**other).identity() != SamplingParams().identity()


def test_the_identity_of_the_first_parameters_never_changes() -> None:
    assert SamplingParams().identity() == {
        "max_new_tokens": 256,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
    }


def test_the_sampled_identity_of_the_first_parameters_never_changes() -> None:
    assert list(SamplingParams(temperature=1, n=1, min_p=-0.0).identity()) == [
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "seed",
    ]


def test_a_job_comes_back_from_json_as_it_was() -> None:
    job = Job("m", ("a.jsonl", "b.jsonl"), limit=3, sampling=SamplingParams(stop=("x",), temperature=0.5, seed=9))
    assert Job.from_json(json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        JOB.limit = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        ("2026-11-28", "2026-11-28T00:00:00"),
        ("2026-11-28T09:30", "2026-11-28T09:30:00"),
        ("2026-11-28 09:30:05", "2026-11-28T09:30:05"),
    ],
)
def test_a_chat_date_is_kept_as_date_and_time(given: str, kept: str) -> None:
    assert Job(model="m", corpus=("c",), chat_date=given).chat_date == kept


def test_an_instruction_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"instruction" is .Translate this.; it must have \{prompt\}'):
        Job(model="m", corpus=("c",), instruction="Translate this")


@pytest.mark.parametrize("given", ["today", "28.11.2026", "2026-13-01", 5])
def test_a_chat_date_that_is_none_is_refused_with_the_way_out(given: Any) -> None:
    with pytest.raises(ValueError, match=r'"chat_date" is .*; it must be a date such as 2026-11-28'):
        Job(model="m", corpus=("c",), chat_date=given)


def test_a_whole_number_may_be_written_as_a_float_in_json() -> None:
    assert type(SamplingParams().override({"max_new_tokens": 64.0}).max_new_tokens) is int


def test_a_top_k_below_zero_is_all_and_has_the_same_identity() -> None:
    assert SamplingParams(temperature=1).override({"top_k": -1}) == SamplingParams(temperature=1, top_k=0)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"column": ("question",)}, "'question'; it must be prompt=question"),
        ({"column": ("answer=a",)}, "with one of prompt, messages,"),
        ({"column": ("id=a", "id=b")}, "says twice which column is id"),
        ({"prompt_template": "Translate"}, "without one all prompts are the same"),
        ({"prompt_template": "{text"}, "a brace itself is written twice"),
        ({"prompt_template": "{}"}, "nothing but a name"),
        ({"prompt_template": "{text!r}"}, "nothing but a name"),
        ({"prompt_template": "{a}", "column": ("prompt=b",)}, "it makes the prompt, and so does"),
        ({"chat_template_kwargs": "{"}, 'it must be a JSON object, such as {"enable_thinking": false}'),
        ({"chat_template_kwargs": "[]"}, "it must be a JSON object"),
        ({"chat_template_kwargs": '{"tools": []}'}, '"tools"'),
    ],
)
def test_what_a_job_says_of_its_prompts_is_checked_before_anything_runs(knobs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Job("m", ("c",), **knobs)


def test_variables_of_the_chat_template_are_the_same_however_they_are_written() -> None:
    one, other = (Job("m", ("c",), chat_template_kwargs=text) for text in ('{"a":1,"b":2}', '{ "b": 2, "a": 1 }'))
    assert one == other


def test_the_columns_of_a_job_come_back_from_json() -> None:
    job = Job("m", ("a.jsonl",), column=("prompt=question",), prompt_template="", last_assistant="drop")
    assert Job.from_json(json.loads(json.dumps(dataclasses.asdict(job)))) == job


# Models on several devices.


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica_gpus": 0}, '"replica_gpus" is 0; it must be at least 1'),
        ({"replica_cpus": 0, "device": "cpu"}, '"replica_cpus" is 0; it must be at least 1'),
        (
            {"replica_gpus": 2, "device": "cpu"},
            '"replica_gpus" is 2; it must be 1 with --device cpu; say --replica-cpus',
        ),
        ({"replica_cpus": 2}, '"replica_cpus" is 2; it must be 1 without --device cpu; say --replica-gpus'),
        ({"slurm": Slurm(array=2, gpus_per_node=4)}, '"slurm.gpus_per_node" is 4; with an array, .* it must be 1'),
        (
            {"slurm": Slurm(array=2, gpus_per_node=4), "replica_gpus": 2},
            '"slurm.gpus_per_node" is 4; with an array, .* it must be 2',
        ),
    ],
)
def test_devices_that_a_job_cannot_have_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Job("m", ("c.jsonl",), **values)


@pytest.mark.parametrize(
    ("values", "devices"), [({}, 1), ({"replica_gpus": 4}, 4), ({"replica_cpus": 3, "device": "cpu"}, 3)]
)
def test_a_job_says_on_how_many_devices_each_rank_keeps_its_model(values: dict[str, Any], devices: int) -> None:
    assert Job("m", ("c.jsonl",), **values).replica_devices == devices
