"""Layers of a model are replaced where the kernel's give the same numbers, and left where they would not."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hpc.engine.cache import Cache
from hpc.engine.extents import ALIGN
from hpc.engine.form import KVShape
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import AttentionMetadata, Span
from hpc.engine.layers.experts import Expert, Experts
from hpc.engine.layers.fuse import fuse
from hpc.engine.layers.fused import Attention, DecoderLayer, GatedMLP, PackedLinear, RMSNorm
from hpc.engine.native.build import prepare
from tests.engine.models import CONFIGS, VOCABULARY, kernel_of, tiered, tiny

IDS = torch.arange(40)[None] * 7 % VOCABULARY


@pytest.fixture
def cpu() -> Kernel:
    """This machine's kernel."""
    found = kernel_of("kernel")
    assert found is not None
    return found


def fused(cpu: Kernel, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(CONFIGS[kind], dtype)
    fuse(model, cpu, cpu)
    return model


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def named(model: nn.Module, name: str) -> set[str]:
    """Return the classes of the layers whose name ends so."""
    return {type(module).__name__ for path, module in model.named_modules() if path.split(".")[-1] == name}


def new_step(cpu: Kernel, tokens: int) -> AttentionMetadata:
    """Return a step in which a sequence begins, for the last layer of the tiny llama."""
    layout = KVShape((2, 16), (2, 16))
    return AttentionMetadata(
        Cache({1: layout}, ALIGN, torch.float32, torch.device("cpu"), cpu.panel), [Span(0, tokens, 0, 0, 0, 0)], cpu
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("kind", tiered(CONFIGS))
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_a_fused_model_gives_the_same_logits(cpu: Kernel, kind: str, dtype: torch.dtype, close: float) -> None:
    if dtype == torch.bfloat16 and kind in ("mixtral", "olmoe", "gpt_oss"):
        pytest.skip("in bfloat16 rounding chooses between experts")
    exact, got = logits(tiny(CONFIGS[kind], dtype)).float(), logits(fused(cpu, kind, dtype)).float()
    assert (got - exact).abs().max() <= close * exact.abs().max()


@pytest.mark.parametrize("kind", tiered(["llama", "qwen2", "qwen3", "phi3"]))
def test_the_gated_mlp_of_every_layer_is_replaced(cpu: Kernel, kind: str) -> None:
    assert count(fused(cpu, kind), GatedMLP) == 2


@pytest.mark.parametrize(("kind", "norms"), [("llama", 5), ("qwen3", 9), ("phi3", 5), ("gemma2", 9), ("gemma3", 13)])
def test_every_rms_norm_is_replaced(cpu: Kernel, kind: str, norms: int) -> None:
    assert count(fused(cpu, kind), RMSNorm) == norms


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("with_kernel", [True, False])
def test_the_experts_of_every_layer_are_replaced(cpu: Kernel, kind: str, with_kernel: bool) -> None:
    model = tiny(CONFIGS[kind])
    fuse(model, *((cpu, cpu) if with_kernel else (None, None)))
    assert count(model, Experts) == 2


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_an_expert_with_the_usual_activation_is_a_gated_mlp_of_the_kernel(cpu: Kernel, kind: str) -> None:
    assert count(fused(cpu, kind), GatedMLP) == 2 * 4


def test_an_expert_with_an_activation_of_its_own_keeps_it(cpu: Kernel) -> None:
    model = fused(cpu, "gpt_oss")
    assert (count(model, GatedMLP), count(model, Expert)) == (0, 2 * 4)


def test_experts_in_float16_which_the_kernel_does_not_know_are_replaced_by_torchs() -> None:
    model = tiny(CONFIGS["mixtral"], torch.float16)
    fuse(model, None, None)
    assert count(model, Experts) == 2


def test_the_weights_of_experts_are_in_memory_once(cpu: Kernel) -> None:
    model = tiny(CONFIGS["mixtral"])
    own = model.model.layers[0].mlp.experts.gate_up_proj
    fuse(model, cpu, cpu)
    assert own.numel() == 0


def with_other_experts() -> Any:
    """A model whose first layer has experts that do something more."""
    model = tiny(CONFIGS["mixtral"])
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *inputs: forward(*inputs) * 1.01
    return model


def test_experts_that_do_something_more_are_left(cpu: Kernel) -> None:
    model = with_other_experts()
    fuse(model, cpu, cpu)
    assert count(model, Experts) == 1


def test_of_experts_that_are_left_the_log_tells(cpu: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    fuse(with_other_experts(), cpu, cpu)
    assert "experts of this model are computed by its own code" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "mixtral", "olmoe", "gpt_oss"])
def test_of_experts_that_are_replaced_the_log_tells_nothing(
    cpu: Kernel, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    fuse(tiny(CONFIGS[kind]), cpu, cpu)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_with_another_activation_is_left(cpu: Kernel, kind: str, dtype: torch.dtype) -> None:
    assert count(fused(cpu, kind, dtype), GatedMLP) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_of_small_weights_with_another_activation_is_left(cpu: Kernel, dtype: torch.dtype) -> None:
    model = tiny(CONFIGS["gemma2"], dtype, scale=0.1)
    fuse(model, cpu, cpu)
    assert count(model, GatedMLP) == 0


def attention_fused(cpu: Kernel, model: Any) -> Any:
    fuse(model, cpu, cpu, prepare(model))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", tiered(["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mixtral", "olmoe"]))
def test_the_attention_of_every_layer_is_replaced(cpu: Kernel, kind: str, dtype: torch.dtype) -> None:
    assert count(attention_fused(cpu, tiny(CONFIGS[kind], dtype)), Attention) == 2


@pytest.mark.parametrize("kind", tiered(["gpt_oss", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "stablelm"]))
def test_an_attention_that_is_made_otherwise_is_left(cpu: Kernel, kind: str) -> None:
    assert count(attention_fused(cpu, tiny(CONFIGS[kind])), Attention) == 0


@pytest.mark.parametrize(
    "more",
    [lambda x: x.clamp(-1e3, 1e3), lambda x: x * 1.01, lambda x: x / torch.ones(1).log1p().ceil()],
    ids=["clamped", "scaled", "divided"],
)
def test_an_attention_that_does_something_more_is_left(cpu: Kernel, more: Any) -> None:
    model = tiny(CONFIGS["llama"])
    own = model.model.layers[0].self_attn
    forward = own.forward
    own.forward = lambda hidden_states, **others: forward(more(hidden_states), **others)
    assert count(attention_fused(cpu, model), Attention) == 1


@pytest.mark.parametrize("kind", tiered(["llama", "qwen2", "qwen3", "phi3"]))
def test_every_decoder_layer_is_one_call(cpu: Kernel, kind: str) -> None:
    assert count(attention_fused(cpu, tiny(CONFIGS[kind])), DecoderLayer) == 2


@pytest.mark.parametrize("kind", tiered(["gemma2", "gemma3", "mixtral", "olmoe", "gpt_oss", "gpt2", "gpt_neox", "opt"]))
def test_decoder_layers_that_are_made_otherwise_are_left(cpu: Kernel, kind: str) -> None:
    assert count(attention_fused(cpu, tiny(CONFIGS[kind])), DecoderLayer) == 0


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("more", [lambda x: x.clamp(-1e3, 1e3), lambda x: x * 1.01], ids=["clamped", "scaled"])
def test_a_decoder_layer_that_does_something_more_is_left(cpu: Kernel, more: Any, index: int) -> None:
    model = tiny(CONFIGS["llama"])
    own = model.model.layers[index]
    forward = own.forward
    own.forward = lambda hidden_states, **others: more(forward(hidden_states, **others))
    attention_fused(cpu, model)
    assert [type(layer) is DecoderLayer for layer in model.model.layers] == [index != 0, index != 1]


@pytest.mark.parametrize("kept", [[], [5], [9, 0, 9, 3]], ids=str)
def test_the_last_decoder_layer_computes_the_tokens_alone_whose_logits_are_wanted(cpu: Kernel, kept: list[int]) -> None:
    layer = attention_fused(cpu, tiny(CONFIGS["llama"])).model.layers[-1]
    x, step = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0)), new_step(cpu, 10)
    turns = torch.ones(1, 10, 16), torch.zeros(1, 10, 16)
    whole = layer(x, turns, step)
    step.kept = torch.tensor(kept, dtype=torch.int64)
    expected = x.clone()
    expected[:, kept] = whole[:, kept]
    assert layer(x, turns, step).equal(expected)


