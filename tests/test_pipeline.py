"""The whole of a run in this process: the pipeline with a single process for a world and an echo for an engine."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.corpus.tokenize import Checker
from hpc.engine.interface import OnStep, Source, begin, pull
from hpc.engine.sequence import Sequence
from hpc.exit import Refusal
from hpc.job import EARLY_SIGNAL_S, Job, Slurm
from hpc.model.find import Model, resolve
from hpc.model.identity import samples
from hpc.model.loader import Loader, Replica
from hpc.mpi.binding import Binding, host_info
from hpc.mpi.comm import Buffer, LostRank, Message, Single, Tag
from hpc.mpi.signals import Stop
from hpc.output.verify import merge_run, verify_run
from hpc.pipeline import generate
from hpc.sampling_params import SamplingParams
from hpc.slurm.allocation import Allocation
from tests.conftest import read_rows, write_corpus
from tests.fakes import ByteTokenizer, EchoEngine, EchoLoader

SHORT = SamplingParams(max_new_tokens=4)


class CountingLoader(EchoLoader):
    """An echo that counts how often it is asked for something."""

    def __init__(self, engine: EchoEngine | None = None, model: str = "echo") -> None:
        super().__init__(engine, model)
        self.checkers = self.loads = 0

    def checker(self, job: Job, path: Path) -> Checker:
        self.checkers += 1
        return super().checker(job, path)

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        self.loads += 1
        return super().load(job, path, place)


class FailingEngine(EchoEngine):
    """Fails requests whose prompt begins with "bad"; the others are echoed."""

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        while requests := pull(source, 100, on_step):
            bad = [r for r in requests if ByteTokenizer().decode(r.token_ids.tolist()).startswith("bad")]
            yield [
                Sequence(r, error="it is bad") if r in bad else Sequence(r, [65] * r.sampling.max_new_tokens)
                for r in requests
            ]


def run(tmp_path: Path, rows: list[object], loader: Loader | None = None, **knobs: object) -> int:
    """Run a job over rows, in the run directory tmp_path/runs/rows."""
    corpus = write_corpus(tmp_path / "rows.jsonl", rows) if rows else tmp_path / "rows.jsonl"
    values = {"model": "echo", "corpus": (str(corpus),), "runs": str(tmp_path / "runs"), "sampling": SHORT, **knobs}
    return generate(Job(**values), Single(), loader or EchoLoader(), Stop())  # type: ignore[arg-type]


def output(tmp_path: Path) -> list[dict[str, object]]:
    return read_rows(tmp_path / "runs/rows/completions.jsonl")


def summary(tmp_path: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((tmp_path / "runs/rows/summary.json").read_text())
    return value


def test_a_row_is_answered_with_id_text_reason_and_usage(tmp_path: Path) -> None:
    run(tmp_path, [{"id": "a", "prompt": "xyz"}])
    assert output(tmp_path) == [
        {
            "id": "a",
            "text": "xyzx",
            "finish_reason": "length",
            "usage": {"prompt_tokens": 3, "completion_tokens": 4},
            "error": None,
        }
    ]


def test_every_other_key_of_a_row_is_carried_under_meta(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "x", "source": {"page": 3}, "größe": 1.5}])
    assert output(tmp_path)[0]["meta"] == {"source": {"page": 3}, "größe": 1.5}


def test_token_ids_are_given_on_request(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "AB"}], return_token_ids=True)
    assert output(tmp_path)[0]["token_ids"] == [65, 66, 65, 66]


def test_rows_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    run(tmp_path, [{"id": n, "prompt": "x" * (1 + 37 * n % 50)} for n in range(50)])
    assert [row["id"] for row in output(tmp_path)] == list(range(50))


def test_equal_greedy_rows_are_generated_once(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "same"}, {"prompt": "other"}, {"prompt": "same"}])
    assert (summary(tmp_path)["duplicates"], summary(tmp_path)["generated_tokens"]) == (1, 8)


def test_equal_sampled_rows_are_generated_each_for_itself(tmp_path: Path) -> None:
    sampled = {"prompt": "same", "sampling": {"temperature": 1}}
    run(tmp_path, [sampled, sampled])
    assert summary(tmp_path)["duplicates"] == 0


def test_a_second_run_generates_nothing(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    loader = CountingLoader()
    assert run(tmp_path, [], loader) == 0
    assert loader.loads == 0


def test_a_second_run_over_an_unchanged_corpus_does_not_tokenize_it_again(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}])
    loader = CountingLoader()
    run(tmp_path, [], loader)
    assert loader.checkers == 0


def test_a_row_that_is_added_is_the_only_one_generated(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    run(tmp_path, [{"prompt": "new"}, {"prompt": "b"}, {"prompt": "a"}])
    assert [row["text"] for row in output(tmp_path)] == ["newn", "bbbb", "aaaa"]
    assert summary(tmp_path)["generated_tokens"] == 4


def test_summary_keeps_the_figures_of_every_attempt(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}])
    run(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    attempts = summary(tmp_path)["attempts"]
    assert isinstance(attempts, list)
    assert [attempt["generated_tokens"] for attempt in attempts] == [4, 4]


def test_summary_has_the_names_that_programs_rely_on(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}])
    assert set(summary(tmp_path)) >= {
        "rows", "errors", "duplicates", "prompt_tokens", "completion_tokens", "generated_tokens", "ranks", "engine",
        "guessed_tokens", "accepted_tokens",
        "dtype", "device", "seconds", "rank_busy_seconds", "attempts",
    }  # fmt: skip


def test_a_request_that_fails_in_the_engine_becomes_an_error_row(tmp_path: Path) -> None:
    assert run(tmp_path, [{"prompt": "bad one"}, {"prompt": "good"}], EchoLoader(FailingEngine())) == 0
    assert [row["error"] for row in output(tmp_path)] == [{"kind": "engine", "message": "id 0: it is bad"}, None]


def test_an_engine_error_stays_in_a_second_run(tmp_path: Path) -> None:
    rows = [{"prompt": "bad one"}, {"prompt": "good"}]
    run(tmp_path, list(rows), EchoLoader(FailingEngine()))
    loader = CountingLoader()
    run(tmp_path, [], loader)
    assert loader.loads == 0


def test_retry_errors_generates_them_again_and_the_completion_counts(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "bad one"}, {"prompt": "good"}], EchoLoader(FailingEngine()))
    run(tmp_path, [], retry_errors=True)
    run(tmp_path, [])
    assert [row["error"] for row in output(tmp_path)] == [None, None]


class FolderLoader(EchoLoader):
    """An echo for the model in a folder, known by a name of its own choice, or as `hpc.model.find` knows it."""

    def __init__(self, folder: Path, revision: str = "") -> None:
        super().__init__()
        self.folder, self.revision = folder, revision

    def resolve(self, model: str) -> Model:
        found = resolve(str(self.folder), self.folder.parent / "cache")
        return replace(found, revision=self.revision or found.revision)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model, of which a byte can be edited that no sample of its bytes has."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [10**6], "data_offsets": [0, 10**6]}}).encode()
    (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(10**6))
    return made


def edit(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(20_000)
        file.write(b"X")


def test_a_run_is_not_gone_on_with_when_its_model_was_edited_in_place(tmp_path: Path, folder: Path) -> None:
    run(tmp_path, [{"prompt": "a"}], FolderLoader(folder))
    edit(folder)
    with pytest.raises(Refusal, match="was begun with model blake2b:"):
        run(tmp_path, [], FolderLoader(folder))


def test_a_run_that_knows_its_model_by_samples_goes_on_and_is_bound_to_all_of_it(tmp_path: Path, folder: Path) -> None:
    run(tmp_path, [{"prompt": "a"}], FolderLoader(folder, samples(folder)))
    assert run(tmp_path, [], FolderLoader(folder)) == 0
    edit(folder)  # no sample of before has this byte
    with pytest.raises(Refusal, match="was begun with model blake2b:"):
        run(tmp_path, [], FolderLoader(folder))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "bad one"}, {"prompt": "bad two"}], "every request ended in an error"),
        ([{"prompt": ""}, "no JSON"], "every row of the corpus was refused"),
        ([{"prompt": ""}, {"prompt": "bad one"}], "every request ended in an error"),
    ],
)
def test_a_run_in_which_every_row_is_an_error_fails_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[object], words: str
) -> None:
    assert run(tmp_path, rows, EchoLoader(FailingEngine())) == 1
    printed = capsys.readouterr()
    assert (words in printed.out, "every row is an error row" in printed.err) == (True, True)
    assert (tmp_path / "runs/rows/state").read_text() == "failed\n"


def test_a_summary_with_error_rows_names_the_command_that_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [{"prompt": "hi"}, {"prompt": ""}])
    assert f"scattergen show {tmp_path / 'runs/rows'} --where finish_reason=error" in capsys.readouterr().out


def test_a_second_run_of_nothing_but_errors_fails_again(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "bad one"}], EchoLoader(FailingEngine()))
    loader = CountingLoader()
    assert (run(tmp_path, [], loader), loader.loads) == (1, 0)


def test_a_run_of_nothing_but_errors_is_mended_by_retry_errors(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "bad one"}], EchoLoader(FailingEngine()))
    assert run(tmp_path, [], retry_errors=True) == 0
    assert (tmp_path / "runs/rows/state").read_text() == "done\n"


def test_another_model_in_the_same_directory_is_refused_naming_the_field(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}])
    with pytest.raises(Refusal, match="model echo:1, and this job has model other:1"):
        run(tmp_path, [], EchoLoader(model="other"))


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has no rows"):
        run(tmp_path, ["", "  "])


def test_a_refused_run_can_be_repeated_at_once(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has no rows"):
        run(tmp_path, [""])
    assert run(tmp_path, [{"prompt": "a"}]) == 0


class LonelyWorld(Single):
    """Rank 0 of two, of which the other was killed after its greeting."""

    size = 2

    def __init__(self) -> None:
        self._messages = [Message(1, Tag.HELLO, host_info())]

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        pass

    def poll(self) -> list[Message]:
        if not self._messages:
            raise LostRank("MPI no longer reaches every rank")
        return [self._messages.pop()]


def test_a_lost_rank_leaves_the_run_as_if_rank_0_had_been_killed_too(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [{"prompt": "abc"}])
    job = Job(model="echo", corpus=(str(corpus),), runs=str(tmp_path), name="run")
    with pytest.raises(LostRank):
        generate(job, LonelyWorld(), EchoLoader(), Stop())
    assert (tmp_path / "run" / "state").read_text().strip() == "running"


def test_a_stop_before_the_first_step_drains_with_75(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    stop = Stop()
    stop.request("test")
    job = Job(model="echo", corpus=(str(corpus),), runs=str(tmp_path / "runs"))
    assert generate(job, Single(), EchoLoader(), stop) == 75
    assert (tmp_path / "runs/rows/state").read_text() == "drained\n"


def test_several_files_and_a_glob_are_one_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "b.jsonl", [{"prompt": "b"}])
    write_corpus(tmp_path / "a.jsonl", [{"prompt": "a"}])
    first = write_corpus(tmp_path / "z.json", [{"prompt": "z"}])
    job = Job(model="echo", corpus=(str(first), str(tmp_path / "*.jsonl")), runs=str(tmp_path / "runs"), sampling=SHORT)
    generate(job, Single(), EchoLoader(), Stop())
    assert [row["text"] for row in read_rows(tmp_path / "runs/z/completions.jsonl")] == ["zzzz", "aaaa", "bbbb"]


def test_show_prints_the_first_prompts_with_their_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [{"prompt": "first"}, {"prompt": "second"}], show=1)
    assert "> first\nfirs\n" in capsys.readouterr().out


@pytest.mark.parametrize("first", [{"messages": None, "prompt": "a"}, {"messages": []}, {"prompt": "\ud800"}, "[1"])
def test_show_prints_any_row_there_can_be(tmp_path: Path, first: object) -> None:
    assert run(tmp_path, [first, {"prompt": "b"}], show=2) == 0


@pytest.mark.parametrize("levels", [90, 101, 950, 990, 996, 1000, 5000])
def test_deep_nesting_ends_no_run(tmp_path: Path, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    rows = ['{"prompt": ' + deep + "}", '{"prompt": "a", "kept": ' + deep + "}", {"prompt": "good"}]
    assert run(tmp_path, rows) == 0


def test_nesting_that_can_be_carried_is_carried(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a", "kept": [[[{"b": [1]}]]]}])
    assert output(tmp_path)[0]["meta"] == {"kept": [[[{"b": [1]}]]]}


def test_a_refused_row_adds_nothing_to_the_prompt_tokens(tmp_path: Path) -> None:
    run(tmp_path, [{"id": "x", "prompt": "aaaa"}, {"id": "x", "prompt": "bbbb"}])
    assert summary(tmp_path)["prompt_tokens"] == 4


@pytest.mark.parametrize("name", ["tokens.i32", "offsets.i64", "keys.b16", "requests.jsonl"])
def test_a_damaged_token_store_is_made_again(tmp_path: Path, name: str) -> None:
    run(tmp_path, [{"prompt": "a"}])
    (tmp_path / "runs/rows" / name).write_bytes(b"")
    assert run(tmp_path, []) == 0
    assert output(tmp_path)[0]["text"] == "aaaa"


def test_a_corpus_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "a"}])
    folder = tmp_path / "runs/rows"
    before = {name: (folder / name).read_bytes() for name in ("job.json", "state", "store.json", "tokens.i32")}
    with pytest.raises(Refusal, match="none of them is for a row"):
        run(tmp_path, [{"prompt": "quite another"}])
    assert {name: (folder / name).read_bytes() for name in before} == before


# Several samples, and log probabilities.

SEVERAL = {"temperature": 1, "n": 3}


def texts(row: dict[str, object]) -> list[str]:
    samples = row["samples"]
    assert isinstance(samples, list)
    return [sample["text"] for sample in samples]


def test_a_row_that_asks_for_samples_gets_them_all(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": SEVERAL}])
    [row] = output(tmp_path)
    assert (row["text"], texts(row)) == ("abca", ["abca", "bcab", "cabc"])


def test_the_samples_of_a_row_that_are_more_than_the_slots_of_an_engine_are_all_there(tmp_path: Path) -> None:
    run(
        tmp_path,
        [{"prompt": "abc", "sampling": {**SEVERAL, "n": 20}}, {"prompt": "x"}],
        EchoLoader(EchoEngine(slots=3)),
    )
    assert [len(texts(output(tmp_path)[0])), output(tmp_path)[1]["text"]] == [20, "xxxx"]


def test_the_tokens_of_all_samples_are_accounted_for(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": SEVERAL}, {"prompt": "x"}])
    assert [row["usage"] for row in output(tmp_path)] == [
        {"prompt_tokens": 3, "completion_tokens": 12},
        {"prompt_tokens": 1, "completion_tokens": 4},
    ]
    figures = summary(tmp_path)
    assert [figures[name] for name in ("prompt_tokens", "completion_tokens", "generated_tokens")] == [4, 16, 16]


def test_a_second_run_over_rows_with_samples_generates_nothing_and_writes_the_same(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": {**SEVERAL, "logprobs": 2}}, {"prompt": "x"}])
    before, loader = (tmp_path / "runs/rows/completions.jsonl").read_bytes(), CountingLoader()
    (tmp_path / "runs/rows/completions.jsonl").unlink()
    assert run(tmp_path, [], loader) == 0
    assert (loader.loads, (tmp_path / "runs/rows/completions.jsonl").read_bytes()) == (0, before)


def test_another_number_of_samples_is_generated_anew(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": SEVERAL}, {"prompt": "x"}])
    run(tmp_path, [{"prompt": "abc", "sampling": {**SEVERAL, "n": 4}}, {"prompt": "x"}])
    assert (len(texts(output(tmp_path)[0])), summary(tmp_path)["generated_tokens"]) == (4, 16)


def test_a_run_with_samples_is_verified(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": {**SEVERAL, "logprobs": 1}}, {"prompt": "x"}])
    assert verify_run(tmp_path / "runs/rows") == 0


def test_a_changed_sample_is_named_by_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": SEVERAL}, {"prompt": "x"}])
    path = tmp_path / "runs/rows/completions.jsonl"
    path.write_bytes(path.read_bytes().replace(b"bcab", b"oops"))
    assert (verify_run(tmp_path / "runs/rows"), "row 0" in capsys.readouterr().out) == (1, True)


# A corpus that is not there any more, or not what it was.

CARRYING: list[object] = [
    {"id": "é", "prompt": "a", "page": 3, "\ud800": [1.5, None]},
    {"prompt": "b", "sampling": {"n": 2, "temperature": 1, "logprobs": 1}},
    {"prompt": "", "kept": True},
    "no JSON",
    {"prompt": "a"},
]


def finished_and_gone(tmp_path: Path, how: str) -> Path:
    """A run whose corpus was moved, emptied or replaced since."""
    run(tmp_path, CARRYING)
    corpus = tmp_path / "rows.jsonl"
    if how == "moved":
        corpus.rename(tmp_path / "elsewhere.jsonl")
    else:
        corpus.write_text("" if how == "emptied" else '{"prompt": "another"}\n' * 9)
    return tmp_path / "runs/rows"


@pytest.mark.parametrize("how", ["moved", "emptied", "replaced"])
def test_verify_checks_all_but_meta_where_the_corpus_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert verify_run(finished_and_gone(tmp_path, how)) == 0
    printed = capsys.readouterr().out
    assert ("wrong" in printed, '"meta", which was not checked' in printed, "rows.jsonl" in printed) == (
        False, True, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong"), [(b'"aaaa"', b'"aaab"'), (b"no JSON", b"yes JSON"), (b'"id": 1', b'"id": 9')]
)
def test_verify_finds_what_is_wrong_where_the_corpus_is_gone(tmp_path: Path, right: bytes, wrong: bytes) -> None:
    path = finished_and_gone(tmp_path, "moved") / "completions.jsonl"
    lines = path.read_bytes()
    assert right in lines
    path.write_bytes(lines.replace(right, wrong))
    assert verify_run(path.parent) == 1


def test_verify_checks_meta_of_a_corpus_that_was_only_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, CARRYING)
    (tmp_path / "rows.jsonl").touch()
    path = tmp_path / "runs/rows/completions.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"page": 3', b'"page": 4'))
    assert (verify_run(path.parent), '"meta" is {"page": 4' in capsys.readouterr().out) == (1, True)


@pytest.mark.parametrize("how", ["moved", "emptied", "replaced"])
def test_merge_says_what_is_missing_where_the_corpus_is_gone(tmp_path: Path, how: str) -> None:
    with pytest.raises(Refusal, match=r"rows.jsonl (cannot be read \(No such file|has changed).*--name rows$"):
        merge_run(finished_and_gone(tmp_path, how))


def test_a_run_whose_corpus_was_moved_goes_on_where_it_is_now(tmp_path: Path) -> None:
    finished_and_gone(tmp_path, "moved")
    loader = CountingLoader()
    assert run(tmp_path, [], loader, corpus=(str(tmp_path / "elsewhere.jsonl"),), name="rows") == 0
    assert (loader.loads, verify_run(tmp_path / "runs/rows")) == (0, 0)


def test_merge_writes_samples_again_from_the_journals(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "abc", "sampling": {**SEVERAL, "logprobs": 0}}, {"prompt": "x"}])
    path = tmp_path / "runs/rows/completions.jsonl"
    before = path.read_bytes()
    path.unlink()
    assert (merge_run(tmp_path / "runs/rows"), path.read_bytes()) == (0, before)


def test_a_sample_that_fails_makes_its_row_an_error_row(tmp_path: Path) -> None:
    class OneFails(FailingEngine):
        def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
            while requests := pull(source, 100, on_step):
                for one in begin(requests):
                    error = "it broke" if one.sample == 1 else None
                    yield [Sequence(one.request, [65] * 4, error, one.sample)]

    run(tmp_path, [{"prompt": "abc", "sampling": SEVERAL}, {"prompt": "x"}], EchoLoader(OneFails()))
    assert [row["error"] for row in output(tmp_path)] == [
        {"kind": "engine", "message": "id 0, sample 1: it broke"}, None,
    ]  # fmt: skip


def test_log_probabilities_are_given_where_a_row_asks(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "AB", "sampling": {"logprobs": 2}}, {"prompt": "AB"}])
    asked, other = output(tmp_path)
    assert asked["logprobs"] == {
        "token_ids": [65, 66, 65, 66],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [[[65, -0.5], [66, -0.5]], [[66, -0.5], [67, -0.5]]] * 2,
    }
    assert "logprobs" not in other


def test_rows_of_one_prompt_with_and_without_log_probabilities_are_no_duplicates(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "AB", "sampling": {"logprobs": 0}}, {"prompt": "AB"}, {"prompt": "AB"}])
    assert summary(tmp_path)["duplicates"] == 1


def test_more_samples_than_one_without_a_temperature_are_refused(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": "AB", "sampling": {"n": 2}}, {"prompt": "x"}])
    assert "set a temperature above 0" in str(output(tmp_path)[0]["error"])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[dict[str, object]]:
    """The output of the hf engine with the tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    sampled = {"temperature": 1.2, "max_new_tokens": 8, "seed": 3}
    rows: list[object] = [
        {"id": "few", "prompt": "once upon", "sampling": {**sampled, "n": 2}},
        {"id": "many", "prompt": "once upon", "sampling": {**sampled, "n": 5, "logprobs": 1}},
        {"id": "least", "prompt": "once upon", "sampling": {**sampled, "min_new_tokens": 8}},
    ]
    run(folder, rows, Loader(), model=str(tiny_model), device="cpu", engine="hf", return_token_ids=True)
    return output(folder)


