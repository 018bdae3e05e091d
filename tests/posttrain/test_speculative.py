"""Drafts change how fast tokens come, never which."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from posttrain.engine.batching import Scheduler
from posttrain.engine.local import LocalEngine
from posttrain.engine.sampling import draw
from posttrain.engine.slots import Request, Slot
from posttrain.engine.speculative import DraftCounts, Drafter
from posttrain.errors import UserError
from posttrain.types import Completion, Sampling
from tests.model.longcat2_tiny import LSA, MTP, SlotCache, tiny, tokens
from tests.posttrain.tiny import make_ids, make_model, trainer_gap, trainer_of

STEPS = MTP["mtp_num_layers"]
TOLERANCE = 1e-4
CASES = {"dense": {}, "lsa": LSA, "lsa-own": {**LSA, "cli_factor": 1}}
MEMORISED = tokens(3, 54, seed=3, low=3)


@cache
def memorised(case: str) -> Any:
    """A model, n-grams and all, that knows ``MEMORISED`` by heart, and so does its draft block.

    The rate goes to zero: at a constant one the loss of the last steps jumps, and what a draft is depends on how a
    machine rounds. So it is sure of every token by 0.9."""
    torch.manual_seed(0)
    model = tiny(seed=8, **MTP, **CASES[case], mtp_loss_coef=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=80)
    for _ in range(80):
        optimizer.zero_grad()
        model(MEMORISED, labels=MEMORISED).loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@cache
def at_random(case: str) -> Any:
    return tiny(seed=8, **MTP, **CASES[case])


MODELS = pytest.mark.parametrize(
    ("make", "case"),
    [(memorised, "dense"), (memorised, "lsa"), (at_random, "lsa-own")],
    ids=lambda p: getattr(p, "__name__", p),
)


def serve(scheduler: Scheduler, requests: Sequence[Request]) -> list[Completion]:
    """Completions in the order of ``requests``, all of which wait from the beginning."""
    scheduler.submit(requests)
    while scheduler.busy:
        scheduler.step()
    done, scheduler.done = dict(scheduler.done), []
    return [done[r.id] for r in requests]


def crowd(seed: int, count: int = 24) -> list[Request]:
    """All lengths, temperatures and stops; some share their prompt; half of them begin as what is memorised does."""
    rng = Random(seed)
    prompts = [make_ids(rng, rng.choice((1, 2, rng.randint(3, 60)))) for _ in range(count // 4)]
    prompts += [tuple(MEMORISED[rng.randrange(3), : rng.randint(1, 40)].tolist()) for _ in range(count // 4)]
    return [
        Request(
            id=i,
            ids=rng.choice(prompts),
            sampling=Sampling(
                temperature=rng.choice((0.0, 0.3, 1.0, 1.0)),
                max_tokens=rng.randint(1, 30),
                stop_ids=tuple(rng.sample(range(3, 61), 2)),
                seed=seed * 1000 + i,
            ),
        )
        for i in range(count)
    ]


def next_turns(requests: Sequence[Request], answers: Sequence[Completion]) -> list[Request]:
    rng = Random(len(requests))
    more = [make_ids(rng, rng.randint(1, 9)) for _ in requests]
    turns = zip(requests, answers, more, strict=True)
    return [Request(id=r.id, ids=(*r.ids, *a.ids, *m), sampling=r.sampling) for r, a, m in turns]


def same(got: Sequence[Completion], want: Sequence[Completion]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.ids, a.versions, a.finish) == (b.ids, b.versions, b.finish)
        assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE)


# Which tokens


@MODELS
@pytest.mark.parametrize("steps", [1, STEPS])
def test_the_same_tokens_as_without_drafts(make: Any, steps: int, case: str) -> None:
    """More requests than slots; every conversation has a second turn, which continues a row where there is one."""
    model, requests = make(case), crowd(steps)
    plain, drafting = Scheduler(model, 10, 128), Scheduler(model, 10, 128, draft_steps=steps)
    for _ in range(2):
        want = serve(plain, requests)
        same(serve(drafting, requests), want)
        requests = next_turns(requests, want)
    assert drafting.counts.rounds > 100
    if make is memorised:
        assert drafting.counts.accepted[-1] > 20


def test_the_bounds_end_a_completion_where_they_did() -> None:
    """A draft must not run over the context or the number of tokens asked for."""
    model, prompt = memorised("lsa"), tuple(MEMORISED[0, :20].tolist())
    for max_tokens in range(1, 13):
        requests = [Request(id=0, ids=prompt, sampling=Sampling(temperature=0, max_tokens=max_tokens))]
        completion = serve(Scheduler(model, 2, 28, draft_steps=STEPS), requests)[0]
        want = MEMORISED[0, 20 : min(20 + max_tokens, 28)].tolist()
        assert (completion.ids, completion.finish) == (tuple(want), "length")
    stop = int(MEMORISED[0, 26])
    requests = [Request(id=0, ids=prompt, sampling=Sampling(temperature=0, max_tokens=30, stop_ids=(stop,)))]
    completion = serve(Scheduler(model, 2, 60, draft_steps=STEPS), requests)[0]
    assert (completion.ids, completion.finish) == (tuple(MEMORISED[0, 20:27].tolist()), "stop")


def test_weights_that_come_between_two_rounds() -> None:
    """As without drafts, when the new weights come at the same token: what is cached stays as it is."""
    old, new = memorised("lsa"), at_random("lsa")
    request = Request(id=0, ids=tuple(MEMORISED[1, :9].tolist()), sampling=Sampling(max_tokens=30, seed=4))

    def switched(steps: int, at: int) -> tuple[int, Completion]:
        model = tiny(seed=8, **MTP, **LSA)
        model.load_state_dict(old.state_dict())
        scheduler = Scheduler(model, 2, 64, draft_steps=steps)
        scheduler.submit([request])
        while not scheduler.slots[0].sampled >= at:
            scheduler.step()
        sampled = scheduler.slots[0].sampled
        model.load_state_dict(new.state_dict())
        scheduler.set_version(1)
        while scheduler.busy:
            scheduler.step()
        return sampled, scheduler.done[0][1]

    at, got = switched(STEPS, 8)
    assert got.versions == (0,) * at + (1,) * (30 - at)
    same([got], [switched(0, at)[1]])


def test_the_same_calls_give_the_same_bits() -> None:
    requests = crowd(5)
    first, second = (serve(Scheduler(memorised("lsa"), 6, 128, draft_steps=STEPS), requests) for _ in range(2))
    assert first == second


def test_sampled_frequencies_match_the_distribution() -> None:
    """Four tokens of a vocabulary of eight: the exact joint probability of every outcome is known."""
    model: Any = tiny(seed=1, vocab_size=8, **MTP)
    prompt, vocab, n = (3, 5, 4), 8, 4000
    requests = [Request(id=i, ids=prompt, sampling=Sampling(max_tokens=4, seed=i)) for i in range(n)]
    scheduler = Scheduler(model, 64, 16, draft_steps=STEPS)
    completions = serve(scheduler, requests)
    outcomes_N4 = torch.cartesian_prod(*[torch.arange(vocab)] * 4)
    ids_NT = torch.cat((torch.tensor(prompt).expand(len(outcomes_N4), -1), outcomes_N4), dim=1)
    with torch.no_grad():
        logp_N4V = model(ids_NT, use_cache=False).logits[:, 2:-1].log_softmax(-1)
    expected_N = n * logp_N4V.gather(2, outcomes_N4[..., None])[..., 0].sum(1).double().exp().numpy()
    counts_N = np.bincount([int("".join(map(str, c.ids)), vocab) for c in completions], minlength=vocab**4)
    often_N = expected_N >= 5
    seen = np.append(counts_N[often_N], counts_N[~often_N].sum())
    expected = np.append(expected_N[often_N], expected_N[~often_N].sum())
    assert len(seen) > 50 and scheduler.counts.accepted[0] > n / 20
    assert scipy.stats.chisquare(seen, expected * n / expected.sum()).pvalue > 1e-3


# What is drafted


def reference_drafts(model: Any, slot: Slot, count: int) -> list[int]:
    """Drafts for a slot from nothing but its tokens."""
    context, columns = torch.tensor([slot.context]), len(slot.context) + count
    cache: Any = SlotCache(1, columns)

    def inputs(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache.position_ids = positions
        return (torch.arange(columns) <= positions.unsqueeze(-1)).unsqueeze(1), positions

    mask, positions = inputs(torch.arange(context.shape[1] - 1)[None])
    out = model(context[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits, drafted = model.draft(out.last_hidden_state, context[:, 1:], mask, positions, cache)
    chosen, drafts = drafted.columns_BTK, [int(draw(logits[:, -1], [slot], [0])[0])]
    chosen = None if chosen is None else chosen[:, -1:]
    for step in range(1, count):
        mask, positions = inputs(torch.tensor([[context.shape[1] - 2 + step]]))
        if chosen is not None:
            chosen = torch.cat((chosen, positions[..., None].to(chosen.dtype)), dim=-1)
        logits, drafted = model.draft(
            drafted.hidden_BTH[:, -1:], torch.tensor([drafts[-1:]]), mask, positions, cache, chosen
        )
        drafts.append(int(draw(logits[:, -1], [slot], [step])[0]))
    return drafts


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every proposal is compared with one that is made from nothing but the tokens; the model of each comparison."""
    propose, models = Drafter.propose, list[Any]()

    def check(drafter: Drafter, model: Any, slots: Sequence[Slot]) -> list[list[int]]:
        drafts = propose(drafter, model, slots)
        for slot, draft in zip(slots, drafts, strict=True):
            if draft:
                assert draft == reference_drafts(model, slot, len(draft))
                models.append(model)
        return drafts

    monkeypatch.setattr(Drafter, "propose", check)
    return models


