"""LoZA (arXiv 2512.23966): attentions that see the first and the last blocks only, and how they are found."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD
from transformers import DynamicCache

from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.model.calibration import least, mixed
from posttrain.model.streaming import streaming_columns
from posttrain.model.visibility import Visibility, from_documents, from_padding
from tests.model.longcat2_tiny import SHAPE, SlotCache, slot_forward, tiny, tokens

TOLERANCE = 2e-5
BLOCK, SINKS, LOCAL = 4, 1, 2
SIZES: dict[str, Any] = {
    "streaming_block_size": BLOCK,
    "streaming_sink_blocks": SINKS,
    "streaming_local_blocks": LOCAL,
}
EVERY = list(range(2 * SHAPE["num_layers"]))
PATTERN = Longcat2Config(**SHAPE, **SIZES)
MODEL = tiny(seed=5, **SIZES, streaming_attentions=[0, 3])


def sees(query: int, key: int) -> bool:
    """The definition, on positions in a sequence."""
    near = query // BLOCK - key // BLOCK < LOCAL
    return key <= query and (key < SINKS * BLOCK or near)


def _columns(visibility: Visibility) -> list[list[list[int]]]:
    out = streaming_columns(visibility, PATTERN)
    assert out.dtype == torch.int32 and out.shape[-1] == BLOCK * (SINKS + LOCAL)
    return [[sorted(c for c in token if c >= 0) for token in row] for row in out.tolist()]


@pytest.mark.parametrize(
    ("position", "seen"),
    [
        (0, [0]),
        (2, [0, 1, 2]),
        (5, [0, 1, 2, 3, 4, 5]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # two blocks end where the sinks do: all there is
        (11, [*range(12)]),
        (12, [0, 1, 2, 3, 8, 9, 10, 11, 12]),  # block 1 left
        (19, [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19]),
        (20, [0, 1, 2, 3, 16, 17, 18, 19, 20]),
    ],
)
def test_columns_by_hand(position: int, seen: list[int]) -> None:
    assert _columns(Visibility.causal(21, 0, torch.device("cpu")))[0][position] == seen
    assert _columns(Visibility.causal(1, position, torch.device("cpu")))[0][0] == seen  # a step of decoding
    real = torch.ones(2, 24, dtype=torch.bool)
    real[0, :3] = False
    assert _columns(from_padding(real, 24)[0])[0][3 + position] == [3 + c for c in seen]
    documents = from_documents(torch.cat((torch.arange(7), torch.arange(21))).unsqueeze(0))
    assert documents is not None
    assert _columns(documents)[0][7 + position] == [7 + c for c in seen]


def test_no_sinks_and_blocks_of_one() -> None:
    config = Longcat2Config(**SHAPE, streaming_block_size=1, streaming_sink_blocks=0, streaming_local_blocks=3)
    out = streaming_columns(Visibility.causal(6, 0, torch.device("cpu")), config)
    assert sorted(out[0, 5].tolist()) == [3, 4, 5] and sorted(out[0, 1].tolist()) == [-1, 0, 1]


# Against dense attention under a mask


def _masked(dense: Longcat2ForCausalLM, ids: Tensor, positions: Tensor, same: Tensor) -> Tensor:
    """Logits of dense attention under the definition; ``same``: bool [B, T, T], whether two tokens share a sequence."""
    seen = torch.tensor([[[sees(q, k) for k in row] for q in row] for row in positions.tolist()])
    order = torch.arange(ids.shape[1])
    mask = (seen & same & (order <= order[:, None])).unsqueeze(1)
    return dense(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def _pair() -> tuple[Longcat2ForCausalLM, Longcat2ForCausalLM]:
    """Every attention streams, and none does; without n-grams, which a 4-D mask would cut too."""
    return tiny(seed=5, ngram=False, **SIZES, streaming_attentions=EVERY), tiny(seed=5, ngram=False)


@torch.no_grad()
def test_it_is_dense_attention_under_the_mask() -> None:
    streaming, dense = _pair()
    ids = tokens(2, 40, seed=1)
    got = streaming(ids, use_cache=False).logits
    everything = torch.ones(2, 40, 40, dtype=torch.bool)
    want = _masked(dense, ids, torch.arange(40).expand(2, -1), everything)
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    full = dense(ids, use_cache=False).logits
    assert (got - full)[:, :12].abs().max() < TOLERANCE * want.abs().max()  # three blocks are all in sight
    assert (got - full)[:, 12:].abs().max() > 0.05


@torch.no_grad()
def test_with_left_padding() -> None:
    streaming, dense = _pair()
    pads, length = (0, 5, 13), 40
    ids = tokens(3, length, seed=2)
    real = torch.stack([torch.arange(length) >= pad for pad in pads])
    got = streaming(ids, attention_mask=real.long(), use_cache=False).logits
    positions = (real.cumsum(1) - 1).clamp(min=0)
    # a padding token sees itself, so that no row of the mask is empty
    same = (real[:, :, None] & real[:, None]) | torch.eye(length, dtype=torch.bool)
    want = _masked(dense, ids, positions, same)
    assert (got - want)[real].abs().max() < TOLERANCE * want.abs().max()


@torch.no_grad()
def test_packed_rows() -> None:
    streaming, dense = _pair()
    lengths = (17, 6, 25)
    ids = tokens(1, sum(lengths), seed=3)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    got = streaming(ids, position_ids=positions, use_cache=False).logits
    want = _masked(dense, ids, positions, (document[:, None] == document).unsqueeze(0))
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()


def test_gradients_are_those_under_the_mask() -> None:
    streaming, dense = (model.train() for model in _pair())
    ids, everything = tokens(2, 30, seed=4), torch.ones(2, 30, 30, dtype=torch.bool)
    streaming(ids, labels=ids).loss.backward()
    logits = _masked(dense, ids, torch.arange(30).expand(2, -1), everything)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, got), want in zip(streaming.named_parameters(), dense.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None
        assert (got.grad - want.grad).abs().max() < 1e-4 * max(1.0, float(want.grad.abs().max())), name


# With a cache; two attentions of four stream


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_any_chunking_equals_the_full_forward(chunks: list[int], pad: int, from_config: bool) -> None:
    ids = tokens(2, sum(chunks), seed=sum(chunks))
    mask = torch.ones_like(ids)
    mask[0, : min(pad, chunks[0])] = 0
    cache = DynamicCache(config=MODEL.config) if from_config else DynamicCache()
    with torch.no_grad():
        full = MODEL(ids, attention_mask=mask, use_cache=False).logits
        start, pieces = 0, []
        for size in chunks:
            stop = start + size
            out = MODEL(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            pieces.append(out.logits)
            start = stop
    got, real = torch.cat(pieces, dim=1), mask.bool()
    assert (got - full)[real].abs().max() < TOLERANCE * full.abs().max()


@torch.no_grad()
def test_token_by_token() -> None:
    ids, cache = tokens(2, 40, seed=8), DynamicCache()
    full = MODEL(ids, use_cache=False).logits
    got = torch.cat([MODEL(ids[:, t : t + 1], past_key_values=cache).logits for t in range(40)], dim=1)
    assert (got - full).abs().max() < TOLERANCE * full.abs().max()


@torch.no_grad()
def test_slot_cache_with_rows_at_different_positions() -> None:
    lengths, steps = [5, 40, 23], 6
    rows = tokens(3, max(lengths) + steps, seed=6)
    cache = SlotCache(3, 60)
    prefill = slot_forward(MODEL, cache, rows[:, : max(lengths)], torch.arange(max(lengths)).expand(3, -1))
    stepped = [[prefill[b, n - 1]] for b, n in enumerate(lengths)]
    for step in range(steps):
        positions = torch.tensor(lengths).unsqueeze(1) + step
        logits = slot_forward(MODEL, cache, rows.gather(1, positions), positions)
        for b in range(3):
            stepped[b].append(logits[b, 0])
    for b, n in enumerate(lengths):
        want = MODEL(rows[b : b + 1, : n + steps], use_cache=False).logits[0, n - 1 :]
        assert (torch.stack(stepped[b]) - want).abs().max() < TOLERANCE * want.abs().max()


# Calibration


@torch.no_grad()
def test_alpha_one_is_full_and_zero_is_streaming() -> None:
    dense, streaming = tiny(seed=5), tiny(seed=5, **SIZES, streaming_attentions=EVERY)
    ids = tokens(2, 40, seed=1)
    full, streamed = dense(ids, use_cache=False).logits, streaming(ids, use_cache=False).logits
    with mixed(dense.model, PATTERN, torch.ones(4)):
        assert torch.equal(dense(ids, use_cache=False).logits, full)
    with mixed(dense.model, PATTERN, torch.zeros(4)):
        assert (dense(ids, use_cache=False).logits - streamed).abs().max() < TOLERANCE * full.abs().max()
    with mixed(dense.model, PATTERN, torch.tensor([0.0, 1.0, 1.0, 0.0])):  # as MODEL
        want = MODEL(ids, use_cache=False).logits
        assert (dense(ids, use_cache=False).logits - want).abs().max() < TOLERANCE * full.abs().max()


def test_it_leaves_no_trace() -> None:
    model, ids = tiny(seed=5), tokens(1, 30)
    before = model(ids, use_cache=False).logits
    with pytest.raises(RuntimeError, match="stop"), mixed(model.model, PATTERN, torch.zeros(4)):
        assert not torch.equal(model(ids, use_cache=False).logits, before)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids)
        raise RuntimeError("stop")
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="3 alphas for 4"), mixed(model.model, PATTERN, torch.zeros(3)):
        pass


def test_the_gradient_of_alpha_is_that_of_the_mixture_and_reaches_nothing_else() -> None:
    model, ids = tiny(seed=5).requires_grad_(False), tokens(2, 30)
    alphas = torch.tensor([0.3, 0.6, 0.5, 0.9], requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        with mixed(model.model, PATTERN, values):
            return model(ids, labels=ids, use_cache=False).loss

    loss(alphas).backward()
    assert alphas.grad is not None and all(p.grad is None for p in model.parameters())
    for i in range(4):
        step = torch.zeros(4)
        step[i] = 1e-3  # small: where the router changes its mind the loss jumps
        with torch.no_grad():
            slope = (loss(alphas + step) - loss(alphas - step)) / 2e-3
        assert alphas.grad[i].item() == pytest.approx(slope.item(), rel=0.05, abs=2e-3)


@pytest.mark.parametrize("idle", EVERY)
def test_it_finds_the_attention_that_matters_least(idle: int) -> None:
    """One attention adds nothing; the labels are what the full model itself says, so the others want alpha 1."""
    model, ids = tiny(seed=5), tokens(4, 40, seed=9)
    with torch.no_grad():
        attention: Any = model.model.layers[idle // 2]
        attention.self_attn[idle % 2].o_proj.weight.zero_()
        said = model(ids, use_cache=False).logits.argmax(-1)
    labels = torch.nn.functional.pad(said[:, :-1], (1, 0), value=-100)  # the model shifts them
    model.requires_grad_(False)
    alphas = torch.full((4,), 0.5, requires_grad=True)
    optimizer = SGD([alphas], 0.3, momentum=0.9)
    with mixed(model.model, PATTERN, alphas):
        for _ in range(15):
            optimizer.zero_grad()
            model(ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
    assert alphas[idle].item() == 0.5
    assert least(alphas.detach(), 0.25) == [idle]
    assert all(a > 0.6 for i, a in enumerate(alphas.tolist()) if i != idle)


def test_least_takes_the_share_in_the_order_of_ids() -> None:
    alphas = torch.tensor([0.9, 0.2, 0.5, 0.1, 0.5, 0.8])
    assert least(alphas, 0.5) == [1, 2, 3]  # of the two at 0.5 the first
    assert least(alphas, 1 / 3) == [1, 3]
    assert least(alphas, 1.0) == [0, 1, 2, 3, 4, 5]
