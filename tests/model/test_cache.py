"""Cached decoding, chunked prefill, slot buffers, generation, causality, packing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from tests.model.longcat2_tiny import SHAPE, YARN, SlotCache, slot_forward, tiny, tokens

MODEL: Any = tiny(seed=3, rope_parameters=dict(YARN))
TOLERANCE = 2e-5


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from(["auto", "naive", "absorbed"]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_chunking_equals_the_full_forward(chunks: list[int], path: str, from_config: bool, pad: int) -> None:
    ids = tokens(2, sum(chunks), seed=sum(chunks))
    mask = torch.ones_like(ids)
    mask[0, : min(pad, chunks[0])] = 0
    cache = DynamicCache(config=MODEL.config) if from_config else DynamicCache()
    with torch.no_grad():
        full = MODEL(ids, attention_mask=mask, use_cache=False).logits
        start, pieces = 0, []
        MODEL.set_attention_path(path)  # type: ignore[arg-type]
        for size in chunks:
            columns = slice(start, start + size)
            pieces.append(MODEL(ids[:, columns], attention_mask=mask[:, : columns.stop], past_key_values=cache).logits)
            start += size
        MODEL.set_attention_path("auto")
    difference = (torch.cat(pieces, dim=1) - full)[mask.bool()]
    assert difference.abs().max() < TOLERANCE * full.abs().max()  # YaRN x120 makes large logits
    assert cache.get_seq_length() == sum(chunks) == cache.get_seq_length(2 * SHAPE["num_layers"])


@pytest.mark.parametrize("path", ["auto", "naive", "absorbed"])
def test_slot_cache_with_rows_at_different_positions(path: str) -> None:
    lengths, columns, steps = [3, 9, 6], 20, 5
    rows = tokens(3, max(lengths) + steps, seed=6)
    cache = SlotCache(3, columns)
    MODEL.set_attention_path(path)  # type: ignore[arg-type]
    with torch.no_grad():
        prefill = slot_forward(MODEL, cache, rows[:, : max(lengths)], torch.arange(max(lengths)).expand(3, -1))
        stepped = [[prefill[b, n - 1]] for b, n in enumerate(lengths)]
        for step in range(steps):  # short rows overwrite the columns that their prefill padded
            positions = torch.tensor(lengths).unsqueeze(1) + step
            logits = slot_forward(MODEL, cache, rows.gather(1, positions), positions)
            for b in range(3):
                stepped[b].append(logits[b, 0])
        MODEL.set_attention_path("auto")
        for b, n in enumerate(lengths):
            want = MODEL(rows[b : b + 1, : n + steps], use_cache=False).logits[0, n - 1 :]
            assert (torch.stack(stepped[b]) - want).abs().max() < TOLERANCE


def test_additive_and_boolean_4d_masks_agree() -> None:
    ids, positions = tokens(2, 6), torch.arange(6).expand(2, -1)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = MODEL(ids, use_cache=False).logits
        for mask in (allowed, additive):
            got = MODEL(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            assert (got - want).abs().max() < TOLERANCE
        cached = MODEL(ids, attention_mask=allowed, position_ids=positions, past_key_values=DynamicCache()).logits
        assert (cached - want).abs().max() < TOLERANCE


def test_cache_crop_and_reorder() -> None:
    ids = tokens(2, 10, seed=9)
    with torch.no_grad():
        cache = MODEL(ids, use_cache=True).past_key_values
        cache.crop(-3)
        other = tokens(2, 2, seed=10)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = MODEL(other, past_key_values=cache).logits
        want = MODEL(torch.cat([ids.flip(0)[:, :7], other], dim=1), use_cache=False).logits[:, -2:]
    assert (got - want).abs().max() < TOLERANCE


def test_left_padded_generate_equals_unpadded_greedy() -> None:
    prompts = [tokens(1, n, seed=n, low=3) for n in (3, 8, 5)]
    settings_ = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    alone = [MODEL.generate(p, attention_mask=torch.ones_like(p), **settings_)[0, p.shape[1] :] for p in prompts]
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=2) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0), value=0) for p in prompts])
    together = MODEL.generate(ids, attention_mask=mask, **settings_)[:, width:]
    assert together.tolist() == [row.tolist() for row in alone]
    with torch.no_grad():  # and the greedy continuation is that of full forwards
        row = prompts[1]
        for _ in range(9):
            row = torch.cat([row, MODEL(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert row[0, 8:].tolist() == alone[1].tolist()


def test_beam_search_runs_on_the_token_history() -> None:
    prompt = tokens(1, 5, seed=1, low=3)
    out = MODEL.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0
    )
    assert out[0, :5].tolist() == prompt[0].tolist()


@pytest.mark.parametrize("position", [0, 4, 10])
def test_causality(position: int) -> None:
    ids = tokens(1, 11, seed=2)
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        before, after = MODEL(ids).logits, MODEL(changed).logits
    # routing sorts rows together, so matmul blocking may differ in the last bits
    assert torch.allclose(before[:, :position], after[:, :position], atol=1e-6)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-3


def test_packed_documents_do_not_see_each_other() -> None:
    first, second = tokens(1, 6, seed=1, low=3), tokens(1, 5, seed=2, low=3)
    positions = torch.cat([torch.arange(6), torch.arange(5)]).unsqueeze(0)
    with torch.no_grad():
        packed = MODEL(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
        want = torch.cat([MODEL(first).logits, MODEL(second).logits], dim=1)
    assert (packed - want).abs().max() < TOLERANCE


def test_same_input_same_bits() -> None:
    ids = tokens(4, 16, seed=4)
    gradients = []
    for _ in range(2):
        MODEL.zero_grad()
        loss = MODEL(ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in MODEL.parameters() if p.grad is not None)])
    MODEL.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bad_masks_are_refused() -> None:
    ids = tokens(2, 4)
    with pytest.raises(ValueError, match="past \\+ tokens"):
        MODEL(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="4-D attention_mask"):
        MODEL(ids, attention_mask=torch.ones(2, 1, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="position_ids"):
        MODEL(ids, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="StaticCache"):
        MODEL(ids, past_key_values=StaticCache(config=MODEL.config, max_cache_len=8))
    with pytest.raises(ValueError, match="input_ids"):
        MODEL(inputs_embeds=torch.zeros(1, 2, SHAPE["hidden_size"]))
    with pytest.raises(ValueError, match="exactly one"):
        MODEL()
