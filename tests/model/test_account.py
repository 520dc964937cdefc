"""Every tensor of a checkpoint is accounted for, before anything else is read and again when it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from hpc.exit import Refusal
from hpc.model.gguf import convert_gguf
from hpc.model.load import examine, load, quiet
from tests.engine.oracle import CPU

_LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

SOUND: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama's base, tied": lambda: hf.LlamaModel(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=4)),
    "qwen3 moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_LLAMA, num_experts=4, moe_intermediate_size=16, head_dim=8)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt2's base": lambda: hf.GPT2Model(hf.GPT2Config(**_GPT2)),
    "gpt2, not tied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, tie_word_embeddings=False)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA, head_dim=8)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32,
                     num_attention_heads=4)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BERT)),
    "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT2, rotary_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "flan-t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    "bart's base": lambda: hf.BartModel(hf.BartConfig(**_BART)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**_BART, decoder_start_token_id=0)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_BART)),
    "led": lambda: hf.LEDForConditionalGeneration(hf.LEDConfig(**_BART, attention_window=8)),
    "bert as a decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT, is_decoder=True)),
}  # fmt: skip


def save(model: Any, folder: Path, **how: Any) -> Path:
    """Save a model without a tokenizer."""
    quiet()
    model.save_pretrained(folder, **how)
    return folder


def accepted(folder: Path) -> Any:
    """Examine and load a model; both must agree that nothing is wrong with it."""
    examine(folder)
    return load(folder, CPU, "float32", threads=1)


@pytest.mark.parametrize("kind", SOUND)
def test_a_model_as_transformers_saves_it_is_accounted_for(kind: str, tmp_path: Path) -> None:
    accepted(save(SOUND[kind](), tmp_path))


def test_a_model_in_many_parts_is_accounted_for(tmp_path: Path) -> None:
    save(SOUND["mixtral"](), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    accepted(tmp_path)


def test_a_model_in_pickles_is_accounted_for(tmp_path: Path) -> None:
    model = SOUND["llama"]()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    accepted(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt-j", "transformer.h.1.attn.masked_bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_constants_that_older_checkpoints_have_are_accounted_for(kind: str, name: str, tmp_path: Path) -> None:
    save(SOUND[kind](), tmp_path)
    change(tmp_path, lambda held: {**held, name: torch.ones(1, 1, 8, 8)})
    accepted(tmp_path)


def test_names_with_the_prefix_twice_are_those_of_the_model(tmp_path: Path) -> None:
    model = SOUND["llama"]()
    renamed("model.", "model.model.")(save(model, tmp_path))
    loaded = accepted(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


# What is refused.


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Edit the tensors of a model in one file."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda held: {name: t for name, t in held.items() if part not in name})


def renamed(before: str, after: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda held: {name.replace(before, after, 1): t for name, t in held.items()})


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda held: {prefix + name: t for name, t in held.items()})


def added(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda held: {**held, name: torch.ones(3)})


def with_rows(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda held: {**held, name: held[name][:count].clone()})


def configured(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return write


HEAD_GONE = r"\(lm_head.weight\)\. Way out: name a model with a head"
FEWER = r".weight: \[60, 32\] in place of \[64, 32\]"
DAMAGED = {
    "a layer is gone": ("llama", without("layers.1."), r"9 of its 21 tensors are .*\(model\.layers\.1\..*, …\)"),
    "a tensor is gone": ("llama", without("0.mlp.up_proj"), r"1 of its 21 .*\(model.layers.0.mlp.up_proj.weight\)"),
    "the head is gone": ("llama", without("lm_head"), HEAD_GONE),
    "the head of a GPT-2": ("gpt2, not tied", without("lm_head"), HEAD_GONE),
    "an expert is gone": ("mixtral", without("experts.2."), "have another shape"),
    "the experts of a layer": ("mixtral", without("layers.0.block_sparse_moe.experts"), "are not in the checkpoint"),
    "a layer too many": ("llama", added("model.layers.2.mlp.up_proj.weight"), "1 tensors of the checkpoint are none"),
    "a config of fewer layers": ("llama", configured(num_hidden_layers=1), "9 tensors of the checkpoint are none of"),
    "a config of more layers": ("gpt2", configured(n_layer=3), "12 of its 41 tensors are not in the checkpoint"),
    "a wrapper": ("llama", prefixed("module."), 'the names of the checkpoint begin with "module.": save'),
    "a wrapper of a GPT-2": ("gpt2", prefixed("_orig_mod."), 'begin with "_orig_mod."'),
    "fewer tokens": ("llama", with_rows("model.embed_tokens.weight", 60), "embed_tokens" + FEWER),
    "fewer tokens in the head": ("llama", with_rows("lm_head.weight", 60), "lm_head" + FEWER),
    "a config of more tokens": ("llama, tied", configured(vocab_size=70), r"\[64, 32\] in place of \[70, 32\]"),
}


@pytest.fixture(params=DAMAGED)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A model whose weights are not its own, and what is to be said of it."""
    kind, damage, said = DAMAGED[request.param]
    save(SOUND[kind](), tmp_path)
    damage(tmp_path)
    return tmp_path, said


