"""Fixtures: a tiny model with random weights, the demo model, and a way to start scattergen as users do."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system turn comes first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file, and all that start ranks or jobs, on one worker, unless they name their group.

    Here, as a worker of xdist reads the marks before any `pytest_collection_modifyitems` of a conftest.
    """
    if item.config.pluginmanager.hasplugin("xdist") and not item.get_closest_marker("xdist_group"):
        folder = item.path.parent.name
        group = folder if folder in ("mpi", "slurm") else str(item.path.relative_to(ROOT))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Keep what is there, as are torch's modules, out of garbage collections: with them, each takes 0.2 s."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str


def start(arguments: Sequence[str], ranks: int = 0, **environment: str) -> subprocess.Popen[str]:
    """Start Python with arguments; with `ranks`, under the mpirun of the environment it runs in."""
    command = [sys.executable, *arguments]
    if ranks:
        mpirun = Path(sys.executable).parent / "mpirun"
        command = [str(mpirun), "-n", str(ranks), *command]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", timeout_s: float = 240) -> Ended:
    """Wait for a process; kill all of its session and fail if it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"{process.args} hung for {timeout_s} s:\n{out}\n{err}")
    return Ended(process.returncode, out, err)


Scattergen = Callable[..., Ended]


@pytest.fixture
def echo(tmp_path: Path) -> Scattergen:
    """Run the echo job in `tmp_path / "runs"`: echo("corpus.jsonl", "--flag", ranks=2, ECHO_…=…)."""

    def run(corpus: Path, *flags: str, ranks: int = 0, **environment: str) -> Ended:
        return finish(start_echo(tmp_path, corpus, *flags, ranks=ranks, **environment))

    return run


def start_echo(folder: Path, corpus: Path, *flags: str, ranks: int = 0, **environment: str) -> "subprocess.Popen[str]":
    """Begin the echo job with its run directories in `folder / "runs"`."""
    script = str(ROOT / "tests" / "echo_job.py")
    return start([script, "--corpus", str(corpus), "--runs", str(folder / "runs"), *flags], ranks, **environment)


def scattergen(*arguments: str, ranks: int = 0, **environment: str) -> Ended:
    """Run `python -m hpc` with arguments."""
    return finish(start(["-m", "hpc", *arguments], ranks, **environment))


def own_cache(folder: Path) -> dict[str, str]:
    """Return the environment of a user whose cache, in `folder`, has the kernel alone, which takes long to build."""
    from hpc.model.find import user_cache

    (folder / "scattergen").mkdir(parents=True, exist_ok=True)
    kernels = user_cache() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    if not (folder / "scattergen/kernels").exists():
        (folder / "scattergen/kernels").symlink_to(kernels)
    return {"XDG_CACHE_HOME": str(folder)}


def run_jobs(folder: Path, jobs: Sequence[Mapping[str, Any]], ranks: int) -> dict[str, Path]:
    """Run jobs, of which each must succeed, in one launch; return the output of each by its name.

    A job is given as the values of a `Job`, and perhaps "ranks", if fewer run it; its run directory is `folder / name`.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"runs": str(folder), "sampling": {}, **job} for job in jobs]))
    ended = finish(start([str(ROOT / "tests" / "many_jobs.py"), str(file)], ranks))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out.splitlines()[-1]) == [0] * len(jobs), ended.err
    return {job["name"]: folder / job["name"] / "completions.jsonl" for job in jobs}


def run_here(folder: Path, **values: Any) -> Path:
    """Run a job in this process, which must succeed; return its output."""
    from hpc.job import Job
    from hpc.mpi.comm import Single
    from tests.many_jobs import run

    values = {"runs": str(folder), "name": "run", "sampling": {}, **values}
    assert run(Job.from_json(values), Single()) == 0
    return folder / values["name"] / "completions.jsonl"


def write_corpus(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSONL; a string or bytes is a line as it is."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights, tokens that are bytes, and a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"), "llama")


def make_tiny_model(folder: Path, kind: str) -> Path:
    """Save a tiny random model of a kind with a byte tokenizer: 256 bytes, <eos> 256, <pad> 257."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        XGLMConfig,
        XGLMForCausalLM,
    )

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=64, n_layer=2, n_head=4, eos_token_id=256))
    elif kind == "xglm":
        shape = {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}
        model = XGLMForCausalLM(XGLMConfig(vocab_size=258, **shape, bos_token_id=None, eos_token_id=256))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16 if kind == "llama" else 32,  # vLLM attends on a CPU to no fewer
                max_position_embeddings=512,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=257,
            )
        )
    with torch.no_grad():  # as initialised, every token is about as probable: larger weights tell them apart
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_summarizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers with random weights; its tokenizer puts <eos> behind a text."""
    return make_tiny_encoder_decoder(tmp_path_factory.mktemp("tiny-t5"), "t5")


@pytest.fixture(scope="session")
def tiny_translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NLLB of two layers with random weights, of three languages, 90 source and 60 target tokens."""
    return make_tiny_encoder_decoder(tmp_path_factory.mktemp("tiny-nllb"), "nllb")


def make_tiny_encoder_decoder(folder: Path, kind: str) -> Path:
    """Save a tiny random encoder-decoder: a T5 with a byte tokenizer, or an NLLB with a tokenizer of letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        AutoModelForSeq2SeqLM,
        M2M100Config,
        NllbTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
    )

    torch.manual_seed(0)
    if kind == "t5":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
        made = tokenizer.backend_tokenizer
        made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 256)])
        config: Any = T5Config(
            vocab_size=258, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=257,
            pad_token_id=257, eos_token_id=256,
        )  # fmt: skip
    else:
        letters = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
        tokenizer = NllbTokenizer(
            vocab={letter: index for index, letter in enumerate(letters)}, merges=[],
            extra_special_tokens=["deu_Latn", "eng_Latn", "fra_Latn"],
        )  # fmt: skip
        config = M2M100Config(
            vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=60,
            tie_word_embeddings=False, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        )  # fmt: skip
    model: Any = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():  # as initialised, the source hardly tells in the output
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with heads as wide as vLLM wants them."""
    return make_tiny_model(tmp_path_factory.mktemp("wide-llama"), "wide llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The directory of the demo model, converted once for this machine."""
    if not DEMO_MODEL.exists():
        pytest.fail(f"{DEMO_MODEL} is missing: `make {DEMO_MODEL.relative_to(ROOT)}` fetches it")
    from hpc.model.find import resolve

    return resolve(str(DEMO_MODEL)).path


@pytest.fixture
def copy_run(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a run directory, so that a test can damage it."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "copy"))
