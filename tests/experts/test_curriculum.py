"""Which task is next, how often, and in groups of which size; what becomes of truncated and of long rollouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Any, cast

import pytest
from pydantic import ValidationError

from experts.config import BudgetConfig, CurriculumConfig, ExpertConfig
from experts.credit import GroupCredit, GroupCreditConfig, capped, samples_of
from experts.tasks import Curriculum, TaskStream
from posttrain.loop import Loop
from posttrain.protocols import Engine
from posttrain.scheduler import Scheduler
from posttrain.settings import LoopConfig
from posttrain.trainer import Trainer
from posttrain.types import Message, Rollout, Sample, Score, StopReason, Task
from tests.experts.test_tasks import Named
from tests.posttrain.counting import Boom, Counting, Source, config
from tests.posttrain.small import rollout


def task(number: int, difficulty: float = 1.0) -> Task:
    return Task(id=f"t/{number}", domain="agent", world="a", prompt=(), difficulty=difficulty)


def group(*outcomes: float) -> list[Rollout]:
    return [replace(rollout(f"s/0/{i}"), score=Score(value=v, outcome=v)) for i, v in enumerate(outcomes)]


def curriculum(difficulties: Sequence[float], size: int = 4, **changes: Any) -> Curriculum:
    return Curriculum([task(i, d) for i, d in enumerate(difficulties)], CurriculumConfig(**changes), size)


def stream(seed: int = 3, **changes: Any) -> TaskStream:
    worlds: Any = {name: Named(name) for name in ("a", "b")}
    return TaskStream(worlds, {"a": 1, "b": 2}, 20, seed, curriculum=CurriculumConfig(**changes), group_size=6)


# Weights


def test_the_weight_is_signal_times_window() -> None:
    """Equal difficulties are at 1/2 of the ranks. A world that starts at 0.25 has 0.95 x 0.25 + 0.05 x 0.75 = 0.275
    after one group of 0.75, and its task 0.5 x 0.25 + 0.5 x 0.75 = 0.5; the other one has the world's own rate."""
    books = curriculum([1.0, 1.0], memory=0.5, width=0.5)
    books.seen(task(0), group(1, 1, 1, 0))
    assert books.rate == pytest.approx(0.275)
    window = math.exp(-((0.225 / 0.5) ** 2) / 2)
    assert books.weights() == pytest.approx([0.01 + window, 0.01 + 4 * 0.275 * 0.725 * window])


def test_easy_tasks_come_first_and_hard_ones_when_the_world_is_solved() -> None:
    """Nine tasks, in ranks 1/18, 3/18, ... 17/18. The expert solves a half of everything, later nearly all but the
    hardest; what is heaviest moves from rank 1/4 to the hard end."""
    books = curriculum([float(d) for d in range(9)], width=0.2)

    def heaviest() -> int:
        return max(range(9), key=lambda i: books.weights()[i])

    assert heaviest() in (1, 2)
    for _ in range(60):
        for i in range(9):
            books.seen(task(i), group(1, 0))
    assert books.rate == pytest.approx(0.5, abs=0.01) and heaviest() == 4
    for _ in range(60):
        for i in range(9):
            books.seen(task(i), group(1, 1, 1, 1, 1, 1, 1, 1, 1, 0))
    assert books.rate == pytest.approx(0.9, abs=0.01) and heaviest() in (7, 8)


def test_draws_follow_the_weights() -> None:
    """20,000 draws: the standard error of a share of 0.5 is 0.0035."""
    books = curriculum([1.0, 2.0, 3.0, 4.0], repeat=0.0)
    books.seen(task(0, 1.0), group(0, 1))
    weights, rng = books.weights(), Random(0)
    drawn = Counter(books.next(rng).id for _ in range(20000))
    assert [drawn[f"t/{i}"] / 20000 for i in range(4)] == pytest.approx([w / sum(weights) for w in weights], abs=0.015)


