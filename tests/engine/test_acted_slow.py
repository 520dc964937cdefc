"""Every workload on an acted GPU, for twelve kinds of model, as the current device and as GPU 3 of a node."""

import pytest

from tests.engine.acted_workloads import WORKLOADS, check
from tests.engine.models import CONFIGS, WINDOWED

TWELVE = (
    "llama", "qwen3", "phi3", "gemma2", "gemma3", "mistral", "mixtral", "olmoe", "gpt_oss", "gpt2", "gpt_neox", "opt",
)  # fmt: skip
OTHERS = [kind for kind in (*CONFIGS, *WINDOWED) if kind not in TWELVE]
PART = 4
"""Of the workloads each other kind tries one in so many, in turn; `python -m tests.engine.acted` tries all."""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("place", [(0, None), (3, 0)], ids=["as the current device", "as GPU 3 of 4"])
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in TWELVE])
def test_a_kind_of_model_gives_on_an_acted_gpu_what_it_gives_on_the_cpu(
    kind: str, name: str, place: tuple[int, int | None]
) -> None:
    assert check(kind, WORKLOADS[name], *place) == ""


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for turn, kind in enumerate(OTHERS) for at, name in enumerate(WORKLOADS) if (turn + at) % PART == 0],
)
def test_other_kinds_of_model_do_so_in_some_workloads(kind: str, name: str) -> None:
    assert check(kind, WORKLOADS[name], 3, 0) == ""
