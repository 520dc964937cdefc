"""Describe, place and load models; make a model directory out of a GGUF file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, ByT5Tokenizer, GPT2Config

from hpc.corpus.chat import ChatOptions
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model import endings
from hpc.model.description import describe
from hpc.model.detokenizer import ByToken
from hpc.model.device import resolve_device, resolve_dtype
from hpc.model.find import resolve
from hpc.model.load import load, weights
from hpc.model.loader import Loader
from hpc.model.tokenizer import Tokenizer
from hpc.mpi.binding import Binding
from tests.conftest import DEMO_MODEL, make_tiny_model
from tests.engine.models import CONFIGS, VOCABULARY, tiny
from tests.engine.oracle import CPU

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a CUDA GPU is needed")

Alter = Callable[[str, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with ALiBi."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-bloom"), "bloom")


@pytest.fixture
def alter(tiny_model: Path, tmp_path: Path) -> Alter:
    """Copy the tiny llama with some values of one of its files replaced."""

    def copy(name: str, values: dict[str, Any]) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(tiny_model, folder)
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return folder

    return copy


# What a configuration says.


def test_the_vocabulary_is_as_large_as_the_model_says(tiny_model: Path) -> None:
    assert describe(tiny_model).vocab_size == 258


def test_the_context_is_as_long_as_the_model_says(tiny_model: Path) -> None:
    assert describe(tiny_model).context_tokens == 512


def test_a_model_with_alibi_has_no_limit_of_context(tiny_bloom: Path) -> None:
    assert describe(tiny_bloom).context_tokens is None


def test_a_context_under_an_older_name_is_found(tmp_path: Path) -> None:
    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    assert describe(tmp_path).context_tokens == 77


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"rope_parameters": YARN}, 2048),
        ({"rope_scaling": {**YARN, "type": "yarn"}}, 2048),  # as cards of before 2026 say
        ({"rope_parameters": YARN, "max_position_embeddings": 640}, 2048),
        ({"rope_parameters": YARN, "max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": {**YARN, "rope_type": "linear"}}, 2048),
        ({"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("original")}}, 512),
        ({"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 512),
    ],
)
def test_a_context_that_is_stretched_is_factor_times_original(
    alter: Alter, values: dict[str, Any], context: int
) -> None:
    folder = alter("config.json", values)
    if "rope_scaling" in values:
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config))
    assert describe(folder).context_tokens == context


@pytest.mark.parametrize("asked", [100, 5000])
def test_the_context_that_the_user_says_goes_before_the_models(tiny_model: Path, asked: int) -> None:
    assert describe(tiny_model, context_tokens=asked).context_tokens == asked


def test_a_context_that_the_user_says_limits_a_model_that_has_no_limit(tiny_bloom: Path) -> None:
    assert describe(tiny_bloom, context_tokens=100).context_tokens == 100


def test_a_context_beyond_a_table_of_positions_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r'"context_tokens" is 78; .* it must be at most 77'):
        describe(tmp_path, context_tokens=78)


def test_a_context_within_a_table_of_positions_is_taken(tmp_path: Path) -> None:
    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    assert describe(tmp_path, context_tokens=77).context_tokens == 77


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, (7, 256)), (0, (0, 256)), ([7, 9], (7, 9, 256)), ([256, 7], (256, 7)), (None, (256,)), (-1, (256,))],
)
def test_the_end_of_sequence_tokens_are_those_of_generation_config_and_config(
    alter: Alter, value: Any, expected: tuple[int, ...]
) -> None:
    assert describe(alter("generation_config.json", {"eos_token_id": value})).eos_token_ids == expected


@pytest.mark.parametrize(("value", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_without_a_generation_config_the_end_of_sequence_tokens_are_those_of_the_config(
    alter: Alter, value: Any, expected: tuple[int, ...]
) -> None:
    folder = alter("config.json", {"eos_token_id": value})
    (folder / "generation_config.json").unlink()
    assert describe(folder).eos_token_ids == expected


def test_the_end_of_sequence_tokens_of_the_part_that_is_a_language_model_count_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 7], "text_config": {"eos_token_id": 9}}')
    assert endings.union(endings.sources(tmp_path, None)) == (5, 7, 9)


@pytest.mark.parametrize(("generation", "expected"), [({"eos_token_id": 7}, (7,)), ({}, (50256,))])
def test_the_end_of_sequence_token_that_a_class_has_by_default_is_the_last_resort(
    tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert endings.union(endings.sources(tmp_path, GPT2Config())) == expected


@pytest.mark.parametrize(
    ("sources", "of_chats", "text"),
    [
        ({"a.json": (7,), "b.json": (7, 9)}, None, "completions end at <7> (7: a.json, b.json) or <9> (9: b.json)"),
        ({"a.json": (7,)}, 8, "completions end at <7> (7: a.json); of chats also at <8> (8: the tokenizer)"),
        ({"a.json": ()}, None, "no file of the model names a token that ends"),
    ],
)
def test_it_is_said_what_ends_a_completion_and_where_that_stands(
    sources: dict[str, tuple[int, ...]], of_chats: int | None, text: str
) -> None:
    assert endings.say(sources, lambda token: f"<{token}>", of_chats) == text


@pytest.mark.parametrize(("eos", "expected"), [((), 256), ((7,), 256), ((7, 256), None)])
def test_the_tokenizers_end_of_a_turn_is_told_where_it_is_none_of_the_models(
    tiny_model: Path, eos: tuple[int, ...], expected: int | None
) -> None:
    assert Tokenizer(tiny_model).chat_ending(eos) == expected


def test_rows_are_checked_for_the_end_of_a_turn_that_the_model_does_not_name(alter: Alter) -> None:
    folder = alter("config.json", {"eos_token_id": 7})
    (folder / "generation_config.json").unlink()
    checker = Loader().checker(Job("m", ("c.jsonl",)), folder)
    assert checker.limits.chat_ending == 256


# Text.


def test_tokens_of_a_fast_tokenizer_are_looked_up(tiny_model: Path) -> None:
    assert isinstance(Tokenizer(tiny_model).decode, ByToken)


def test_a_tokenizer_in_python_makes_text_of_whole_characters(tmp_path: Path) -> None:
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    decode = Tokenizer(tmp_path).decode
    tokens = [byte + 3 for byte in "aé日".encode()]
    texts = [decode([*tokens[1:end], 1], tokens[:1]) for end in range(2, 7)]
    assert (texts, decode.special_tokens["</s>"]) == (["", "é", "é", "é", "é日"], 1)


# Device and dtype.


@pytest.mark.parametrize("local_rank", [0, 3])
def test_the_device_cpu_is_the_cpu(local_rank: int) -> None:
    assert resolve_device("cpu", local_rank) == CPU


@no_gpu
def test_without_a_gpu_the_device_auto_is_the_cpu() -> None:
    assert resolve_device("auto", 0) == CPU


@no_gpu
def test_without_a_gpu_the_device_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"device" is "cuda", but .* no CUDA GPU; .* use auto'):
        resolve_device("cuda", 0)


@no_gpu
def test_a_job_for_a_gpu_where_there_is_none_is_refused_before_anything_is_loaded() -> None:
    job = Job("model", ("corpus",), device="cuda", dtype="float32")
    with pytest.raises(Refusal, match="no CUDA GPU"):
        Loader().check(job, Path("model"), Binding("here", 0, 1))
    with pytest.raises(Refusal, match="no CUDA GPU"):
        Loader().dtype(replace(job, dtype="auto"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_dtype_that_is_named_is_kept(dtype: str, device: str) -> None:
    assert resolve_dtype(dtype, device) == dtype


def test_on_the_cpu_the_dtype_auto_is_float32() -> None:
    assert resolve_dtype("auto", "cpu") == "float32"


@no_gpu
def test_without_a_gpu_the_dtype_auto_for_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA GPU"):
        resolve_dtype("auto", "cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(tiny_model: Path, dtype: str) -> None:
    model = load(tiny_model, CPU, dtype, threads=1)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_a_model_is_loaded_for_inference(tiny_model: Path) -> None:
    assert not load(tiny_model, CPU, "float32", threads=1).training


@pytest.mark.parametrize("threads", [2, 1])
def test_a_model_is_loaded_for_the_threads_that_are_asked_for(tiny_model: Path, threads: int) -> None:
    load(tiny_model, CPU, "float32", threads)
    assert torch.get_num_threads() == threads


# The demo model, converted from GGUF.


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model: Path) -> Tokenizer:
    """The tokenizer of the demo model."""
    return Tokenizer(demo_model)


def test_a_converted_model_has_a_configuration(demo_model: Path) -> None:
    assert AutoConfig.from_pretrained(demo_model).model_type == "llama"


def test_a_converted_model_is_no_longer_quantized(demo_model: Path) -> None:
    assert "quantization_config" not in json.loads((demo_model / "config.json").read_text())


def test_a_converted_model_describes_its_tokens(demo_model: Path) -> None:
    described = describe(demo_model)
    assert (described.vocab_size, described.context_tokens, described.eos_token_ids) == (49152, 8192, (2,))


def test_a_converted_model_renders_a_system_and_a_user_turn(demo_tokenizer: Tokenizer) -> None:
    text = demo_tokenizer.render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_turns_of_a_converted_model_are_special_tokens(demo_tokenizer: Tokenizer) -> None:
    [tokens] = demo_tokenizer.encode(["<|im_start|>user\nHi<|im_end|>"], special_tokens=False)
    assert (tokens[0], tokens[-1]) == (1, 2)


def test_special_tokens_have_no_text(demo_tokenizer: Tokenizer) -> None:
    [tokens] = demo_tokenizer.encode(["<|im_start|>Hi<|im_end|>"], special_tokens=False)
    assert demo_tokenizer.decode(tokens) == "Hi"


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  spaces   before, between and after  ",
        "tabs\tand\n\nlines\r\n\n  indented",
        "digits 0123456789 and 3.14159, 1e-7",
        "don't , stop . now !",
        "naïve Übung – “quoted”",
        "日本語のテキスト",
        "עברית and العربية",
        "🙂 👩‍👩‍👧 🇩🇪",
        "e\u0301 is not \u00e9",
        "\u200bzero\u200dwidth\ufeff",
        "\x00\x01\x7f",
        "x = [\n    1,\n    22]\n",
    ],
    ids=ascii,
)
def test_text_comes_back_from_the_tokens_of_a_converted_model(
    demo_tokenizer: Tokenizer, text: str, special_tokens: bool
) -> None:
    [tokens] = demo_tokenizer.encode([text], special_tokens)
    assert demo_tokenizer.decode(tokens) == text


def test_each_digit_is_a_token_of_its_own(demo_tokenizer: Tokenizer) -> None:
    [tokens] = demo_tokenizer.encode(["1234567"], special_tokens=False)
    assert [demo_tokenizer.decode([token]) for token in tokens] == list("1234567")


@pytest.mark.parametrize(
    ("text", "pieces"), [("a  1", ["a", "  ", "1"]), ("[\n    22]", ["[", "\n    ", "2", "2", "]"])], ids=ascii
)
def test_spaces_before_a_digit_are_one_token(demo_tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    [tokens] = demo_tokenizer.encode([text], special_tokens=False)
    assert [demo_tokenizer.decode([token]) for token in tokens] == pieces


def test_a_gguf_file_is_converted_once(demo_model: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in [demo_model, *demo_model.iterdir()]}
    again = resolve(str(DEMO_MODEL)).path
    assert {file.name: file.stat().st_mtime_ns for file in [again, *again.iterdir()]} == before


@pytest.mark.slow
def test_the_weights_of_a_converted_model_answer_a_question(demo_model: Path, demo_tokenizer: Tokenizer) -> None:
    model = load(demo_model, CPU, "float32", threads=2)
    text = demo_tokenizer.render([{"role": "user", "content": "What is the capital of France?"}])
    [tokens] = demo_tokenizer.encode([text], special_tokens=False)
    output = model.generate(torch.tensor([tokens]), max_new_tokens=16, do_sample=False, pad_token_id=2)
    assert "Paris" in demo_tokenizer.decode(output[0, len(tokens) :].tolist())


@pytest.mark.parametrize(
    ("kind", "in_a_layer"),
    [
        ("llama", 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96),
        ("mixtral", 2 * 64 * 64 + 2 * 64 * 32 + 4 * 64 + 2 * 3 * 64 * 96),
    ],
)
def test_a_token_costs_two_operations_for_each_weight_of_a_matrix_that_it_meets(kind: str, in_a_layer: int) -> None:
    model = tiny(CONFIGS[kind])
    size, token, choice = weights(model)
    assert (token, choice) == (2 * 2 * in_a_layer, 2 * 64 * VOCABULARY)
    assert size == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_a_model_without_a_head_of_its_own_has_no_cost_of_choosing() -> None:
    model = tiny(CONFIGS["llama"])
    model.get_output_embeddings = lambda: None
    assert weights(model)[2] == 0


# Chat templates of a tiny model.


CLOSED_BRACKETS = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant{{ mood }}>{% endif %}"
)
CHAT = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "The cat "}]


@pytest.fixture(scope="module")
def templated(tiny_model: Path) -> Tokenizer:
    """A tokenizer with another chat template than the model's."""
    return Tokenizer(tiny_model, chat_template=CLOSED_BRACKETS)


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (ChatOptions(), "<user>say</><assistant>The cat </><assistant>"),
        (ChatOptions(begins=False, continues=True), "<user>say</><assistant>The cat "),
        (ChatOptions(begins=False), "<user>say</><assistant>The cat </>"),
        (ChatOptions(variables={"mood": "!"}), "<user>say</><assistant>The cat </><assistant!>"),
        (ChatOptions([{"function": {"name": "f"}}]), "[f]<user>say</><assistant>The cat </><assistant>"),
        (ChatOptions(template="{{ messages[0].content + messages[1].content }}"), "sayThe cat "),
    ],
)
def test_a_chat_is_written_as_its_options_say(templated: Tokenizer, options: ChatOptions, prompt: str) -> None:
    assert templated.render(CHAT, options) == prompt


def test_the_source_of_a_template_has_the_date_fixed(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model, chat_date="2020-01-01T00:00:00", chat_template="{{ strftime_now('%Y') }}")
    assert tokenizer.render([{"role": "user", "content": ""}]) == "2020"


def test_a_chat_template_that_is_none_is_refused_with_its_line(tiny_model: Path) -> None:
    with pytest.raises(Refusal, match="in line 2"):
        Tokenizer(tiny_model, chat_template="\n{% for %}")
