"""The command line: its flags are frozen, its refusals are exit code 2, its help is quick."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Scattergen, finish, scattergen, start, write_corpus

FLAGS = {
    "--model", "--corpus", "--name", "--runs", "--limit", "--engine", "--device", "--dtype", "--tail", "--buckets",
    "--batch-tokens", "--max-num-seqs", "--cache-gib", "--chat-date", "--deterministic", "--drafts",
    "--return-token-ids", "--truncate-prompts", "--context-tokens", "--trust-remote-code",
    "--max-error-rate", "--retry-errors", "--force",
    "--show", "--sampling.max-new-tokens", "--sampling.temperature", "--sampling.top-p", "--sampling.top-k",
    "--sampling.min-p", "--sampling.repetition-penalty", "--sampling.presence-penalty", "--sampling.frequency-penalty",
    "--sampling.n", "--sampling.min-new-tokens", "--sampling.logprobs",
    "--sampling.stop", "--sampling.stop-token-ids", "--sampling.ignore-eos", "--sampling.seed",
    "--share", "--slurm.template", "--slurm.nodes", "--slurm.tasks-per-node", "--slurm.gpus-per-node",
    "--slurm.cpus-per-task", "--slurm.time-min", "--slurm.signal-delay-s", "--slurm.partition", "--slurm.account",
    "--slurm.qos", "--slurm.constraint", "--slurm.gres", "--slurm.mem", "--slurm.nodelist", "--slurm.exclude",
    "--slurm.exclusive", "--slurm.reservation", "--slurm.dependency", "--slurm.mpi", "--slurm.array",
    "--slurm.max-requeues", "--slurm.additional-parameters",
    "--vllm.gpu-memory-utilization", "--vllm.max-model-len", "--vllm.max-num-batched-tokens", "--vllm.quantization",
    "--vllm.kv-cache-dtype", "--vllm.enforce-eager", "--vllm.enable-prefix-caching", "--vllm.speculative-config",
    "--vllm.extra",
}  # fmt: skip


def test_the_flags_of_run_are_those_of_the_list() -> None:
    options = [line for line in scattergen("run", "--help", COLUMNS="200").out.splitlines() if line.startswith("│ --")]
    assert {line.split()[1].rstrip(",") for line in options} == FLAGS


def test_the_verbs_are_those_of_the_list() -> None:
    assert (
        "{run,plan,script,submit,doctor,calibrate,settle,status,verify,merge,report,cancel,fetch}"
        in scattergen("--help", COLUMNS="200").out
    )


def test_a_mistyped_flag_is_exit_code_2_with_a_suggestion() -> None:
    ended = scattergen("run", "--model", "m", "--corpus", "c", "--sampling.max-new-tokns", "3")
    assert ended.code == 2
    assert "--sampling.max-new-tokens" in ended.err


def test_a_mistyped_verb_is_exit_code_2_with_the_verbs() -> None:
    ended = scattergen("verfy", "runs/x")
    assert ended.code == 2
    assert (
        "run, plan, script, submit, doctor, calibrate, settle, status, verify, merge, report, cancel, fetch"
        in ended.err
    )


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--tail", "1.5", "from 0 (static) to 1"),
        ("--sampling.max-new-tokens", "0", "at least 1"),
        ("--sampling.top-p", "2", "at most 1"),
        ("--sampling.n", "2", "set a temperature above 0"),
        ("--sampling.logprobs", "21", "from 0 (the chosen tokens' alone) to 20"),
        ("--name", "a/b", "one folder name"),
        ("--limit", "0", "at least 1"),
    ],
)
def test_a_wrong_value_is_exit_code_2_with_the_rule(flag: str, value: str, rule: str) -> None:
    ended = scattergen("run", "--model", "m", "--corpus", "c", flag, value, COLUMNS="300")
    assert ended.code == 2
    assert rule in ended.err


@pytest.mark.parametrize("corpus", ["none.jsonl", "."])
def test_a_corpus_that_is_no_file_is_exit_code_2(tmp_path: Path, corpus: str) -> None:
    assert scattergen("run", "--model", "m", "--corpus", str(tmp_path / corpus)).code == 2


def test_a_model_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "a"}])
    ended = scattergen(
        "run", "--model", "no/such-model", "--corpus", str(corpus), "--runs", str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert ended.code == 2
    assert 'model "no/such-model"' in ended.err


@pytest.mark.parametrize("verb", ["status", "verify", "merge"])
def test_a_folder_that_is_no_run_directory_is_exit_code_2(tmp_path: Path, verb: str) -> None:
    ended = scattergen(verb, str(tmp_path))
    assert ended.code == 2
    assert "is no run directory" in ended.err


def test_status_says_how_many_rows_are_done(echo: Scattergen, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    echo(corpus)
    assert "2 of 2 rows done (1 refused), 0 pending" in scattergen("status", str(tmp_path / "runs/c")).out


def test_status_follow_ends_when_the_run_is_over(echo: Scattergen, tmp_path: Path) -> None:
    echo(write_corpus(tmp_path / "c.jsonl", [{"prompt": "a"}]), ranks=2)
    assert "1 of 1 rows (100%)" in scattergen("status", "--follow", str(tmp_path / "runs/c"), COLUMNS="150").out


def test_the_general_job_takes_everything_from_flags(tmp_path: Path) -> None:
    ended = finish(
        start([str(ROOT / "jobs" / "generate.py"), "--model", "m", "--corpus", str(tmp_path / "none.jsonl")])
    )
    assert (ended.code, "no such file" in ended.err) == (2, True)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["status", "none"], ["verify", "none"]])
def test_what_needs_no_model_loads_neither_torch_nor_mpi(arguments: list[str]) -> None:
    program = (
        "import sys, hpc\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: hpc.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "[]"