@MODELS
def test_drafts_are_those_of_a_fresh_cache(make: Any, case: str, checked: list[Any]) -> None:
    """Keys after accepted and rejected drafts, of followers, of continued rows: all as if computed anew."""
    requests, scheduler = crowd(7, 12), Scheduler(make(case), 6, 128, draft_steps=STEPS)
    serve(scheduler, next_turns(requests, serve(scheduler, requests)))
    assert len(checked) > 60


@pytest.mark.parametrize("case", ["dense", "lsa"])
def test_drafts_of_several_versions_are_those_of_a_fresh_cache(case: str, checked: list[Any]) -> None:
    """Half of the requests are pinned to the first version; the caches of the others are computed anew."""
    old, requests = deepcopy(memorised(case)), crowd(8, 12)
    pinned = [replace(r, sampling=replace(r.sampling, version=0 if r.id % 2 else None)) for r in requests]
    scheduler = Scheduler(old, 12, 128, draft_steps=STEPS, on_swap="recompute")
    scheduler.submit(pinned)
    for _ in range(2):
        scheduler.step()
    new = scheduler.set_version(1, keep=[0])
    new.load_state_dict(at_random(case).state_dict())
    while scheduler.busy:
        scheduler.step()
    done = dict(scheduler.done)
    assert min(checked.count(old), checked.count(new)) > 15
    want = serve(Scheduler(memorised(case), 12, 128, draft_steps=STEPS), requests)
    same([done[i] for i in range(1, 12, 2)], want[1::2])


