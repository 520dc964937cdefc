"""Reading in a whole run: corpora on a pipe, files of other formats, and the date of chat templates."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.corpus.chat import PLAIN, ChatOptions
from hpc.corpus.limits import PromptLimits
from hpc.corpus.tokenize import Checker
from hpc.exit import OK, UNFINISHED, Refusal
from hpc.job import Job
from hpc.model.find import Model
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.output.verify import merge_run, verify_run
from hpc.pipeline import generate
from hpc.sampling_params import SamplingParams
from tests.conftest import finish, read_rows, run_jobs, start_echo, write_corpus
from tests.corpus.formats.written import FORMATS, data_set, write
from tests.fakes import CONTEXT, VOCABULARY, ByteTokenizer, EchoLoader


class DatedLoader(EchoLoader):
    """A model whose chat template writes the date."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")

    def resolve(self, model: str) -> Model:
        return Model(self.folder, "dated:1", "bytes", "dated")

    def checker(self, job: Job, path: Path) -> Checker:
        class Dated(ByteTokenizer):
            def render(self, messages: Any, options: ChatOptions = PLAIN) -> str:
                return job.chat_date + super().render(messages, options)

        return Checker(job.sampling, PromptLimits(VOCABULARY, CONTEXT), Dated())


def run(tmp_path: Path, *contents: str, **knobs: Any) -> int:
    """Run chats in tmp_path/runs/rows."""
    rows = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    corpus = write_corpus(tmp_path / "rows.jsonl", rows)
    values = {"corpus": (str(corpus),), "runs": str(tmp_path / "runs"), "sampling": SamplingParams(max_new_tokens=4)}
    job = Job(model="dated", **{**values, **knobs})
    return generate(job, Single(), DatedLoader(tmp_path / "model"), Stop())


def job_json(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "runs/rows/job.json").read_text())


def generated(tmp_path: Path) -> int:
    return int(json.loads((tmp_path / "runs/rows/summary.json").read_text())["generated_tokens"])