# Rest


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_what_says_the_same_twice_rests_and_comes_back(outcome: float) -> None:
    books = curriculum([1.0, 1.0], rest_after=2, rest=3)
    books.seen(task(0), group(outcome, outcome))
    assert books.weights()[0] > 0
    books.seen(task(0), group(1, 0))
    books.seen(task(0), group(outcome, outcome))
    assert books.weights()[0] > 0, "not in a row"
    books.seen(task(0), group(outcome, outcome))
    for _ in range(3):
        assert books.weights()[0] == 0 < books.weights()[1]
        books.seen(task(1), group(0, 1))
    assert books.weights()[0] > 0


def test_when_all_rest_all_may_come() -> None:
    books = curriculum([1.0, 1.0], rest_after=1)
    for i in range(2):
        books.seen(task(i), group(0, 0))
    assert min(books.weights()) > 0


def test_a_group_without_an_outcome_says_nothing() -> None:
    books = curriculum([1.0])
    before = books.state()
    books.seen(task(0), [rollout("s/0/0", score=None)])
    assert books.state() == before


# Oversampling


@pytest.mark.parametrize(("rate", "groups"), [(0.0, 4), (0.3, 3), (0.5, 3), (0.6, 2), (0.9, 1), (1.0, 1)])
def test_a_task_is_given_to_more_groups_in_a_row_the_lower_its_pass_rate(rate: float, groups: int) -> None:
    """1 + round(3 (1 - p)); 1.5 is rounded to 2."""
    books = curriculum([1.0], memory=0.0, repeat=3.0, rest_after=99)
    books.seen(task(0), group(rate))
    assert books.next(Random(0)).id == "t/0"
    assert books.state()["queue"] == [[0, None]] * (groups - 1)


def test_what_was_never_seen_is_measured_first() -> None:
    books = curriculum([1.0, 1.0])
    books.next(Random(0))
    assert books.state()["queue"] == []


# Budget


def test_a_pool_of_groups_shares_its_rollouts() -> None:
    """Of known rates, and 8 on the mean: the twelfth rollout of rate 0.9 is worth 0.0314 and of rate 0.05 0.0284, the
    seventh of rate 0.5, which gets what is left, 0.0156."""
    books = curriculum(
        [1.0] * 4, 8, memory=0.0, repeat=0.0, rest_after=99, budget=BudgetConfig(min=2, max=12, pool=400)
    )
    for i, rate in enumerate((0.5, 0.9, 1.0, 0.05)):
        books.seen(task(i), group(*[1.0] * round(20 * rate), *[0.0] * round(20 * (1 - rate))))
    drawn = [books.next(Random(1)) for _ in range(400)]
    assert fmean(t.rollouts or 0 for t in drawn) == 8
    sizes = [[t.rollouts or 0 for t in drawn if t.id == f"t/{i}"] for i in range(4)]
    assert set(sizes[2]) == {2}, "nothing can be gained there"
    assert set(sizes[0]) == {6, 7} and set(sizes[1]) == set(sizes[3]) == {12}


def test_sizes_stay_in_bounds_and_keep_their_mean() -> None:
    source, rng, sizes = stream(budget=BudgetConfig(min=3, max=20, pool=10), repeat=0.0), Random(5), list[int]()
    for number in range(400):
        found = source.task(number, "ab"[number % 2])
        assert found.rollouts is not None
        sizes.append(found.rollouts)
        source.seen(found, group(*(float(rng.random() < 0.2) for _ in range(found.rollouts))))
    assert sum(sizes) == 6 * 400 and 3 <= min(sizes) < 6 < max(sizes) <= 20


# State


def play(source: TaskStream, numbers: range, told: list[Task]) -> list[Task]:
    """Two groups start, two end, and so on."""
    found = list[Task]()
    for number in numbers:
        found.append(source.task(number, ""))
        told.append(found[-1])
        if number % 2:
            for one in told:
                rng = Random(f"{number}/{one.id}")
                source.seen(one, group(*(float(rng.random() < 0.4) for _ in range(4))))
            told.clear()
    return found


