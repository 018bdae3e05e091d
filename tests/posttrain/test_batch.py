"""Packing: every sample once, within the budget, as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.batch import Batch, deal, pack
from posttrain.types import Sample, Support
from tests.posttrain.small import sample


def made(index: int, length: int, teacher: bool = False) -> Sample:
    """Values that name their sample and position."""
    values = tuple(100.0 * index + t for t in range(length))
    return Sample(
        rollout=f"g/{index:04d}",
        domain="agent",
        ids=tuple(1000 * (index + 1) + t for t in range(length)),
        sampled=tuple(t % 2 == 0 for t in range(length)),
        logprobs=tuple(-v for v in values),
        advantages=tuple(2 * v for v in values),
        teacher_logprobs=tuple(-3 * v for v in values) if teacher else None,
    )


def rows(batch: Batch, length: dict[int, int]) -> dict[int, tuple[list[int], list[bool], list[float], list[float]]]:
    """By sample, its tokens as packed, the padding checked and cut off."""
    out = {}
    for ids, sampled, behaviour, advantages in zip(
        batch.ids_BT, batch.sampled_BT, batch.behaviour_BT, batch.advantages_BT, strict=True
    ):
        index = int(ids[0]) // 1000 - 1
        n = length[index]
        for tensor in (ids, sampled, behaviour, advantages):
            assert not tensor[n:].any(), "padding is 0 and never trained"
        out[index] = (ids[:n].tolist(), sampled[:n].tolist(), behaviour[:n].tolist(), advantages[:n].tolist())
    return out


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 200))
def test_every_sample_once_as_it_was_and_within_the_budget(lengths: list[int], budget: int) -> None:
    samples = [made(i, n) for i, n in enumerate(lengths)]
    batches = pack(samples, budget)
    seen: dict[int, object] = {}
    for batch in batches:
        count, width = batch.ids_BT.shape
        assert count * width <= budget or count == 1
        found = rows(batch, dict(enumerate(lengths)))
        assert len(found) == count and not seen.keys() & found.keys()
        assert width == max(lengths[i] for i in found)
        seen |= found
    for i, s in enumerate(samples):
        trained = [False, *s.sampled[1:]]
        assert seen[i] == (list(s.ids), trained, list(s.logprobs), list(s.advantages))
    assert len(seen) == len(samples)


@settings(max_examples=20)
@given(st.permutations(list(range(9))))
def test_the_order_of_samples_does_not_matter(order: list[int]) -> None:
    samples = [made(i, 3 + i % 3) for i in range(9)]
    for ours, theirs in zip(pack(samples, 20), pack([samples[i] for i in order], 20), strict=True):
        assert torch.equal(ours.ids_BT, theirs.ids_BT)


def test_contents_by_hand() -> None:
    (batch,) = pack([made(0, 2, teacher=True), made(1, 3, teacher=True)], 6)
    assert batch.ids_BT.tolist() == [[2000, 2001, 2002], [1000, 1001, 0]]
    # Position 0 is marked as sampled in the sample and is not trained: nothing comes before it.
    assert batch.sampled_BT.tolist() == [[False, False, True], [False, False, False]]
    assert batch.behaviour_BT.tolist() == [[-100, -101, -102], [0, -1, 0]]
    assert batch.advantages_BT.tolist() == [[200, 202, 204], [0, 2, 0]]
    assert batch.teacher_BT is not None
    assert batch.teacher_BT.tolist() == [[-300, -303, -306], [0, -3, 0]]
    assert (batch.ids_BT.dtype, batch.sampled_BT.dtype, batch.teacher_BT.dtype) == (
        torch.int64,
        torch.bool,
        torch.float32,
    )


def support(rows: list[list[int]]) -> Support:
    """Log-prob of a token is minus a tenth of its id."""
    ids = np.array(rows)
    return Support(ids=ids.astype("<i4").tobytes(), logprobs=(-ids / 10).astype("<f4").tobytes(), width=ids.shape[1])


def test_supports_by_hand() -> None:
    """A row a trained token, in the order of the sequences in the batch, as wide as the widest."""
    short = replace(made(0, 3, teacher=True), teacher_support=support([[5, -1]]))
    long = replace(made(1, 5, teacher=True), teacher_support=support([[7, 8, 2002], [9, 2004, -1]]))
    (batch,) = pack([short, long], 10)
    assert batch.support_NK is not None and batch.support_teacher_NK is not None
    assert batch.support_NK.tolist() == [[7, 8, 2002], [9, 2004, -1], [5, -1, -1]]
    kept = torch.where(batch.support_NK >= 0, batch.support_teacher_NK, 0.0)
    assert kept.tolist() == [pytest.approx(row) for row in ([-0.7, -0.8, -200.2], [-0.9, -200.4, 0], [-0.5, 0, 0])]
    assert batch.judged_ids.tolist() == [[2002, 7, 8, 2002], [2004, 9, 2004, 2004], [1002, 5, 1002, 1002]]
    assert (batch.support_NK.dtype, batch.support_teacher_NK.dtype) == (torch.int64, torch.float32)


def test_without_supports_only_the_trained_tokens_are_judged() -> None:
    (batch,) = pack([replace(made(0, 3, teacher=True), teacher_support=support([[5]])), made(1, 5, teacher=True)], 10)
    assert batch.support_NK is None and batch.support_teacher_NK is None
    assert batch.judged_ids.tolist() == [2002, 2004, 1002]


def test_a_support_that_is_not_of_the_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="a support of 2 rows for 1 trained tokens"):
        replace(made(0, 3), teacher_support=support([[5], [6]]))
    with pytest.raises(ValueError, match="12 bytes of ids and 8 of log-probs are not rows of 1"):
        Support(ids=b"\0" * 12, logprobs=b"\0" * 8, width=1)


def test_the_budget_counts_padding() -> None:
    """Lengths 5, 5, 2: two of 5 fill a budget of 10; the third would cost 5 more, not 2."""
    samples = [made(0, 2), made(1, 5), made(2, 5)]
    assert [tuple(b.ids_BT.shape) for b in pack(samples, 14)] == [(2, 5), (1, 2)]
    assert [tuple(b.ids_BT.shape) for b in pack(samples, 15)] == [(3, 5)]
    assert [tuple(b.ids_BT.shape) for b in pack(samples, 1)] == [(1, 5), (1, 5), (1, 2)]


def test_nothing_makes_nothing_and_a_missing_teacher_is_none() -> None:
    assert pack([], 10) == []
    (batch,) = pack([made(0, 3, teacher=True), made(1, 3)], 10)
    assert batch.teacher_BT is None


def test_to_moves_every_tensor() -> None:
    (batch,) = pack([replace(made(0, 3, teacher=True), teacher_support=support([[5]]))], 10)
    moved = batch.to(torch.device("meta"))
    names = ("ids_BT", "sampled_BT", "behaviour_BT", "advantages_BT", "teacher_BT", "support_NK", "support_teacher_NK")
    for name in names:
        assert getattr(moved, name).is_meta, name


def test_ranks_have_similar_lengths_and_as_many_micro_batches() -> None:
    """Lengths 5 to 11, two rows a micro-batch: rank 0 has 11, 9, 7, 5 and rank 1 has 10, 8, 6."""
    samples = [sample(f"g/{n}", n) for n in range(5, 12)]
    first, second = (deal(samples, 22, rank, 2) for rank in (0, 1))
    lengths = [[int(n) for b in batches for n in b.real_BT.sum(1)] for batches in (first, second)]
    assert lengths == [[11, 9, 7, 5], [10, 8, 6]]
    assert len(first) == len(second) == 2
    assert sum(int(b.sampled_BT.sum()) for b in first + second) == sum(n - 3 for n in range(5, 12))


def test_a_rank_without_samples_is_idle() -> None:
    """The shortest sample stands in for them, with nothing that is trained, real or counted."""
    one = sample("g/0", 6, teacher_logprobs=(-1.0,) * 6)
    (own,), (idle,) = (deal([one], 100, rank, 2) for rank in (0, 1))
    assert torch.equal(idle.ids_BT, own.ids_BT) and idle.teacher_BT is not None
    assert (int(own.sampled_BT.sum()), int(own.real_BT.sum())) == (3, 6)
    assert not idle.sampled_BT.any() and not idle.real_BT.any()


def test_an_idle_batch_has_no_support() -> None:
    one = replace(made(1, 5, teacher=True), teacher_support=support([[7, 8], [9, -1]]))
    own, idle = (deal([one], 100, rank, 2)[0] for rank in (0, 1))
    assert own.support_NK is not None and idle.support_NK is not None and idle.support_teacher_NK is not None
    assert (own.judged_ids.shape, idle.judged_ids.shape) == ((2, 3), (0, 3))
    assert idle.support_teacher_NK.shape == (0, 2)