def feed(path: Path, data: str) -> Path:
    """Make a FIFO, and a thread that writes into it as soon as somebody reads."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_text(data), daemon=True).start()
    return path


def line(text: str) -> str:
    return json.dumps({"prompt": text}) + "\n"


def test_a_run_goes_on_with_the_date_at_which_it_was_begun(tmp_path: Path) -> None:
    run(tmp_path, "a", chat_date="2020-01-01")
    run(tmp_path, "a", "b")
    assert (generated(tmp_path), job_json(tmp_path)["job"]["chat_date"]) == (4, "2020-01-01T00:00:00")


def test_the_date_is_fixed_at_the_first_attempt(tmp_path: Path) -> None:
    run(tmp_path, "a")
    first = job_json(tmp_path)
    assert first["job"]["chat_date"] == first["bound"]["chat_date"] != ""


def test_another_date_is_refused_with_both(tmp_path: Path) -> None:
    run(tmp_path, "a", chat_date="2020-01-01")
    with pytest.raises(Refusal, match="chat_date 2020-01-01T00:00:00, and this job has chat_date 2021-01-01T00:00:00"):
        run(tmp_path, "a", chat_date="2021-01-01")


def test_a_run_that_was_begun_without_a_date_goes_on_with_that_of_its_token_store(tmp_path: Path) -> None:
    run(tmp_path, "a")
    written = job_json(tmp_path)
    del written["bound"]["chat_date"], written["job"]["chat_date"]
    (tmp_path / "runs/rows/job.json").write_text(json.dumps(written))
    os.utime(tmp_path / "runs/rows/store.json", (1_600_000_000, 1_600_000_000))
    (tmp_path / "runs/rows/journal/0001-00000.jsonl").unlink()  # whose prompts are of now
    run(tmp_path, "a")
    assert job_json(tmp_path)["bound"]["chat_date"].startswith("2020-09-1")


def test_all_shares_of_a_run_have_one_date(tmp_path: Path) -> None:
    run(tmp_path, "a", "b", share="0/2", chat_date="2020-01-01")
    assert run(tmp_path, "a", "b", share="1/2") == OK
    assert len(read_rows(tmp_path / "runs/rows/completions.jsonl")) == 2


def test_a_corpus_on_a_pipe_is_answered_and_can_be_verified(tmp_path: Path) -> None:
    fifo = feed(tmp_path / "rows.jsonl.pipe", line("cat") + line("dog"))
    assert run(tmp_path, corpus=(str(fifo),), name="rows") == OK
    assert [row["text"] for row in read_rows(tmp_path / "runs/rows/completions.jsonl")] == ["catc", "dogd"]
    assert verify_run(tmp_path / "runs/rows") == OK


def test_a_second_run_reads_the_pipe_again_and_keeps_what_was_done(tmp_path: Path) -> None:
    run(tmp_path, corpus=(str(feed(tmp_path / "pipe", line("cat"))),), name="rows")
    run(tmp_path, corpus=(str(feed(tmp_path / "pipe", line("cat") + line("dog"))),), name="rows")
    assert generated(tmp_path) == 4
    assert len([path for path in (tmp_path / "runs/rows/corpus").rglob("*") if path.is_file()]) == 1


def test_job_json_names_the_copy_so_that_it_can_be_run_without_the_pipe(tmp_path: Path) -> None:
    run(tmp_path, corpus=(str(feed(tmp_path / "pipe", line("cat"))),), name="rows")
    assert run(tmp_path, corpus=tuple(job_json(tmp_path)["job"]["corpus"]), name="rows") == OK
    assert generated(tmp_path) == 0


def test_a_pipe_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, corpus=(str(feed(tmp_path / "pipe", line("cat"))),), name="rows")
    with pytest.raises(Refusal, match="none of them is for a row of this corpus"):
        run(tmp_path, corpus=(str(feed(tmp_path / "pipe", line("dog"))),), name="rows")
    assert verify_run(tmp_path / "runs/rows") == OK


def test_standard_input_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="through a pipe gives no name to the run; add --name"):
        run(tmp_path, corpus=("-",))


def test_jobs_that_share_a_corpus_cannot_read_it_from_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="a pipe can be read once; write it to a file"):
        run(tmp_path, corpus=("-",), name="rows", share="0/2")


def test_a_file_of_another_format_is_refused_before_a_run_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("id,prompt\n0,cat\n")
    with pytest.raises(Refusal, match=r'corpus ".*c\.jsonl" cannot be read: it looks like CSV'):
        run(tmp_path, corpus=(str(path),))
    assert not (tmp_path / "runs").exists()


def test_another_format_on_a_pipe_is_refused(tmp_path: Path) -> None:
    fifo = feed(tmp_path / "pipe", "id,prompt\n0,cat\n")
    with pytest.raises(Refusal, match="it looks like CSV"):
        run(tmp_path, corpus=(str(fifo),), name="rows")


def listen_for(number: int, what: str) -> int:
    """Return how many Python processes whose command names `what` have a handler for a signal."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if what in (command := (folder / "cmdline").read_text()) and command.startswith(sys.executable):
                caught = re.search(r"SigCgt:\s*(\w+)", (folder / "status").read_text())
                found += bool(caught and int(caught[1], 16) >> (number - 1) & 1)
    return found


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_ends_the_wait_for_the_writer_of_a_fifo(tmp_path: Path, ranks: int) -> None:
    os.mkfifo(tmp_path / "c.jsonl")
    process = start_echo(tmp_path, tmp_path / "c.jsonl", ranks=ranks)
    assert process.stderr is not None
    while "which is copied into" not in (said := process.stderr.readline()):
        assert said, "it ended by itself"
    deadline = time.monotonic() + 60
    while listen_for(signal.SIGTERM, f"echo_job.py\0--corpus\0{tmp_path}") < max(
        1, ranks
    ):  # the others may be starting
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, timeout_s=60)
    assert (tmp_path / "runs/c/state").read_text() == "drained\n"
    assert ranks or ended.code == UNFINISHED