@pytest.mark.parametrize("budget", [None, BudgetConfig(min=2, max=9, pool=5)])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(budget: BudgetConfig | None) -> None:
    whole, first, second = (stream(budget=budget, rest=7) for _ in range(3))
    expected = play(whole, range(120), [])
    before = play(first, range(60), [])
    second.restore(json.loads(json.dumps(first.state())))
    assert before + play(second, range(60, 120), []) == expected
    assert second.state() == whole.state()
    assert play(stream(seed=4, budget=budget, rest=7), range(120), []) != expected


def test_the_state_has_at_most_a_record_a_task_and_a_pool() -> None:
    source = stream(budget=BudgetConfig(min=2, max=9, pool=5))
    play(source, range(1500), [])
    states = source.state()
    assert states.keys() == {"a", "b"}
    for state in states.values():
        assert 0 < len(state["records"]) <= 20 and len(state["queue"]) < 5 + 4


def test_without_a_curriculum_all_is_as_before() -> None:
    """World by share, then a task, by the number alone."""
    worlds: Any = {name: Named(name) for name in ("a", "b")}
    source = TaskStream(worlds, {"a": 1, "b": 2}, 20, 3)
    drawn = play(source, range(50), [])
    for number, found in enumerate(drawn):
        rng = Random(f"3/{number}")
        name = rng.choices(["a", "b"], [1, 2])[0]
        assert found == rng.choice(worlds[name].tasks("train", 20, 3))
    assert source.state() == {}