def test_samples_of_a_model_differ(tiny_run: list[dict[str, object]]) -> None:
    assert len(set(texts(tiny_run[1]))) == 5


def test_samples_of_a_model_are_counted(tiny_run: list[dict[str, object]]) -> None:
    samples: Any = tiny_run[1]["samples"]
    usage: Any = tiny_run[1]["usage"]
    assert usage["completion_tokens"] == sum(len(sample["token_ids"]) for sample in samples)


def test_samples_of_a_model_have_log_probabilities(tiny_run: list[dict[str, object]]) -> None:
    samples: Any = tiny_run[1]["samples"]
    assert [len(sample["logprobs"]["token_logprobs"]) for sample in samples] == [
        len(sample["token_ids"]) for sample in samples
    ]


def test_a_row_of_a_model_has_at_least_min_new_tokens(tiny_run: list[dict[str, object]]) -> None:
    usage: Any = tiny_run[2]["usage"]
    assert usage["completion_tokens"] == 8


def test_the_first_samples_do_not_depend_on_how_many_there_are(
    tmp_path: Path, tiny_model: Path, tiny_run: list[dict[str, object]]
) -> None:
    sampled = {"temperature": 1.2, "max_new_tokens": 8, "seed": 3, "n": 3}
    rows: list[object] = [{"id": "many", "prompt": "once upon", "sampling": sampled}]
    run(tmp_path, rows, Loader(), model=str(tiny_model), device="cpu", engine="hf")
    assert texts(output(tmp_path)[0]) == texts(tiny_run[1])[:3]


