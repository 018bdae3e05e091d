"""N-gram ids and embedding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.model import Longcat2Config
from posttrain.model.ngram import PADDING, NgramHasher, table_rows
from posttrain.model.visibility import Visibility
from tests.model.longcat2_tiny import NGRAM, SHAPE, tiny, tokens

V, N, K, EOS = SHAPE["vocab_size"], NGRAM["oe_neighbor_num"], NGRAM["oe_split_num"], 2


def _reference_ids(row: list[int], vocab: int, order_max: int, splits: int, base: int, eos: int = EOS) -> list[list]:
    """Ids of a sequence from the definition, in exact Python integers."""
    result = []
    for position in range(len(row)):
        reach = 0
        while reach < order_max - 1 and position > reach and row[position - reach - 1] not in (eos, PADDING):
            reach += 1
        ids = []
        for order in range(2, order_max + 1):
            for k in range(splits):
                rows = base + 2 * ((order - 2) * splits + k) + 1
                ids.append(sum(row[position - j] * vocab**j for j in range(min(order, reach + 1))) % rows)
        result.append(ids)
    return result


def _causal(tokens: int) -> Visibility:
    return Visibility.causal(tokens, 0, torch.device("cpu"))


def test_hand_computed_ids() -> None:
    config = Longcat2Config(
        **{**SHAPE, "vocab_size": 10}, oe_vocab_size_ratio=1.2, oe_neighbor_num=3, oe_split_num=1, eos_token_id=2
    )
    assert table_rows(config) == [13, 15]
    hasher = NgramHasher(config)
    row = torch.tensor([[4, 7, 2, 5, 6, 3]])
    got = hasher.ids(hasher.contexts(row, _causal(6)))
    # position 2 is an EOS that looks back over its own segment; position 3 starts afresh
    want = [[4, 4], [47 % 13, 47 % 15], [72 % 13, 472 % 15], [5, 5], [56 % 13, 56 % 15], [63 % 13, 563 % 15]]
    assert want == [[4, 4], [8, 2], [7, 7], [5, 5], [4, 11], [11, 8]]
    assert got[0].tolist() == want


def test_table_rows_of_the_published_models() -> None:
    lite = Longcat2Config(
        vocab_size=131072, hidden_size=3072, oe_vocab_size_ratio=78, oe_neighbor_num=4, oe_split_num=4
    )
    assert sum(table_rows(lite)) == 122_683_536 and len(table_rows(lite)) == 12
    large = Longcat2Config(
        vocab_size=163840, hidden_size=8192, oe_vocab_size_ratio=100.567, oe_neighbor_num=5, oe_split_num=4
    )
    assert sum(table_rows(large)) == 263_630_608 and table_rows(large)[0] == 16_476_898


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, V - 1), min_size=1, max_size=14))
def test_ids_equal_the_definition(row: list[int]) -> None:
    hasher = NgramHasher(Longcat2Config(**SHAPE, **NGRAM))
    base = int(NGRAM["oe_vocab_size_ratio"] * V)
    got = hasher.ids(hasher.contexts(torch.tensor([row]), _causal(len(row))))[0].tolist()
    want = _reference_ids(row, V, N, K, base)
    for token, mine, reference in zip(row, got, want, strict=True):
        if token != PADDING:
            assert mine == reference


def test_no_overflow_at_published_size() -> None:
    config = Longcat2Config(
        vocab_size=163840, hidden_size=8192, oe_vocab_size_ratio=100.567, oe_neighbor_num=5, oe_split_num=4
    )
    row = [163839, 163838, 163000, 150001, 163839, 77]
    hasher = NgramHasher(config)
    got = hasher.ids(hasher.contexts(torch.tensor([row]), _causal(len(row))))[0].tolist()
    assert got == _reference_ids(row, 163840, 5, 4, 16_476_897)


def test_embedding_is_the_mean_over_branches() -> None:
    model = tiny(seed=4)
    row = [5, 2, 9, 9, 30, 2, 2, 17]
    ids = _reference_ids(row, V, N, K, int(NGRAM["oe_vocab_size_ratio"] * V))
    weights = model.state_dict()
    want = []
    for token, table_ids in zip(row, ids, strict=True):
        total = weights["model.embed_tokens.weight"][token].double()
        for t, index in enumerate(table_ids):
            row_value = weights[f"model.oe_embed_tokens{t}.weight"][index].double()
            total = total + weights[f"model.oe_embed_proj{t}.weight"].double() @ row_value
        want.append(total / (1 + K * (N - 1)))
    with torch.no_grad():
        got = model(torch.tensor([row]), output_hidden_states=True).hidden_states[0][0]
    assert (got - torch.stack(want)).abs().max() < 1e-6


def test_batch_padding_has_no_influence() -> None:
    model = tiny(seed=2)
    row = tokens(1, 7, seed=8, low=3)
    with torch.no_grad():
        alone = model(row).logits
        for pad in (0, EOS, 11):
            for left in (True, False):
                filler = torch.full((1, 4), pad)
                ids = torch.cat([filler, row] if left else [row, filler], dim=1)
                mask = torch.tensor([[0] * 4 + [1] * 7 if left else [1] * 7 + [0] * 4])
                got = model(ids, attention_mask=mask).logits[mask.bool()]
                assert (got - alone[0]).abs().max() < 1e-5
        right_without_mask = model(torch.cat([row, torch.full((1, 4), 11)], dim=1)).logits[:, :7]
        assert (right_without_mask - alone).abs().max() < 1e-5


def test_initial_embedding_scale_is_the_usual_one() -> None:
    from posttrain.model import Longcat2ForCausalLM

    torch.manual_seed(0)
    config = Longcat2Config(**{**SHAPE, **NGRAM, "hidden_size": 96, "vocab_size": 512})
    model = Longcat2ForCausalLM(config)
    with torch.no_grad():
        embedded = model(tokens(8, 64, low=3, vocab=512), output_hidden_states=True).hidden_states[0]
    assert abs(float(embedded.std()) / config.initializer_range - 1) < 0.1