def test_weights_that_are_not_the_models_are_refused_before_they_are_read(damaged: tuple[Path, str]) -> None:
    with pytest.raises(Refusal, match=damaged[1]):
        examine(damaged[0])


def test_weights_that_are_not_the_models_are_refused_when_they_are_read(damaged: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match=damaged[1]):
        load(damaged[0], CPU, "float32", threads=1)


def test_a_pickle_without_a_layer_is_refused_before_it_is_read(tmp_path: Path) -> None:
    held = {name: tensor for name, tensor in SOUND["llama"]().state_dict().items() if "layers.1." not in name}
    hf.LlamaConfig(**_LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="9 of its 21 tensors are not in the checkpoint"):
        examine(tmp_path)


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, without="blk.0.ffn_up.weight")
    with pytest.raises(Refusal, match=r"1 of its 12 tensors .*\(model.layers.0.mlp.up_proj.weight\)"):
        convert_gguf(path, tmp_path / "converted")


def write_gguf(path: Path, without: str) -> None:
    """Write a llama of one layer, but for a tensor, and no tokenizer."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(16)
    square = {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    layer = {**square, "attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (48, 32), "ffn_up": (48, 32)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in {**layer, "ffn_down": (32, 48)}.items()}
    shapes |= {"token_embd.weight": (16, 32), "output.weight": (16, 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)), "BertForMaskedLM has another head"),
    "bert's base": (lambda: hf.BertModel(hf.BertConfig(**_BERT)), '"is_decoder" is false'),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**_BERT, cls_token_id=1, sep_token_id=2)),
        "ModernBertForMaskedLM is no causal language model",
    ),
    "a classifier": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_LLAMA)),
        "LlamaForSequenceClassification has another head than one that chooses tokens",
    ),
    "a tied classifier": (
        lambda: hf.Qwen2ForTokenClassification(hf.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
        "Qwen2ForTokenClassification has another head than one that chooses tokens",
    ),
    "llama's base": (lambda: hf.LlamaModel(hf.LlamaConfig(**_LLAMA)), "name a model with a head that chooses tokens"),
    "t5's encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**_T5)), "T5EncoderModel is no causal language model"),
    "a classifier with a decoder": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**_BART)),
        "BartForSequenceClassification has another head",
    ),
    "a transcriber": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**{**_BART, "bos_token_id": 1, "decoder_start_token_id": 1}, max_source_positions=8)
        ),
        "WhisperForConditionalGeneration has an encoder and a decoder, and does not make text of text",
    ),
    "random attention": (
        lambda: hf.BigBirdPegasusForConditionalGeneration(hf.BigBirdPegasusConfig(**_BART, block_size=4)),
        "BigBirdPegasusForConditionalGeneration attends to all of a source or to random blocks",
    ),
    "embeddings": (
        lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**_LLAMA, head_dim=8, use_bidirectional_attention=True)),
        '"use_bidirectional_attention" is true',
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_causal_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    make, said = OTHERS[kind]
    save(make(), tmp_path)
    with pytest.raises(Refusal, match=said):
        examine(tmp_path)


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "not-yet"}')
    with pytest.raises(Refusal, match=r"cannot be read by transformers .*not-yet"):
        examine(tmp_path)


# Code of its own.

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class C(LlamaConfig):
    model_type = "own"

class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that comes with code of its own."""
    folder = save(SOUND["llama"](), tmp_path_factory.mktemp("models") / "own_code")
    (folder / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    configured(model_type="own", architectures=["M"], auto_map=names)(folder)
    return folder


def test_code_of_a_model_is_not_run_unless_the_user_says_so(own: Path) -> None:
    with pytest.raises(Refusal, match=r"comes with code of its own.* add --trust-remote-code"):
        examine(own)


def test_code_of_a_model_is_run_when_the_user_says_so(own: Path) -> None:
    examine(own, trust_remote_code=True)
    assert type(load(own, CPU, "float32", 1, trust_remote_code=True)).__name__ == "M"


def test_weights_of_a_model_with_code_of_its_own_are_accounted_for(own: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "own_code_damaged"))
    without("layers.1.")(folder)
    with pytest.raises(Refusal, match="9 of its 21 tensors are not in the checkpoint"):
        examine(folder, trust_remote_code=True)