def learning(c: LoopConfig, source: TaskStream, **changes: Any) -> tuple[Counting, Loop]:
    """A loop with a source that learns from outcomes that hang on the rollout's seed."""
    parts = Counting(c, **changes)
    loop = parts.settle()

    async def run(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        played = await parts.play(engine, task, rollout_id, group, seed)
        return replace(played, task=task, score=Score(value=1.0, outcome=float(seed % 3 == 0)))

    loop.source, loop.run_rollout = source, run
    return parts, loop


@pytest.mark.parametrize("budget", [None, BudgetConfig(min=2, max=9, pool=5)])
def test_after_a_kill_a_source_that_learns_gives_the_same_tasks(budget: BudgetConfig | None) -> None:
    """K = 0, killed at version 5 with a checkpoint of version 3: what two more batches taught is learned again."""
    c = config(steps=9, groups_per_step=3, group_size=6, max_staleness=0, checkpoint_every=3)
    whole, loop = learning(c, stream(budget=budget))
    whole.run(loop)
    first, loop = learning(c, stream(budget=budget), stop_at=5)
    with pytest.raises(Boom, match="killed"):
        first.run(loop)
    second, loop = learning(c, stream(budget=budget), version=3)
    loop.resume(first.states[-1], first.journal)
    second.run(loop)
    found, expected = ([(r.id, r.task) for p in lives for r in p.journal] for lives in ((first, second), (whole,)))
    assert sorted(found, key=lambda x: x[0]) == sorted(expected, key=lambda x: x[0])
    assert second.states[-1]["source"] == whole.states[-1]["source"]
    assert len({t.id for _, t in expected}) > 5


# Truncation


def cut(index: int, stop: StopReason, words: str = "", score: float = 0.0) -> Rollout:
    said = (Message(role="assistant", content=words),)
    return replace(rollout(f"s/0/{index}", score=score), stop=stop, messages=said)


OTHERS = [rollout(f"s/0/{i}", score=v) for i, v in enumerate((1.0, 0.5, 0.0))]
AGAIN = "one two three four five six seven " * 8


def told(found: Sequence[Sample]) -> dict[str, float]:
    return {s.rollout: s.advantages[-1] for s in found}


@pytest.mark.parametrize("stop", [StopReason.CONTEXT_OVERFLOW, StopReason.AGENT_TIMEOUT])
def test_what_was_cut_short_is_neither_trained_nor_compared(stop: StopReason) -> None:
    """Kept, the mean of 1, 1/2, 0, 0 is 3/8; masked, that of 1, 1/2, 0 is 1/2."""
    members = [*OTHERS, cut(3, stop)]
    kept, masked = (GroupCredit(GroupCreditConfig(truncated=t))(members) for t in ("keep", "mask"))
    assert told(kept) == {"s/0/0": 0.625, "s/0/1": 0.125, "s/0/2": -0.375, "s/0/3": -0.375}
    assert told(masked) == {"s/0/0": 0.5, "s/0/1": 0.0, "s/0/2": -0.5}


def test_masking_goes_before_the_scale_and_the_baseline_of_the_others() -> None:
    """Of 1, 1/2, 0: deviation sqrt(1/6); against the mean of the others 3/2 of the difference from the whole mean."""
    members = [*OTHERS, cut(3, StopReason.CONTEXT_OVERFLOW)]
    scaled = GroupCredit(GroupCreditConfig(truncated="mask", scale="std"))(members)
    assert told(scaled) == pytest.approx({"s/0/0": 1.5**0.5, "s/0/1": 0.0, "s/0/2": -(1.5**0.5)})
    alone = GroupCredit(GroupCreditConfig(truncated="mask", baseline="leave_one_out"))(members)
    assert told(alone) == pytest.approx({"s/0/0": 0.75, "s/0/1": 0.0, "s/0/2": -0.75})


def test_repetition_keeps_its_loss() -> None:
    """A loop is no truncation. Of the 51 phrases of ``AGAIN`` 7 are new: 0.863 of them were said before."""
    for member in (cut(3, StopReason.LOOP), cut(3, StopReason.CONTEXT_OVERFLOW, AGAIN)):
        found = told(GroupCredit(GroupCreditConfig(truncated="mask"))([*OTHERS, member]))
        assert found["s/0/3"] == -0.375
    strict = GroupCreditConfig(truncated="mask", repetition=0.87)
    assert "s/0/3" not in told(GroupCredit(strict)([*OTHERS, cut(3, StopReason.CONTEXT_OVERFLOW, AGAIN)]))


def test_a_group_that_was_cut_short_whole_teaches_nothing() -> None:
    members = [cut(i, StopReason.AGENT_TIMEOUT, score=i / 2) for i in range(3)]
    assert GroupCredit(GroupCreditConfig(truncated="mask"))(members) == []
    assert len(GroupCredit(GroupCreditConfig())(members)) == 3


# Token cap


def long(tokens: int) -> Rollout:
    """Two branches, the second with a third of the tokens."""
    whole, third = (rollout(values=range(10, 10 + n), versions=[0] * n) for n in (tokens, tokens // 3))
    return replace(whole, branches=(*whole.branches, *third.branches))


def test_at_most_so_many_tokens_are_trained_and_what_fits_is_left_alone() -> None:
    samples = samples_of(long(12), 0.5)
    assert capped(samples, 16, Random(0)) == samples
    for cap in (1, 5, 15):
        found = capped(samples, cap, Random(cap))
        assert sum(sum(s.sampled) for s in found) == cap
        assert all(any(s.sampled) for s in found)
        for s in found:
            assert s.advantages == tuple(0.5 * 16 / cap if m else 0.0 for m in s.sampled)
            assert any(s.ids == o.ids and all(o.sampled[t] for t, m in enumerate(s.sampled) if m) for o in samples)


def test_the_expected_weight_of_every_token_is_what_it_was() -> None:
    """6,000 seeds, 4 of 16 tokens: a weight is 2 with probability 1/4, so its mean has a standard error of 0.011. The
    gradient is a sum of advantage times the token's own gradient, so what holds for every weight holds for it."""
    (one, third), weights = samples_of(long(12), 0.5), Counter[tuple[int, int]]()
    config = GroupCreditConfig(token_cap=4)
    member, other = long(12), rollout("s/0/1", score=0.0)
    for seed in range(6000):
        for s in GroupCredit(config, seed)([member, other]):
            if s.rollout == member.id:
                weights.update({(len(s.ids), t): a for t, a in enumerate(s.advantages)})
    for sample in (one, third):
        means = [weights[len(sample.ids), t] / 6000 for t in range(len(sample.ids))]
        assert means == pytest.approx(list(sample.advantages), abs=0.05)


def test_the_choice_hangs_on_the_seed_and_the_rollout() -> None:
    members = [replace(long(12), id=f"s/0/{i}", score=Score(value=float(i))) for i in range(2)]
    one, same, other = (GroupCredit(GroupCreditConfig(token_cap=4), seed)(members) for seed in (0, 0, 1))
    assert one == same != other
    assert [s.sampled for s in one if s.rollout == "s/0/0"] != [s.sampled for s in one if s.rollout == "s/0/1"]


# By hand


def test_oversampling_by_hand_is_where_the_books_begin() -> None:
    """Half and half, and of ``a`` one group in four is thought to be of use: with four of it for every one of ``b``
    under way, the two are even."""
    c = config(groups_per_step=10, max_running=20, quotas=True)
    books = Scheduler(c, shares={"a": 1.0, "b": 1.0}, oversample={"a": 4.0})
    assert books.useful == {"a": 0.25, "b": 1.0}
    started = Counter(books.start(n, 1, books.world()).world for n in range(20))
    assert started == {"a": 16, "b": 4}
    for number in list(books.running):
        books.rollout_done(number)
        books.shelve(number)
    assert books.useful["a"] == pytest.approx(1 - 0.75 * 0.95**16), "and then they learn"
    other = Scheduler(c, shares={"a": 1.0, "b": 1.0}, oversample={"a": 4.0})
    other.restore(books.state())
    assert other.useful == books.useful


def test_the_loop_hands_it_on() -> None:
    parts = Counting(config(quotas=True), shares={"a": 1.0, "b": 1.0})
    for quotas, found in ((True, {"a": 0.5, "b": 1.0}), (False, {})):
        loop = Loop(
            config(quotas=quotas), name="s", seed=1, engine=parts, trainer=cast(Trainer, parts), credit=parts.credit,
            source=Source(), run_rollout=parts.play, journal=parts, on_step=parts.on_step,
            checkpoint=parts.checkpoint, shares=parts.shares, oversample={"a": 2.0},
        )  # fmt: skip
        assert loop.books.useful == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"curriculum": {"budget": {"min": 9, "max": 16}}}, "loop.group_size is 8 and must be in 9..16"),
        ({"curriculum": {"budget": {"min": 9, "max": 9}}}, "max: 9 rollouts must be more than min, 9"),
        ({"oversample": {"b": 2.0}, "loop": {"quotas": True}}, "`b` is not among the expert's worlds; these are: a"),
        ({"oversample": {"a": 2.0}}, "oversample: without quotas .* set loop.quotas to true"),
        ({"credit": {"token_cap": 9}, "loss": {"type": "gspo"}}, "credit.token_cap: it trains on parts of responses"),
        ({"credit": {"token_cap": 9}, "loss": {"type": "grpo", "reduction": "token"}}, "loss.reduction to constant"),
        ({"credit": {"token_cap": 9}, "loss": {"type": "grpo", "sequence_cap": 2.0}}, "sequence_cap to null"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ExpertConfig.model_validate({"worlds": {"a": 1}, **given})


def test_what_goes_together_is_taken() -> None:
    given = {"curriculum": {"budget": {}}, "oversample": {"a": 2}, "loop": {"quotas": True}, "credit": {"token_cap": 9}}
    found = ExpertConfig.model_validate({"worlds": {"a": 1}, **given})
    assert found.curriculum == CurriculumConfig(budget=BudgetConfig(min=4, max=16, pool=16))
