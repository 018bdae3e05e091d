"""The attention of one token a request, against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from posttrain.engine.one_token import attend_one_token

HEADS = [(4, 2, 32, 32), (3, 3, 16, 16), (6, 2, 24, 8), (8, 1, 5, 7)]
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def inputs(heads: int, shared: int, key: int, value: int, batch: int = 5, columns: int = 37) -> list[Tensor]:
    """Keys and values are views of a longer cache, the query is one of another order of axes, as models make them."""
    g = torch.Generator().manual_seed(heads + 7 * shared + key)
    query = torch.randn(batch, 1, heads, key, generator=g).transpose(1, 2)
    keys, values = (torch.randn(batch, shared, columns + 4, n, generator=g)[:, :, :columns] for n in (key, value))
    mask = torch.where(torch.rand(batch, 1, 1, columns, generator=g) < 0.6, LOWEST, 0.0)
    mask[..., 0] = 0.0
    return [query, keys, values, mask]


def plain(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = query.double() @ wide_k.transpose(2, 3) * scale + mask.double()
    return (scores.softmax(-1) @ wide_v).transpose(1, 2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("heads", "shared", "key", "value"), HEADS)
def test_it_is_softmax_attention(heads: int, shared: int, key: int, value: int) -> None:
    query, keys, values, mask = inputs(heads, shared, key, value)
    found = attend_one_token(query, keys, values, mask, 0.3)
    assert found.shape == (5, 1, heads, value)
    torch.testing.assert_close(found.double(), plain(query, keys, values, mask, 0.3), rtol=1e-5, atol=1e-6)
    one_for_all = attend_one_token(query, keys, values, mask[:1], 0.3)
    torch.testing.assert_close(one_for_all.double(), plain(query, keys, values, mask[:1], 0.3), rtol=1e-5, atol=1e-6)


def test_a_mask_may_add_and_may_say_minus_infinity() -> None:
    query, keys, values, mask = inputs(4, 2, 32, 32)
    mask = torch.where(mask == LOWEST, -torch.inf, torch.linspace(-3, 3, mask.shape[-1]))
    found = attend_one_token(query, keys, values, mask, 0.3)
    torch.testing.assert_close(found.double(), plain(query, keys, values, mask, 0.3), rtol=1e-5, atol=1e-6)


def test_what_is_hidden_is_not_read() -> None:
    """Whatever lies there: a row's free columns hold what an earlier request left."""
    query, keys, values, mask = inputs(4, 2, 32, 32)
    clean = attend_one_token(query, keys, values, mask, 0.3)
    hidden = (mask[:, :, 0] == LOWEST)[..., None]
    spoilt = attend_one_token(query, keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, 1e30), mask, 0.3)
    assert torch.equal(clean, spoilt)


def test_a_row_that_may_see_nothing_is_zero_and_others_are_as_they_were() -> None:
    query, keys, values, mask = inputs(4, 2, 32, 32)
    before = attend_one_token(query, keys, values, mask, 0.3)
    mask[2] = LOWEST
    after = attend_one_token(query, keys, values, mask, 0.3)
    assert not after[2].any() and torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_large_scores_do_not_overflow() -> None:
    query, keys, values, mask = inputs(4, 2, 32, 32)
    found = attend_one_token(query * 100, keys, values, mask, 1.0)
    torch.testing.assert_close(found.double(), plain(query * 100, keys, values, mask, 1.0), rtol=1e-4, atol=1e-4)


def test_what_torch_is_told_of_it_is_so() -> None:
    """Shapes, strides and aliases, which a compiled forward relies on."""
    torch.library.opcheck(attend_one_token, (*inputs(4, 2, 32, 16), 0.3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("turn", ["float64", "columns"])
def test_what_it_cannot_read_is_refused(turn: str) -> None:
    query, keys, values, mask = inputs(4, 2, 32, 32)
    keys = keys.double() if turn == "float64" else keys.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(AssertionError, match="float32"):
        attend_one_token(query, keys, values, mask, 0.3)


def test_its_flags_are_its_own() -> None:
    """What is linked with -ffast-math would have all of the thread's arithmetic flush small numbers to zero."""
    attend_one_token(*inputs(2, 2, 3, 3), 0.3)  # of sizes that no other test has: built or loaded now
    assert torch.tensor(1e-40).mul(1.0).item() > 0 and 5e-324 * 1.0 > 0