def test_more_tokens_than_there_are_cannot_be_kept(cpu: Kernel) -> None:
    layer, step = attention_fused(cpu, tiny(CONFIGS["llama"])).model.layers[-1], new_step(cpu, 2)
    step.kept = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="3 rows of 2 cannot be kept"):
        layer(torch.zeros(1, 2, 64), (torch.ones(1, 2, 16), torch.zeros(1, 2, 16)), step)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_layer_norms_are_left(cpu: Kernel, kind: str) -> None:
    model = fused(cpu, kind)
    assert (count(model, RMSNorm), count(model, nn.LayerNorm)) == (0, count(tiny(CONFIGS[kind]), nn.LayerNorm))


def test_a_layer_norm_without_a_bias_is_left(cpu: Kernel) -> None:
    model = nn.Sequential(nn.LayerNorm(64, bias=False))
    fuse(model, cpu, cpu)
    assert type(model[0]) is nn.LayerNorm


def test_torchs_own_rms_norm_is_replaced(cpu: Kernel) -> None:
    model = nn.Sequential(nn.RMSNorm(64, eps=1e-6))
    fuse(model, cpu, cpu)
    assert type(model[0]) is RMSNorm


@pytest.mark.parametrize("kind", tiered(CONFIGS))
def test_no_linear_layer_is_left_unpacked(cpu: Kernel, kind: str) -> None:
    model = fused(cpu, kind)
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)] == []