def run_until(tmp_path: Path, ends_at: float) -> int:
    """Run ten rows in an allocation that ends then."""
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": f"row {index}"} for index in range(10)])
    job = Job("echo", (str(corpus),), runs=str(tmp_path / "runs"), sampling=SHORT)
    return generate(job, Single(), EchoLoader(), Stop(), Allocation("7", 0, ends_at))


def test_in_an_allocation_that_is_about_to_end_nothing_is_begun(tmp_path: Path) -> None:
    early = time.time() + Slurm().signal_delay_s + EARLY_SIGNAL_S - 1
    assert run_until(tmp_path, early) == 75
    run = tmp_path / "runs" / "rows"
    assert ((run / "state").read_text(), list((run / "journal").iterdir())) == ("drained\n", [])


def test_an_attempt_that_drains_ends_with_what_is_done_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until(tmp_path, time.time())
    assert capsys.readouterr().err.splitlines()[-1].endswith("0 rows done, 0 of them in this attempt; 10 left")


def test_in_an_allocation_with_time_left_everything_is_done(tmp_path: Path) -> None:
    assert run_until(tmp_path, time.time() + 3600) == 0


def test_the_slurm_job_of_an_attempt_is_written_down(tmp_path: Path) -> None:
    run_until(tmp_path, time.time() + 3600)
    assert (tmp_path / "runs" / "rows" / "slurm_jobs").read_text() == "7\n"
