"""A request is journalled when all its samples have ended, and once; the counts are those of all samples."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.engine.interface import OnStep, Source
from hpc.engine.sequence import Sequence as Grown
from hpc.engine.steps import StepLog
from hpc.executor.gather import OwnRecords
from hpc.executor.generate import completion_maker, generate_shard
from hpc.executor.scatter import Backlog
from hpc.output.journal import JournalWriter, decode
from hpc.request import Completion, Request, Sample
from hpc.rundir.progress import Progress
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import letters, request
from tests.fakes import Behind, ByteText, ByteTokenizer

TEXT = ByteTokenizer().decode


class Script:
    """An engine that yields what it is told to."""

    def __init__(self, yields: Sequence[list[Grown]]) -> None:
        self._yields = yields
        self.steps, self.bounds = StepLog(), None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Grown]]:
        yield from self._yields


def asked(row: int = 0, n: int = 3, **sampling: object) -> Request:
    params = SamplingParams(temperature=1, n=n, max_new_tokens=2, **sampling)  # type: ignore[arg-type]
    return request(list(b"ab"), row, params)


def grown(of: Request, sample: int, text: bytes | None = None, error: str | None = None) -> Grown:
    return Grown(of, list(text if text is not None else b"x%d" % sample), error, sample)


def completed(tmp_path: Path, *yields: list[Grown]) -> tuple[list[Completion], Progress]:
    """Return what is in the journal after an engine has yielded this, and the figures."""
    journal, progress = JournalWriter(tmp_path / "j"), Progress()
    backlog = Backlog(SamplingParams(), lambda: None)
    finish = completion_maker((), TEXT)
    generate_shard(Script(yields), backlog, journal, OwnRecords(journal.path), progress, lambda: False, finish)
    lines = journal.path.read_bytes().splitlines(keepends=True) if journal.path.exists() else []
    return [decode(line) for line in lines], progress


def test_samples_that_end_one_by_one_make_one_completion_in_their_order(tmp_path: Path) -> None:
    one = asked()
    [found], _ = completed(tmp_path, [grown(one, 2)], [grown(one, 0)], [grown(one, 1)])
    assert [sample.text for sample in found.samples] == ["x0", "x1", "x2"]


def test_the_text_of_an_encoder_decoder_begins_anew() -> None:
    one, begun = request([1], 0, SamplingParams(max_new_tokens=2)), [Grown(request([1], 0), [2, 3])]
    texts = [
        completion_maker((), Behind(), goes_on)([replace(begun[0], request=one)]).text for goes_on in (True, False)
    ]
    assert texts == [letters([2, 3]), letters([3])]


def test_an_ending_token_that_the_limit_forces_makes_the_completion_one_of_full_length() -> None:
    one = request([1], 0, SamplingParams(max_new_tokens=2))
    found = [completion_maker((9,), TEXT)([Grown(one, [97, 9], cut=cut)]) for cut in (False, True)]
    assert [(each.finish_reason, each.text) for each in found] == [("stop", "a"), ("length", "a")]


def test_a_stop_string_before_the_limit_is_no_cut() -> None:
    one = request([1], 0, SamplingParams(max_new_tokens=3, stop=("b",)))
    found = completion_maker((9,), TEXT)([Grown(one, [97, 98, 9], cut=True)])
    assert (found.finish_reason, found.text) == ("stop", "a")


def test_a_request_without_all_its_samples_is_not_in_the_journal(tmp_path: Path) -> None:
    one = asked()
    found, progress = completed(tmp_path, [grown(one, 2)], [grown(one, 0)])
    assert (found, progress.requests, (tmp_path / "j").exists()) == ([], 0, False)


def test_samples_of_requests_that_end_mixed_are_told_apart(tmp_path: Path) -> None:
    one, other = asked(0, n=2), asked(1, n=2)
    found, _ = completed(
        tmp_path, [grown(one, 0, b"aa"), grown(other, 1, b"dd")], [grown(other, 0, b"cc"), grown(one, 1, b"bb")]
    )
    assert {c.row: [s.text for s in c.samples] for c in found} == {1: ["cc", "dd"], 0: ["aa", "bb"]}


def test_the_tokens_of_all_samples_are_counted(tmp_path: Path) -> None:
    one = asked()
    _, progress = completed(tmp_path, [grown(one, sample) for sample in range(3)])
    assert (progress.rows, progress.requests, progress.prompt_tokens, progress.generated_tokens) == (1, 1, 2, 6)


def test_the_guesses_of_all_samples_are_counted(tmp_path: Path) -> None:
    one = asked()
    samples = [grown(one, sample) for sample in range(3)]
    for sample in samples:
        sample.guessed, sample.accepted = 5, 2
    _, progress = completed(tmp_path, samples)
    assert (progress.guessed_tokens, progress.accepted_tokens) == (15, 6)


def test_an_error_of_one_sample_is_the_requests(tmp_path: Path) -> None:
    one = asked()
    [found], progress = completed(tmp_path, [grown(one, 0), grown(one, 1, error="it broke")], [grown(one, 2)])
    assert found.error == {"kind": "engine", "message": "id 0, sample 1: it broke"}
    assert (progress.errors, found.others) == (1, ())


def test_each_sample_is_trimmed_for_itself(tmp_path: Path) -> None:
    one = asked(stop=("|",))
    [found], _ = completed(tmp_path, [grown(one, i, text) for i, text in enumerate((b"a|", b"abc", b"|a"))])
    assert found.samples == (
        Sample((*b"a|",), "a", "stop"),
        Sample((*b"ab",), "ab", "length"),
        Sample((*b"|",), "", "stop"),
    )


def test_the_text_of_a_completion_is_read_behind_its_prompt() -> None:
    one = request(list("aé".encode()[:2]), 0, SamplingParams(max_new_tokens=2))
    assert completion_maker((), TEXT)([grown(one, 0, b"\xa9b")]).text == "éb"


def test_log_probabilities_are_as_many_as_the_tokens_up_to_a_special_one_that_a_stop_string_names() -> None:
    sequence = grown(request(list(b"a"), 0, SamplingParams(logprobs=0, stop=("b</s>",))), 0, b"ab")
    sequence.token_ids += [300, 99]
    sequence.logprobs = [(-float(at), ()) for at in range(4)]
    found = completion_maker((), ByteText(**{"</s>": 300}))([sequence])
    assert (found.text, found.token_ids, len(found.logprobs or ())) == ("a", (97, 98, 300), 3)


def test_log_probabilities_are_trimmed_with_the_tokens() -> None:
    sequence = grown(asked(n=1, logprobs=1), 0, b"abcd")
    sequence.logprobs = [(-float(token), ((token, -0.5),)) for token in sequence.token_ids]
    assert completion_maker((), TEXT)([sequence]).logprobs == ((-97.0, ((97, -0.5),)), (-98.0, ((98, -0.5),)))


def test_log_probabilities_that_an_engine_leaves_out_are_its_fault() -> None:
    with pytest.raises(ValueError, match="the engine gave 0 log probabilities for 2 tokens"):
        completion_maker((), TEXT)([grown(asked(n=1, logprobs=0), 0)])


def test_log_probabilities_that_nobody_asked_for_are_not_kept() -> None:
    sequence = grown(asked(n=1), 0)
    sequence.logprobs = [(-0.5, ()), (-0.5, ())]
    assert completion_maker((), TEXT)([sequence]).logprobs is None
