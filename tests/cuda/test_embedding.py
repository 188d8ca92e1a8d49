import pytest
import torch

from quamba.ops import embedding
from tests.cuda.compare import FLOATS, check, randint8, scales


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (5, 129)])
@pytest.mark.parametrize("width", [1, 77, 88, 2560, 4104])
def test_embedding(dtype, ids, channel, columns, shape, width) -> None:
    weight = randint8(1000, width)
    index = torch.randint(0, 1000, shape, device="cuda", dtype=ids)
    column_scale = scales(width) if columns else None
    check(embedding, index, weight, scales(1000) if channel else scales(), column_scale, dtype, error=0.0)


@pytest.mark.parametrize("gap", [1, 8])
@pytest.mark.parametrize("first", [0, 3])
def test_rows_apart(gap, first) -> None:
    weight = randint8(100, 64 + gap + first)[:, first : 64 + first]
    column_scale = scales(64 + first)[first:]
    check(embedding, torch.arange(100, device="cuda"), weight, scales(100), column_scale, torch.float16, error=0.0)