def test_every_linear_layer_of_gpt2_is_packed(cpu: Kernel) -> None:
    assert count(fused(cpu, "gpt2"), PackedLinear) == 2 * 4 + 1


def test_a_subclass_of_linear_is_left(cpu: Kernel) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8))
    fuse(model, cpu, cpu)
    assert type(model[0]) is Doubled


def test_a_subclass_of_linear_that_does_nothing_else_is_packed(cpu: Kernel) -> None:
    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    model = nn.Sequential(Same(8, 8))
    fuse(model, cpu, cpu)
    assert type(model[0]) is PackedLinear


@pytest.mark.parametrize(
    ("gated", "taken"),
    [
        (lambda gate, up: nn.functional.silu(gate) * up, True),
        (lambda gate, up: 1.01 * nn.functional.silu(gate) * up, False),
        (lambda gate, up: nn.functional.silu(gate.clamp(max=100)) * up, False),
        (lambda gate, up: nn.functional.gelu(gate) * up, False),
    ],
    ids=["plain", "scaled", "bounded", "another"],
)
def test_a_gated_mlp_that_does_something_more_is_left(cpu: Kernel, gated: Any, taken: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    model = nn.Sequential(Own())
    fuse(model, cpu, cpu)
    assert (type(model[0]) is GatedMLP) == taken


def test_an_expert_whose_gate_is_bounded_keeps_it(cpu: Kernel) -> None:
    model = tiny(CONFIGS["olmoe"])
    for layer in model.model.layers:
        own = layer.mlp.experts._apply_gate
        layer.mlp.experts._apply_gate = lambda x, own=own: own(x.clamp(max=100))
    fuse(model, cpu, cpu)
    assert (count(model, GatedMLP), count(model, Expert)) == (0, 2 * 4)


def test_a_gated_mlp_with_biases_is_replaced(cpu: Kernel) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(Biased())
    fuse(model, cpu, cpu)
    assert type(model[0]) is GatedMLP


def test_the_memory_of_packed_weights_is_released(cpu: Kernel) -> None:
    model = tiny(CONFIGS["llama"])
    embeddings = model.get_input_embeddings().weight
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2 and p is not embeddings]
    fuse(model, cpu, cpu)
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_an_embedding_that_is_tied_to_the_head_stays_what_it_was(cpu: Kernel) -> None:
    model = tiny(CONFIGS["gemma2"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = model.get_input_embeddings().weight.clone()
    fuse(model, cpu, cpu)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert type(model.lm_head) is PackedLinear


def test_without_a_kernel_and_linears_a_model_stays_as_it_is() -> None:
    model = tiny(CONFIGS["llama"])
    before = [(name, type(module)) for name, module in model.named_modules()]
    fuse(model, None, None)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_packing_adds_no_weight_twice(cpu: Kernel) -> None:
    def size(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    model = tiny(CONFIGS["llama"])
    before = size(model)
    fuse(model, cpu, cpu)
    assert size(model) <= 1.1 * before  # up to whole panels
