import pytest
import torch

from quamba.ops import embedding
from tests.cuda.compare import FLOATS, check, randint8, scales


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (5, 129)])
def test_embedding(dtype, ids, channel, columns, shape) -> None:
    weight = randint8(1000, 77)
    index = torch.randint(0, 1000, shape, device="cuda", dtype=ids)
    column_scale = scales(77) if columns else None
    check(embedding, index, weight, scales(1000) if channel else scales(), column_scale, dtype, error=0.0)
