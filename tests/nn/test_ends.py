"""Embedding and head in int8, tied and untied."""

import pytest
import torch
from torch import Tensor

from quamba.nn.ends import QuantizedEmbedding, QuantizedHead
from quamba.recipe import QuantSpec

ROWS, WIDTH = 19, 10
CHANNEL, TENSOR, TOKEN = QuantSpec("channel"), QuantSpec("tensor"), QuantSpec("token")


def make_table() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator) * torch.linspace(0.1, 4.0, ROWS)[:, None]


def make_embedding(spec: QuantSpec = CHANNEL, dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    embedding = QuantizedEmbedding(rows=ROWS, width=WIDTH, spec=spec, dtype=dtype)
    embedding.fill(make_table())
    return embedding


def make_head(
    *, spec: QuantSpec = CHANNEL, input_spec: QuantSpec | None, bias: bool, tied: QuantizedEmbedding | None = None
) -> QuantizedHead:
    head = QuantizedHead(
        rows=ROWS, width=WIDTH, bias=bias, spec=spec, input_spec=input_spec, dtype=torch.float32, tied=tied
    )
    head.fill(
        None if tied is not None else make_table(),
        bias=torch.linspace(-1, 1, ROWS) if bias else None,
        input_scale=torch.tensor(0.03) if input_spec == TENSOR else None,
    )
    return head


@pytest.mark.parametrize("spec", [CHANNEL, TENSOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_within_half_a_step_of_the_row(spec: QuantSpec, dtype: torch.dtype) -> None:
    embedding, table = make_embedding(spec, dtype), make_table()
    ids = torch.tensor([[0, 5, 18], [5, 5, 1]])
    found = embedding(ids)
    assert found.shape == (2, 3, WIDTH)
    assert found.dtype == dtype
    step = table.abs().amax(dim=1) / 127 if spec == CHANNEL else (table.abs().amax() / 127).expand(ROWS)
    slack = 0.501 * step[ids][..., None] + (0.004 * table[ids].abs() if dtype == torch.bfloat16 else 0)
    assert bool(((found.float() - table[ids]).abs() <= slack).all())


@pytest.mark.parametrize("input_spec", [TENSOR, TOKEN, None])
@pytest.mark.parametrize("spec", [CHANNEL, TENSOR])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head(input_spec: QuantSpec | None, spec: QuantSpec, bias: bool, dtype: torch.dtype) -> None:
    head = make_head(spec=spec, input_spec=input_spec, bias=bias)
    hidden = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = hidden.double()
    if input_spec is not None:
        step = 0.03 if input_spec == TENSOR else hidden.float().abs().amax(-1, keepdim=True).double() / 127
        x = (x / step).round().clamp(-128, 127) * step
    scale = head.weight_scale.double()
    expected = x @ (head.qweight.double() * (scale[:, None] if scale.dim() else scale)).T
    expected = expected + head.bias.double() if head.bias is not None else expected
    found = head(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("input_spec", [TENSOR, TOKEN, None])
def test_a_tied_head_reads_the_embeddings_table(input_spec: QuantSpec | None) -> None:
    embedding = make_embedding()
    tied = make_head(input_spec=input_spec, bias=True, tied=embedding)
    untied = make_head(input_spec=input_spec, bias=True)
    hidden = torch.randn(2, WIDTH)
    assert torch.equal(tied(hidden), untied(hidden))
    assert tied.table is embedding
    assert untied.table is untied
    assert not {"qweight", "weight_scale"} & set(tied.state_dict())
    assert list(tied.children()) == []
    model = torch.nn.ModuleDict({"embedding": embedding, "head": tied})
    assert sum(name.endswith("qweight") for name in model.state_dict()) == 1
    embedding.fill(2 * make_table())
    torch.testing.assert_close(tied(hidden) - tied.bias, 2 * (untied(hidden) - untied.bias))


def test_weight_tells_shape_and_dtype_without_data() -> None:
    embedding = make_embedding(dtype=torch.bfloat16)
    tied = make_head(input_spec=TENSOR, bias=False, tied=embedding)
    for module in (embedding, tied):
        assert module.weight.is_meta
        assert module.weight.shape == (ROWS, WIDTH)
    assert embedding.weight.dtype == torch.bfloat16
    assert (embedding.num_embeddings, embedding.embedding_dim) == (ROWS, WIDTH)


def test_empty_ends_are_filled_by_name() -> None:
    full = make_head(input_spec=TENSOR, bias=True)
    empty = QuantizedHead(rows=ROWS, width=WIDTH, bias=True, spec=CHANNEL, input_spec=TENSOR, dtype=torch.float32)
    assert all(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(full.state_dict(), assign=True)
    hidden = torch.randn(5, WIDTH)
    assert torch.equal(empty(hidden), full(hidden))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("spec", [CHANNEL, TENSOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_per_channel_of_the_heads_input(tie: bool, spec: QuantSpec, dtype: torch.dtype) -> None:
    table, scales = make_table(), torch.logspace(-3, -1, WIDTH)
    embedding = QuantizedEmbedding(rows=ROWS, width=WIDTH, spec=spec, dtype=dtype, columns=tie)
    embedding.fill(table, columns=scales if tie else None)
    head = QuantizedHead(
        rows=ROWS, width=WIDTH, bias=False, spec=spec, input_spec=TENSOR, dtype=dtype, smooth=True,
        tied=embedding if tie else None,
    )  # fmt: skip
    head.fill(None if tie else table, bias=None, input_scale=scales)
    hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = (hidden.double() / scales).round().clamp(-128, 127)
    folded = table.double() * scales
    step = folded.abs().amax(dim=1, keepdim=True) / 127 if spec == CHANNEL else folded.abs().amax() / 127
    expected = x @ ((folded / step).round() * step).T
    torch.testing.assert_close(head(hidden).double(), expected, rtol=1e-5, atol=1e-4)
    rows = embedding(torch.arange(ROWS)).float()
    assert (embedding.column_scale is not None) == tie
    slack = 0.501 * (
        step / scales if tie else table.abs().amax(dim=1 if spec == CHANNEL else (0, 1), keepdim=True) / 127
    )
    assert bool(((rows - table).abs() <= slack + (0.004 * table.abs() if dtype == torch.bfloat16 else 0)).all())


def test_an_empty_head_with_scales_per_channel_is_finalized() -> None:
    def head() -> QuantizedHead:
        return QuantizedHead(
            rows=ROWS, width=WIDTH, bias=False, spec=CHANNEL, input_spec=TENSOR, dtype=torch.float32, smooth=True
        )

    full, empty = head(), head()
    full.fill(make_table(), bias=None, input_scale=torch.logspace(-3, -1, WIDTH))
    empty.load_state_dict(full.state_dict(), assign=True)
    empty.finalize()
    assert torch.equal(empty(torch.ones(2, WIDTH)), full(torch.ones(2, WIDTH)))


@pytest.mark.parametrize("smooth", [False, True])
def test_norm_and_head_with_one_rounding_between(smooth: bool) -> None:
    head = QuantizedHead(
        rows=ROWS, width=WIDTH, bias=True, spec=CHANNEL, input_spec=TENSOR, dtype=torch.float32, smooth=smooth
    )
    scale = torch.linspace(0.02, 0.05, WIDTH) if smooth else torch.tensor(0.03)
    head.fill(make_table(), bias=torch.linspace(-1, 1, ROWS), input_scale=scale)
    generator = torch.Generator().manual_seed(3)
    stream, weight, eps = 3 * torch.randn(2, 3, WIDTH, generator=generator), torch.linspace(0.5, 1.5, WIDTH), 0.3
    x = stream.double()
    normed = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    torch.testing.assert_close(head.normed(stream, weight, eps), head(normed.float()), rtol=1e-6, atol=1e-6)
    assert head.static
    assert not make_head(input_spec=TOKEN, bias=False).static
    assert not make_head(input_spec=None, bias=False).static
