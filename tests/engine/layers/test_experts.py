"""torch's products, in which no row depends on how many others there are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hpc.engine.layers.experts import ROW_MULTIPLE, RowBlocks, choose_by_blocks
from hpc.engine.layers.fuse import fuse
from tests.engine.models import CONFIGS, tiny


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("inner", "columns"), [(192, 64), (1024, 512), (1536, 576), (4096, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(dtype: torch.dtype, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, inner, generator=generator).to(dtype) for n in (columns, 130))
    together = RowBlocks().linear(x, weight, None, columns)
    for rows in (1, 7, 16, 17, 64, 80, 130):
        chosen = torch.randperm(130, generator=generator)[:rows]
        assert torch.equal(RowBlocks().linear(x[chosen], weight, None, columns), together[chosen])


class Router(nn.Module):
    """Chooses two of eight experts, and remembers how many rows it saw at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 2048, generator=torch.Generator().manual_seed(1)))
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.rows.append(len(x))
        logits = nn.functional.linear(x, self.weight)
        return logits, *logits.topk(2)


def test_a_choice_between_experts_does_not_depend_on_the_other_rows(threads: int) -> None:
    router, x = Router(), torch.randn(400, 2048, generator=torch.Generator().manual_seed(2))
    choose_by_blocks(router)
    with torch.no_grad():
        together = router(x)
        assert all(torch.equal(few, all_of[:3]) for few, all_of in zip(router(x[:3]), together, strict=True))
    assert (max(router.rows) == ROW_MULTIPLE) == (threads > 1)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "gpt_oss"])
def test_what_chooses_between_experts_of_a_model_computes_by_blocks(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    fuse(model, None, None)
    routers = [module for name, module in model.named_modules() if name.split(".")[-1] in ("gate", "router")]
    assert ["forward" in vars(router) for router in routers] == [True, True]
