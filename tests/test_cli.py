"""The command line: its flags are frozen, its refusals are exit code 2, its help is quick."""

import contextlib
import io
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hpc import Job, SamplingParams, Slurm, Vllm
from hpc.cli.flags import GROUPS
from hpc.cli.main import parse
from hpc.cli.verbs import Settle
from tests.conftest import ROOT, Scattergen, finish, scattergen, start, write_corpus

FLAGS = {
    "--job", "--model", "--corpus", "--format", "--text-per", "--name", "--runs", "--limit", "--engine", "--device",
    "--dtype", "--tail", "--buckets",
    "--batch-tokens", "--max-num-seqs", "--cache-gib", "--replica-gpus", "--replica-cpus", "--chat-date",
    "--deterministic", "--drafts",
    "--source-lang", "--target-lang", "--instruction", "--sampling.forced-bos-token-id",
    "--return-token-ids", "--truncate-prompts", "--context-tokens", "--trust-remote-code",
    "--max-error-rate", "--retry-errors", "--force",
    "--column", "--prompt-template", "--system", "--last-assistant", "--chat-template", "--chat-template-kwargs",
    "--row-chat-templates", "--unknown-parameters",
    "--output", "--output-format", "--output-rows-per-file", "--error-file",
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


OWN_FLAGS = {
    "run": set(),
    "plan": {"--json", "--deadline-min", "--calibration", "--plot", "--ranks-on-node", "--gpu-gib"},
    "script": set(),
    "submit": {"--doctor"},
}
SMALL = {
    "doctor": {
        "--job", "--model", "--device", "--corpus", "--name", "--runs", "--engine", "--replica-gpus", "--replica-cpus",
    },
    "calibrate": {
        "--job", "--model", "--device", "--dtype", "--context-tokens", "--trust-remote-code", "--engine",
        "--max-num-seqs", "--cache-gib", "--replica-gpus", "--replica-cpus", "--deterministic", "--drafts", "--seconds",
    } | {flag for flag in FLAGS if flag.startswith("--vllm.")},
    "settle": {"--job", "--share"},
}  # fmt: skip
VERBS = "run,plan,script,submit,doctor,calibrate,status,verify,merge,report,show,cancel,fetch"


Help = Callable[..., str]


def flags_in(text: str) -> list[str]:
    return [line.split()[1].rstrip(",") for line in text.splitlines() if line.startswith("│ --")]


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Help:
    """What a verb's --help prints at 120 columns, on a terminal of UTF-8."""
    monkeypatch.setenv("COLUMNS", "120")

    def ask(verb: str, flag: str = "--help", job: Job | None = None) -> str:
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
            parse([verb, flag], job)
        printed.seek(0)
        return printed.read()

    return ask


def test_the_flags_of_run_are_those_of_the_list() -> None:
    assert sorted(flags_in(scattergen("run", "--help", COLUMNS="120").out)) == sorted(FLAGS)


@pytest.mark.parametrize("verb", ["plan", "script", "submit"])
def test_a_verb_about_a_job_has_the_flags_of_run_and_its_own(verb: str, help_of: Help) -> None:
    assert sorted(flags_in(help_of(verb))) == sorted(FLAGS | OWN_FLAGS[verb])


@pytest.mark.parametrize("verb", SMALL)
def test_a_verb_that_needs_little_of_a_job_has_no_other_flags(verb: str, help_of: Help) -> None:
    assert sorted(flags_in(help_of(verb))) == sorted(SMALL[verb])


def test_every_field_of_a_job_is_in_one_group_of_flags() -> None:
    assert sorted(itertools.chain(*GROUPS.values())) == sorted(each.name for each in fields(Job))


def test_the_help_of_run_fits_two_screens(help_of: Help) -> None:
    assert len(help_of("run").splitlines()) <= 120


def test_the_help_of_run_shows_its_flags_in_groups(help_of: Help) -> None:
    titles = re.findall("^╭─ (.*?) options ─", help_of("run"), re.MULTILINE)
    assert titles == list(GROUPS)


def test_the_help_says_of_a_flag_what_fits_its_line(help_of: Help) -> None:
    [line] = [line for line in help_of("run").splitlines() if "--tail" in line]
    said = "Share of the predicted work that rank 0 hands out on demand (0.5)"
    assert line.strip("│ ").split(maxsplit=2) == ["--tail", "FLOAT", said]


def test_a_default_of_many_lines_takes_one_line_of_the_help(help_of: Help) -> None:
    asked = "Translate this text into German.\n\n" * 9
    job = Job("m", ("c.jsonl",), instruction=asked + "{prompt}")
    shown = help_of("run", job=job)
    assert "('Translate this text into German. Translate" in shown
    assert len(shown.splitlines()) <= 120


def test_the_verbose_help_says_all_of_a_flag(help_of: Help) -> None:
    said = " ".join(help_of("run", "-H").replace("│", "").split())
    assert "nor more than 0.15 for hf. (default: 0.5)" in said


def test_the_verbs_are_those_of_the_list() -> None:
    assert f"{{{VERBS}}}" in scattergen("--help", COLUMNS="200").out


def test_a_job_file_gives_a_verb_what_its_flags_do_not() -> None:
    base = Job("m", ("c.jsonl",), runs="/r", name="n", slurm=Slurm(max_requeues=3))
    verb, command = parse(["settle", "--share", "1/2"], base)
    assert (verb.takes, command.job) == (Settle, replace(base, share="1/2"))


def test_flags_go_before_the_job_of_a_job_file() -> None:
    base = Job("m", ("c.jsonl",), limit=3, deterministic=True, sampling=SamplingParams(stop=("x",), seed=9))
    given = ["run", "--limit", "None", "--no-deterministic", "--sampling.seed", "1", "--vllm.no-enable-prefix-caching"]
    _, command = parse(given, base)
    changed = {"limit": None, "deterministic": False, "vllm": Vllm(enable_prefix_caching=False)}
    assert command.job == replace(base, **changed, sampling=SamplingParams(stop=("x",), seed=1))


def test_flags_make_the_job_that_python_makes() -> None:
    given = ["submit", "--doctor", "--model", "m", "--corpus", "a", "b", "--slurm.additional-parameters", "x", "1"]
    _, command = parse([*given, "--vllm.extra", "block_size", "32"], None)
    own = {"slurm": Slurm(additional_parameters={"x": "1"}), "vllm": Vllm(extra={"block_size": "32"})}
    assert (command.doctor, command.job) == (True, Job("m", ("a", "b"), **own))


def test_calibrate_needs_no_corpus() -> None:
    _, command = parse(["calibrate", "--model", "m", "--dtype", "float32"], None)
    assert (command.job.model, command.job.dtype) == ("m", "float32")


def test_settle_without_the_job_of_a_run_is_exit_code_2() -> None:
    ended = scattergen("settle")
    assert (ended.code, "--job RUN/job.json" in ended.err) == (2, True)


def test_a_flag_that_a_verb_does_not_use_is_exit_code_2() -> None:
    ended = scattergen("calibrate", "--model", "m", "--slurm.nodes", "2")
    assert (ended.code, "--slurm.nodes" in ended.err) == (2, True)


def test_a_mistyped_flag_is_exit_code_2_with_a_suggestion() -> None:
    ended = scattergen("run", "--model", "m", "--corpus", "c", "--sampling.max-new-tokns", "3")
    assert ended.code == 2
    assert "--sampling.max-new-tokens" in ended.err


def test_a_mistyped_verb_is_exit_code_2_with_the_verbs() -> None:
    ended = scattergen("verfy", "runs/x")
    assert ended.code == 2
    assert VERBS.replace(",", ", ") in ended.err


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
