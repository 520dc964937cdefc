"""vLLM inside the ranks: the same answers on any number of them, killed, told to stop, or in several processes each.

The environment of `make test-vllm` has it; elsewhere these tests are skipped. A start of vLLM takes 12 s of an idle
core, so few runs serve many tests.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ended, finish, read_rows, start, write_corpus
from tests.mpi.test_faults import is_gone, ranks_of, records, wait_until

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here; `make test-vllm` has an environment with it",
    ),
    pytest.mark.timeout(600),
]

VLLM = ("--engine", "vllm", "--dtype", "float32", "--cache-gib", "0.25")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]


def some_rows() -> list[dict[str, Any]]:
    """Rows of many lengths: greedy, sampled, of several samples, with log probabilities, stops and penalties."""
    chance = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}, {"stop": ["a", "\u03a9x"]}, {"logprobs": 2},
        {"temperature": 0.8, "top_k": 20, "n": 2}, {"repetition_penalty": 1.3, "min_new_tokens": 4},
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for index in range(48):
        prompt = " ".join(chance.choice(WORDS) for _ in range(chance.choice([1, 2, 5, 20, 60])))
        rows.append({"id": f"row-{index}", "prompt": prompt, "sampling": kinds[index % len(kinds)]})
    rows.append({"id": "too long", "prompt": "x" * 600})
    rows.append({"id": "nearly greedy", "prompt": "x", "sampling": {"temperature": 0.001}})
    return rows


def run(folder: Path, model: Path, corpus: Path, *flags: str, ranks: int = 0, timeout_s: float = 240) -> Ended:
    """Run vLLM over a corpus in `folder / "runs" / "run"`."""
    return finish(begin(folder, model, corpus, *flags, ranks=ranks), timeout_s)


def begin(folder: Path, model: Path, corpus: Path, *flags: str, ranks: int = 0) -> Any:
    return start(
        ["-m", "hpc", "run", "--model", str(model), "--corpus", str(corpus), "--runs", str(folder / "runs"), "--name",
         "run", "--sampling.max-new-tokens", "24", *VLLM, *flags],
        ranks, TMPDIR=str(temporary(folder)),
    )  # fmt: skip


def temporary(folder: Path) -> Path:
    """Return the temporary folder of the runs in `folder`: sockets are made there, so its name is short."""
    path = Path("/tmp") / f"sg-{zlib.crc32(bytes(folder)):x}"
    path.mkdir(exist_ok=True)
    made.add(path)
    return path


made: set[Path] = set()


@pytest.fixture(scope="module", autouse=True)
def no_temporary_folder_stays() -> Iterator[None]:
    yield
    for path in made:
        shutil.rmtree(path)


def completions(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_rows(folder / "runs/run/completions.jsonl")}


def without_logprobs(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Log probabilities agree to 1e-4 and stand outside byte comparisons."""
    return {name: {k: v for k, v in row.items() if k != "logprobs"} for name, row in rows.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.jsonl", some_rows())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, wide_model: Path, corpus: Path) -> tuple[Path, Ended]:
    """One process over the corpus."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(folder, wide_model, corpus)


def test_every_row_is_answered_and_the_summary_says_by_what(alone: tuple[Path, Ended]) -> None:
    folder, ended = alone
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "runs/run/summary.json").read_text())
    assert (summary["rows"], summary["errors"], summary["engine"]) == (50, 2, "vllm")


def test_a_prompt_that_is_too_long_and_a_value_that_vllm_has_not_are_error_rows(alone: tuple[Path, Ended]) -> None:
    rows = completions(alone[0])
    assert "at most 511 leave room" in rows["too long"]["error"]["message"]
    assert "the temperature is 0.001; vLLM knows 0 (greedy)" in rows["nearly greedy"]["error"]["message"]


def test_vllm_says_nothing_on_the_terminal_and_everything_in_the_log(alone: tuple[Path, Ended]) -> None:
    folder, ended = alone
    assert [line for line in ended.err.splitlines() if "[0/1]" not in line] == []
    assert "vllm" not in ended.out.replace(str(folder), "")
    assert "Starting to load model" in "".join(path.read_text() for path in (folder / "runs/run/log").iterdir())


def test_its_steps_and_tokens_are_in_the_events(alone: tuple[Path, Ended]) -> None:
    [path] = (alone[0] / "runs/run/events").iterdir()
    last = [event for event in read_rows(path) if event["phase"] == "generated"][-1]
    assert last["steps"] > 20
    assert last["step_prompt"] + last["cached_tokens"] >= last["prompt_tokens"] > 0
    assert last["prefill_s"] > 0 < last["decode_s"]


def test_an_ended_run_leaves_no_temporary_files(alone: tuple[Path, Ended]) -> None:
    assert [path.name for path in temporary(alone[0]).glob("scattergen-*")] == []


def test_greedy_rows_are_those_of_the_native_engine(
    alone: tuple[Path, Ended], tmp_path: Path, wide_model: Path, corpus: Path
) -> None:
    assert run(tmp_path, wide_model, corpus, "--engine", "native").code == 0
    found, expected = without_logprobs(completions(alone[0])), without_logprobs(completions(tmp_path))
    greedy = [row["id"] for row in some_rows()[:48] if "temperature" not in row["sampling"]]
    assert {name: found[name] for name in greedy} == {name: expected[name] for name in greedy}


def test_a_shuffled_corpus_on_two_ranks_gives_every_id_the_same_completion(
    alone: tuple[Path, Ended], tmp_path: Path, wide_model: Path
) -> None:
    rows = some_rows()
    random.Random(2).shuffle(rows)
    shuffled = write_corpus(tmp_path / "rows.jsonl", rows)
    ended = run(tmp_path, wide_model, shuffled, "--max-num-seqs", "4", ranks=2)
    assert ended.code == 0, ended.err
    expected, found = without_logprobs(completions(alone[0])), without_logprobs(completions(tmp_path))
    del expected["too long"], found["too long"]  # its message names the line
    assert found == expected
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert all(seconds > 0 for seconds in summary["rank_busy_seconds"])


LONG = ("--max-num-seqs", "4", "--sampling.max-new-tokens", "120")


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows enough for some seconds of a rank."""
    chance = random.Random(3)
    rows = [{"id": f"row-{n}", "prompt": f"{n} " + " ".join(chance.choices(WORDS, k=5))} for n in range(150)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, wide_model: Path, long_corpus: Path) -> bytes:
    """What the native engine makes of these."""
    folder = tmp_path_factory.mktemp("expected")
    assert run(folder, wide_model, long_corpus, *LONG, "--engine", "native").code == 0
    return (folder / "runs/run/completions.jsonl").read_bytes()


def killed_by(send: Callable[[Any], None], folder: Path, *arguments: Any, ranks: int = 0) -> Ended:
    """Begin a run, wait until some more rows are done, send a signal; return how it ended."""
    before = records(folder / "runs/run")
    process = begin(folder, *arguments, ranks=ranks)
    try:
        wait_until(folder / "runs/run", before + 8, seconds=200)
        send(process)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return finish(process, 60)


def test_killed_and_told_to_stop_it_goes_on_where_it_was(
    tmp_path: Path, wide_model: Path, long_corpus: Path, expected: bytes
) -> None:
    what = (tmp_path, wide_model, long_corpus, *LONG)

    def kill_rank_1(process: Any) -> None:
        os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)

    assert killed_by(kill_rank_1, *what, ranks=2).code != 0
    assert killed_by(lambda process: process.send_signal(signal.SIGUSR2), *what).code == 75
    assert killed_by(lambda process: process.send_signal(signal.SIGTERM), *what).code == 75
    assert run(*what).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected
    keys = [row["key"] for path in (tmp_path / "runs/run/journal").iterdir() for row in read_rows(path)]
    assert len(keys) == len(set(keys))


