"""Languages of the tokenizers of NLLB, Marian and M2M100."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc.model.languages import Languages, languages_of
from hpc.model.tokenizer import Tokenizer
from tests.conftest import finish, start

DEU, FRA, EOS = 34, 36, 2


@pytest.fixture(scope="module")
def nllb(tiny_translator: Path) -> Languages:
    languages = Tokenizer(tiny_translator).languages
    assert languages is not None
    return languages


@pytest.fixture(scope="module")
def marian() -> Languages:
    tokenizer = SimpleNamespace(supported_language_codes=[">>fra<<", ">>por<<"])
    languages = languages_of(tokenizer, lambda texts: [[len(text)] for text in texts])
    assert languages is not None
    return languages


def test_a_source_is_marked_with_its_language(nllb: Languages) -> None:
    [german], [french] = nllb.encode(["ab"], "deu_Latn"), nllb.encode(["ab"], "fra_Latn")
    assert (german[0], french[0]) == (DEU, FRA)
    assert german[1:] == french[1:]
    assert german[-1] == EOS


def test_a_source_without_a_language_is_in_the_tokenizers_own_whatever_was_before(nllb: Languages) -> None:
    before = nllb.encode(["ab"], "")
    nllb.encode(["ab"], "fra_Latn")
    assert nllb.encode(["ab"], "") == before == nllb.encode(["ab"], "eng_Latn")


def test_the_target_is_the_token_of_its_language(nllb: Languages) -> None:
    assert nllb.target_token("deu_Latn") == DEU
    assert nllb.mark("ab", "deu_Latn") == "ab"


@pytest.mark.parametrize("code", ["deu", "German", "<s>", 3, ["deu_Latn"]])
def test_what_is_no_language_is_named_with_some_that_are(nllb: Languages, code: object) -> None:
    problem = nllb.problem("target_lang", code)
    assert problem is not None
    assert f'"target_lang" is {code!r}; it must be one of the model\'s 3 languages' in problem
    assert "_Latn" in problem


def test_a_language_near_the_one_that_is_asked_for_is_named_first(nllb: Languages) -> None:
    assert "such as fra_Latn" in str(nllb.problem("source_lang", "fra_latn"))


@pytest.mark.parametrize("code", ["fra", ">>fra<<"])
def test_a_marian_model_reads_the_target_before_the_source(marian: Languages, code: str) -> None:
    assert marian.problem("target_lang", code) is None
    assert (marian.mark("ab", code), marian.target_token(code)) == (">>fra<< ab", None)


def test_a_marian_model_need_not_be_told_the_language_of_the_source(marian: Languages) -> None:
    assert marian.problem("source_lang", "eng") is None
    assert marian.encode(["ab"], "eng") == [[2]]


def test_a_language_that_a_marian_model_does_not_write_is_refused(marian: Languages) -> None:
    assert "one of the model's 2 languages, such as fra, por" in str(marian.problem("target_lang", "xx"))


def test_a_table_of_languages_goes_before_the_names_of_tokens() -> None:
    class M2M100:
        src_lang = "en"
        lang_code_to_id = {"en": 7, "de": 8}  # noqa: RUF012

    languages = languages_of(M2M100(), lambda texts: [])
    assert languages is not None
    assert languages.target_token("de") == 8


def test_a_tokenizer_without_languages_has_none(tiny_model: Path) -> None:
    assert Tokenizer(tiny_model).languages is None


# Marian's tokenizer as it is.

WORDS = ["the", "house", "that", "stands", "there", "a", "green", "tree", "old", "river"]


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian model of two target languages, without weights."""
    import sentencepiece
    from transformers import MarianConfig

    folder = tmp_path_factory.mktemp("opus")
    texts = [" ".join(WORDS[at:] + WORDS[:at]) for at in range(len(WORDS))] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "source"), vocab_size=25, minloglevel=2
    )
    (folder / "source.model").rename(folder / "source.spm")
    shutil.copy(folder / "source.spm", folder / "target.spm")
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "source.spm"))
    names = ["</s>", "<unk>", *(pieces.id_to_piece(index) for index in range(3, 25)), ">>fra<<", ">>por<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    MarianConfig(vocab_size=len(names), pad_token_id=len(names) - 1, eos_token_id=0).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marians_tokenizer_marks_the_target_and_reads_text_back(opus: Path) -> None:
    tokenizer = Tokenizer(opus)
    languages = tokenizer.languages
    assert languages is not None
    [ids] = languages.encode([languages.mark("the green house", "por")], "")
    assert (tokenizer.token(ids[0]), tokenizer.token(ids[-1])) == (">>por<<", "</s>")
    assert tokenizer.decode(ids[1:]) == "the green house"


def test_a_tokenizer_whose_library_is_missing_is_refused_with_what_to_install(opus: Path) -> None:
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from pathlib import Path\nfrom hpc.model.load import refusing\nfrom hpc.model.tokenizer import Tokenizer\n"
        "with refusing(Path('m')): Tokenizer(Path(sys.argv[1]))"
    )
    ended = finish(start(["-c", code, str(opus)]))
    assert "Refusal" in ended.err
    assert "pip install 'scattergen[translation]'" in ended.err