TEXTS = [{"id": f"{index:03}", "prompt": f"prompt {index}, é", "tag": "a\nb"} for index in range(20)]


@pytest.mark.parametrize("name", ["c.jsonl.zst", "utf16.jsonl", "c.json", "c.csv", "groups.parquet", "c.arrow", "set"])
def test_a_corpus_of_another_format_gives_the_same_output_and_verifies(tmp_path: Path, name: str) -> None:
    path = data_set(tmp_path / name, TEXTS) if name == "set" else write(tmp_path / name, FORMATS[name](TEXTS))
    plain = write_corpus(tmp_path / "plain.jsonl", TEXTS)
    for number, corpus in enumerate((plain, path)):
        assert run(tmp_path, corpus=(str(corpus),), name=f"run{number}") == OK
    outputs = [(tmp_path / f"runs/run{number}/completions.jsonl").read_bytes() for number in range(2)]
    assert outputs[0] == outputs[1]
    assert verify_run(tmp_path / "runs/run1") == OK
    assert run(tmp_path, corpus=(str(path),), name="run1") == OK


def test_a_run_of_a_folder_is_called_after_it(tmp_path: Path) -> None:
    data_set(tmp_path / "questions", TEXTS)
    assert run(tmp_path, corpus=(str(tmp_path / "questions"),)) == OK
    assert (tmp_path / "runs/questions/completions.jsonl").exists()


def test_a_run_of_a_packed_file_is_called_without_both_endings(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl.gz", FORMATS["c.jsonl.gz"](TEXTS))
    assert run(tmp_path, corpus=(str(tmp_path / "c.jsonl.gz"),)) == OK
    assert (tmp_path / "runs/c/completions.jsonl").exists()


def test_a_packed_corpus_on_a_pipe_is_read(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    threading.Thread(target=lambda: fifo.write_bytes(FORMATS["c.csv.zst"](TEXTS)), daemon=True).start()
    assert run(tmp_path, corpus=(str(fifo),), name="rows", format="csv") == OK
    assert len(read_rows(tmp_path / "runs/rows/completions.jsonl")) == len(TEXTS)


def test_a_cut_corpus_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl.gz", FORMATS["c.jsonl.gz"](TEXTS)[:-10])
    with pytest.raises(Refusal, match="here the packed file is cut"):
        run(tmp_path, corpus=(str(path),), name="rows")
    assert not (tmp_path / "runs/rows/completions.jsonl").exists()


def test_ranks_make_the_rows_of_blocks_of_every_kind(tmp_path: Path) -> None:
    prompt = "a prompt of 60 characters\nthat stands on two lines é"
    rows = [{"id": f"{index:05}", "prompt": f"{prompt} {index}"} for index in range(5000)]
    names = ("c.parquet", "c.arrow", "c.csv", "c.json", "c.jsonl.zst")
    paths = [write(tmp_path / name, FORMATS[name](rows)) for name in names]
    job = {"model": "echo", "sampling": {"max_new_tokens": 1}}
    jobs = [{**job, "name": f"run of {path.name}", "corpus": [str(path)]} for path in paths]
    for output in run_jobs(tmp_path, jobs, ranks=3).values():
        assert [row["id"] for row in read_rows(output)] == [row["id"] for row in rows]


def test_a_corpus_that_was_cut_since_it_was_read_is_named_by_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "c.jsonl.gz", FORMATS["c.jsonl.gz"](TEXTS))
    run(tmp_path, corpus=(str(path),), name="rows")
    write(path, path.read_bytes()[:-10])
    with pytest.raises(Refusal, match=r"c\.jsonl\.gz has changed since it was read \(.*cut"):
        merge_run(tmp_path / "runs/rows")
    assert verify_run(tmp_path / "runs/rows") == OK
    assert "cannot be checked" in capsys.readouterr().out