TWO_PROCESSES = ("--replica-cpus", "2", "--device", "cpu")


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_a_rank_of_two_processes_is_killed_whole_and_the_next_removes_what_it_left(
    tmp_path: Path, wide_model: Path, long_corpus: Path, expected: bytes
) -> None:
    what = (tmp_path, wide_model, long_corpus, *LONG, *TWO_PROCESSES)
    seen: list[int] = []

    def kill(process: Any) -> None:
        seen.extend(descendants(process.pid))
        process.kill()

    killed_by(kill, *what)
    until = time.monotonic() + 20
    while not all(map(is_gone, seen)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(seen) >= 2
    assert [pid for pid in seen if not is_gone(pid)] == []
    [left] = temporary(tmp_path).glob("scattergen-rank-*")
    shared = [Path(line) for line in (left / "shared-memory").read_text().splitlines()]
    assert any(path.name.startswith("vllm_dist_") for path in shared)

    def stop_all_of_the_task(process: Any) -> None:
        os.killpg(process.pid, signal.SIGUSR2)  # as srun does: the workers get it too

    assert killed_by(stop_all_of_the_task, *what).code == 75
    assert [path for path in shared if path.exists()] == []
    assert [path.name for path in temporary(tmp_path).glob("scattergen-*")] == []
    assert run(*what).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


def test_a_worker_that_dies_ends_the_run_with_a_fault_of_the_engine(
    tmp_path: Path, wide_model: Path, long_corpus: Path
) -> None:
    def kill_a_worker(process: Any) -> None:
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
        workers = [pid for pid, name in named.items() if b"VLLM::Worker" in name or b"spawn_main" in name]
        os.kill(workers[-1], signal.SIGKILL)

    ended = killed_by(kill_a_worker, tmp_path, wide_model, long_corpus, *LONG, *TWO_PROCESSES)
    assert ended.code == 1
    assert "EngineFault: vLLM has failed" in ended.err


THREE_PROCESSES = ("--engine", "auto", "--replica-cpus", "3", "--device", "cpu", "--cache-gib", "0.5")


def test_a_model_on_three_processes_gives_what_native_gives(tmp_path: Path, demo_model: Path) -> None:
    """SmolLM2 has 9 heads, and 3 of keys."""
    prompts = ["The capital of France is", "2 + 2 =", "def add(a, b):", "Once upon a time, in a village"]
    rows = write_corpus(tmp_path / "rows.jsonl", [{"id": text, "prompt": text} for text in prompts])
    for name, flags in (("three", THREE_PROCESSES), ("native", ("--engine", "native"))):
        (tmp_path / name).mkdir()
        ended = run(tmp_path / name, demo_model, rows, *flags)
        assert ended.code == 0, ended.err
    assert completions(tmp_path / "three") == completions(tmp_path / "native")
    summary = json.loads((tmp_path / "three/runs/run/summary.json").read_text())
    assert summary["engine"] == "vllm"
    assert "the vllm engine keeps the model on 3 devices of each rank" in summary["engine_reason"]


def test_heads_that_two_processes_cannot_share_are_refused(tmp_path: Path, demo_model: Path, corpus: Path) -> None:
    ended = run(tmp_path, demo_model, corpus, *TWO_PROCESSES)
    assert ended.code == 2
    assert "9 attention heads and 3 of keys and values, which 2 devices cannot share evenly; 1, 3, 9 can" in ended.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--vllm.extra", "no_such_argument", "1"), '"no_such_argument" is no engine argument of vLLM; they are model'),
        (("--vllm.quantization", "nonsense"), "vLLM refuses this job"),
    ],
)
def test_what_vllm_does_not_know_is_refused_before_the_corpus_is_read(
    tmp_path: Path, wide_model: Path, corpus: Path, flags: tuple[str, ...], said: str
) -> None:
    ended = run(tmp_path, wide_model, corpus, *flags)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "runs/run/tokens.i32").exists()


def test_it_can_be_calibrated_and_then_planned_for(tmp_path: Path, wide_model: Path, corpus: Path) -> None:
    flags = ["--model", str(wide_model), "--engine", "vllm", "--cache-gib", "0.25", "--dtype", "float32"]
    own, runs = {"XDG_CACHE_HOME": str(tmp_path / "cache")}, ("--runs", str(tmp_path / "runs"))
    measured = finish(start(["-m", "hpc", "calibrate", *flags, "--max-num-seqs", "16"], **own))
    assert measured.code == 0, measured.err
    assert "vllm on " in measured.out
    planned = finish(start(["-m", "hpc", "plan", *flags, "--corpus", str(corpus), "--json", *runs], **own))
    assert planned.code == 0, planned.err
    values = json.loads(planned.out)
    assert values["predictions"]
    assert values["calibration"].startswith("vllm on ")
