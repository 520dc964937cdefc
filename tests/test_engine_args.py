"""What a job asks of vLLM is checked where it is said, and reaches vLLM in its own names."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hpc.engine.vllm.installed import untested
from hpc.engine_args import Vllm
from hpc.job import Job


def test_what_is_not_said_is_left_to_vllm() -> None:
    assert Vllm().arguments() == {"enforce_eager": False, "enable_prefix_caching": True}


def test_what_is_said_keeps_its_name() -> None:
    asked = Vllm(gpu_memory_utilization=0.8, max_model_len=4096, quantization="fp8").arguments()
    assert (asked["gpu_memory_utilization"], asked["max_model_len"], asked["quantization"]) == (0.8, 4096, "fp8")


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("true", True), ("0.5", 0.5), ("auto", "auto"), ('{"a": 1}', {"a": 1})]
)
def test_an_extra_value_is_json_or_plain_text(text: str, value: Any) -> None:
    assert Vllm(extra={"some_argument": text}).arguments()["some_argument"] == value


def test_a_speculative_configuration_is_json() -> None:
    asked = Vllm(speculative_config='{"method": "ngram", "num_speculative_tokens": 4}')
    assert asked.arguments()["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"gpu_memory_utilization": 1.5}, '"vllm.gpu_memory_utilization" is 1.5; it must be above 0 and at most 1'),
        ({"max_model_len": 0}, '"vllm.max_model_len" is 0; it must be at least 1'),
        ({"speculative_config": "ngram"}, "it must be a JSON object"),
        ({"extra": {"quantization": "fp8"}}, '"vllm.extra" names quantization; say it with --vllm.quantization'),
        ({"extra": {"max_num_seqs": "8"}}, '"vllm.extra" names max_num_seqs; say it with --max-num-seqs'),
        (
            {"extra": {"tensor_parallel_size": "2"}},
            '"vllm.extra" names tensor_parallel_size; say it with --replica-gpus',
        ),
        ({"extra": {"trust_remote_code": "true"}}, "say it with --trust-remote-code"),
        ({"extra": {"scheduler_cls": "x"}}, "which must be as it is: leave it out"),
    ],
)
def test_a_wrong_value_is_refused_with_its_rule(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule.replace('"', ".").replace("(", ".")):
        Vllm(**values)


def test_a_job_comes_back_from_json_with_what_it_asks_of_vllm() -> None:
    job = Job(model="m", corpus=("c.jsonl",), engine="vllm", vllm=Vllm(max_model_len=64, extra={"block_size": "32"}))
    assert Job.from_json(json.loads(json.dumps(asdict(job)))) == job


def test_a_job_that_knew_nothing_of_vllm_can_still_be_read() -> None:
    values = asdict(Job(model="m", corpus=("c.jsonl",)))
    del values["vllm"]
    assert Job.from_json(values).vllm == Vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4", "0.32.1+cpu", "0.32.1.post1"])
def test_a_version_that_was_tested_will_do(version: str) -> None:
    assert untested(version) == ""


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "dev"])
def test_a_version_that_was_not_tested_is_named_with_the_way_out(version: str) -> None:
    assert untested(version).startswith(f"vLLM {version} is installed, and 0.32 was tested; pip install 'vllm==0.32.*'")


def test_where_there_is_no_vllm_the_way_to_it_is_named() -> None:
    assert untested(None).startswith("vLLM is not installed; pip install 'vllm==0.32.*'")


def test_the_version_that_was_tested_is_the_one_that_the_extra_installs() -> None:
    from hpc.engine.vllm.installed import TESTED

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"vllm=={TESTED[1]}.*"' in text