# How many are accepted


class Counting(torch.nn.Module):
    """Passes on to a model and notes the tokens a row of every forward, of the model and of its draft block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.forwards: list[int] = []
        self.drafts: list[int] = []

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        """The model's own."""
        self.forwards.append(input_ids.shape[1])
        return self.model(input_ids=input_ids, **rest)

    def draft(self, hidden_BTH: torch.Tensor, *rest: Any) -> Any:
        """The model's own."""
        self.drafts.append(hidden_BTH.shape[1])
        return self.model.draft(hidden_BTH, *rest)


@pytest.mark.parametrize("case", ["dense", "lsa"])
def test_a_draft_that_is_always_right_gives_its_steps_and_one_more_a_round(case: str) -> None:
    model = Counting(memorised(case))
    scheduler, rounds = Scheduler(model, 4, 128, draft_steps=STEPS), 5
    first = Request(
        id=0, ids=tuple(MEMORISED[2, :20].tolist()), sampling=Sampling(temperature=0, max_tokens=1 + 4 * rounds)
    )
    (answer,) = serve(scheduler, [first])
    assert answer.ids == tuple(MEMORISED[2, 20 : 21 + 4 * rounds].tolist())
    assert scheduler.counts == DraftCounts(rounds=5, tokens=20, proposed=[5] * 3, accepted=[5] * 3)
    assert model.forwards == [20, *[4] * rounds]
    # The prompt's keys; then the first column has one state, later rounds have all that were accepted.
    assert model.drafts == [19, 1, 1, 1, *[4, 1, 1] * (rounds - 1)]
    # The next turn reads what the model has not, and drafts what the block has not: the columns of the last round.
    ids = (*first.ids, *answer.ids, *MEMORISED[2, 41:44].tolist())
    before, model.forwards, model.drafts = model.forwards, [], []
    (answer,) = serve(scheduler, [Request(id=1, ids=ids, sampling=Sampling(temperature=0, max_tokens=9))])
    assert answer.ids == tuple(MEMORISED[2, 44:53].tolist())
    assert (len(before), model.forwards, model.drafts) == (6, [4, 4, 4], [7, 1, 1, 1, 4, 1, 1])


def test_a_draft_that_ends_with_a_stop_token_counts_up_to_it() -> None:
    """The stop token was drafted second: two of three drafts became tokens."""
    ids, stop = tuple(MEMORISED[0, :20].tolist()), int(MEMORISED[0, 22])
    scheduler = Scheduler(memorised("dense"), 1, 64, draft_steps=STEPS)
    sampling = Sampling(temperature=0, max_tokens=20, stop_ids=(stop,))
    assert serve(scheduler, [Request(id=0, ids=ids, sampling=sampling)])[0].finish == "stop"
    assert scheduler.counts == DraftCounts(rounds=1, tokens=2, proposed=[1, 1, 1], accepted=[1, 1, 0])


def test_a_draft_that_knows_nothing_is_seldom_accepted() -> None:
    scheduler = Scheduler(at_random("dense"), 16, 64, draft_steps=STEPS)
    requests = [Request(id=i, ids=make_ids(Random(i), 20), sampling=Sampling(max_tokens=30, seed=i)) for i in range(40)]
    completions = serve(scheduler, requests)
    counts = scheduler.counts
    assert counts.tokens == sum(counts.accepted) + counts.rounds
    assert counts.tokens <= sum(len(c.ids) - 1 for c in completions)
    assert counts.tokens / counts.rounds < 1.5
    assert counts.accepted[0] > counts.accepted[1] > counts.accepted[2]


def test_rates_since_an_earlier_count() -> None:
    earlier = DraftCounts(rounds=10, tokens=20, proposed=[10, 8], accepted=[6, 4])
    later = DraftCounts(rounds=20, tokens=45, proposed=[20, 16], accepted=[15, 10])
    want = {"draft/tokens_per_round": 2.5, "draft/accepted_1": 0.9, "draft/accepted_2": 0.75}
    assert later.since(earlier) == want
    assert earlier.since(earlier) == {}
    assert earlier.since(DraftCounts()) == {
        "draft/tokens_per_round": 2.0, "draft/accepted_1": 0.6, "draft/accepted_2": 0.5,
    }  # fmt: skip


# The engine


@pytest.mark.parametrize(("kind", "there"), [("longcat2", 0), ("longcat2", 2), ("llama", 0)])
def test_a_model_without_such_a_draft_block_is_refused(kind: str, there: int) -> None:
    model = make_model(kind, mtp_num_layers=there) if there else make_model(kind)
    cure = f"drafts {there} tokens at the most .* set engine.draft_steps to {there}, or train a model with a larger mtp"
    with pytest.raises(ValueError, match="engine.draft_steps: 3, but this model " + cure):
        Scheduler(model, 2, 64, draft_steps=3)


def test_the_engine_says_what_it_refuses(tmp_path: Path) -> None:
    make_model("longcat2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"set engine\.draft_steps to 0"):
        asyncio.run(LocalEngine.start(tmp_path, timeout_s=60, draft_steps=1))


def test_the_engine_counts_and_its_logprobs_are_the_trainers(tmp_path: Path) -> None:
    model = memorised("lsa")
    model.save_pretrained(tmp_path)
    requests = crowd(3)

    async def scenario() -> tuple[list[Completion], DraftCounts]:
        engine = await LocalEngine.start(tmp_path, slots=8, max_context=128, timeout_s=60, draft_steps=STEPS)
        hot = [(r.ids, Sampling(max_tokens=r.sampling.max_tokens, seed=r.id)) for r in requests]
        completions = await asyncio.gather(*(engine.generate(ids, sampling) for ids, sampling in hot))
        counts = engine.stats()
        await engine.close()
        return completions, counts

    completions, counts = asyncio.run(scenario())
    pairs = [(r.ids, c) for r, c in zip(requests, completions, strict=True)]
    assert trainer_gap(trainer_of(deepcopy(model)), pairs) < TOLERANCE
    assert counts.rounds > 100 and counts.accepted[2] > 10
