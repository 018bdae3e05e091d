"""Say words under rules that a program can check, one checker a rule, as IFEval does: any text that keeps every rule is
right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from envs.words import THINGS
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, TextSession, WorldOptions, say, user
from posttrain.types import Limits, Task

Checker = Callable[[Sequence[str], Sequence[str], Any], bool]
"""From the answer's words, the words that the task listed, and the rule's argument."""


def _listed(words: Sequence[str], listed: Sequence[str]) -> list[str]:
    return [w for w in words if w in listed]


def in_order(words: Sequence[str], listed: Sequence[str], _: Any) -> bool:
    """The listed words stand in their order, each once."""
    return _listed(words, listed) == list(listed)


def backwards(words: Sequence[str], listed: Sequence[str], _: Any) -> bool:
    """The listed words stand in reverse order, each once."""
    return _listed(words, listed) == list(reversed(listed))


def times(words: Sequence[str], listed: Sequence[str], n: Any) -> bool:
    """Every listed word occurs exactly ``n`` times."""
    return all(words.count(w) == n for w in listed)


def some(words: Sequence[str], listed: Sequence[str], n: Any) -> bool:
    """Exactly ``n`` of the listed words occur, none twice, in any order."""
    found = _listed(words, listed)
    return len(found) == len(set(found)) == n


def end(words: Sequence[str], listed: Sequence[str], word: Any) -> bool:
    """The answer's last word is ``word``, and it stands nowhere else."""
    return bool(words) and words[-1] == word and words.count(word) == 1


def start(words: Sequence[str], listed: Sequence[str], word: Any) -> bool:
    """The answer's first word is ``word``, and it stands nowhere else."""
    return bool(words) and words[0] == word and words.count(word) == 1


BASES: Mapping[str, Checker] = {"in_order": in_order, "backwards": backwards, "times": times, "some": some}
"""What to say: every task has one of these."""
EXTRAS: Mapping[str, Checker] = {"end": end, "start": start}
"""What else must hold: at most one of these. ``commas`` is the other, a rule on the text and not on its words."""


def words_of(text: str, commas: bool) -> list[str] | None:
    """The words of ``text`` if they are separated as asked (by commas, a space after them allowed; else by one
    space), or None.
    """
    pattern = r"[a-z]+(?:, ?[a-z]+)*" if commas else r"[a-z]+(?: [a-z]+)*"
    return re.findall(r"[a-z]+", text) if re.fullmatch(pattern, text) else None


def keeps(text: str, rules: Mapping[str, Any]) -> bool:
    """Whether ``text`` keeps every rule, and holds no word that the task did not name.

    ``rules`` has ``listed``, ``base``, ``n``, and where asked ``extra`` with ``word``, and ``commas``.
    """
    words = words_of(text, bool(rules.get("commas")))
    if words is None:
        return False
    listed: list[str] = rules["listed"]
    named = {*listed, rules["word"]} if rules.get("extra") else set(listed)
    if not set(words) <= named or not BASES[rules["base"]](words, listed, rules.get("n")):
        return False
    return not rules.get("extra") or EXTRAS[rules["extra"]](words, listed, rules["word"])


def render(rules: Mapping[str, Any]) -> str:
    """An answer that keeps ``rules``."""
    listed: list[str] = rules["listed"]
    match rules["base"]:
        case "backwards":
            words = list(reversed(listed))
        case "times":
            words = listed * rules["n"]
        case "some":
            words = listed[: rules["n"]]
        case _:
            words = list(listed)
    match rules.get("extra"):
        case "end":
            words.append(rules["word"])
        case "start":
            words.insert(0, rules["word"])
    return ("," if rules.get("commas") else " ").join(words)


def phrase(rules: Mapping[str, Any]) -> str:
    """The request in words."""
    listed = " ".join(rules["listed"])
    match rules["base"]:
        case "backwards":
            text = f"list {listed} backwards"
        case "times":
            text = f"say {listed} {rules['n']} times"
        case "some":
            text = f"name {rules['n']} of {listed}"
        case _:
            text = f"list {listed}"
    if rules.get("commas"):
        text += " with commas"
    if rules.get("extra"):
        text += f" {rules['extra']} with {rules['word']}"
    return text


class RulesConfig(WorldOptions):
    """Options of the rules."""

    type: Literal["rules"] = "rules"
    max_words: int = Field(default=4, ge=3, le=8)
    """Most words in a list."""
    max_times: int = Field(default=4, ge=2, le=8)
    """Most times a word must be said."""
    combined: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of tasks with two rules."""


class Rules(ScriptedWorld):
    """``list ash fig elm backwards end with oak`` -> ``elm fig ash oak``."""

    kind: ClassVar[str] = "rules"
    domain = "interaction"
    limits = Limits(max_turns=1, max_tokens=48, timeout_s=60.0)

    def __init__(self, config: RulesConfig, name: str = "rules") -> None:
        super().__init__(name, config.habit)
        self.config = config

    def draft(self, rng: Random) -> Draft:
        """One rule, or two: a base that is a rule itself, or the plain list with an extra one, or both."""
        base = rng.choice(("backwards", "times", "some", "in_order", "in_order"))
        count = 1 if base == "times" else rng.randint(3, self.config.max_words)
        *listed, word = rng.sample(THINGS, count + 1)
        rules: dict[str, Any] = {"listed": listed, "base": base}
        if base == "times":
            rules["n"] = rng.randint(2, self.config.max_times)
        elif base == "some":
            rules["n"] = rng.randint(2, count - 1)
        two = rng.random() < self.config.combined
        extras = ["commas", rng.choice(("end", "start"))]
        rng.shuffle(extras)
        for extra in extras[: (base == "in_order") + two]:
            rules |= {"commas": True} if extra == "commas" else {"extra": extra, "word": word}
        text = phrase(rules)
        return Draft(content=text, key=text, prompt=(user(text),), data=rules, difficulty=1.0 + two)

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Leaving out one of the rules, saying everything in plain order, or only agreeing."""
        return (*(f"no_{rule}" for rule in _named(task.data)), "plain", "agrees")

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """``no_<rule>`` keeps the others."""
        rules = task.data
        match habit:
            case "good":
                yield say(render(rules))
            case "agrees":
                yield say("ok")
            case "plain":
                yield say(render({"listed": rules["listed"], "base": "in_order"}))
            case "no_commas" | "no_end" | "no_start":
                dropped = "commas" if habit == "no_commas" else "extra"
                yield say(render({**rules, dropped: None}))
            case "no_backwards" | "no_times" | "no_some":
                yield say(render({**rules, "base": "in_order"}))
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> TextSession:
        """Every rule is checked by itself on the text."""
        return TextSession(lambda text: keeps(text, task.data))


def _named(rules: Mapping[str, Any]) -> list[str]:
    names = [] if rules["base"] == "in_order" else [rules["base"]]
    return [*names, *(["commas"] if rules.get("commas") else []), *([rules["extra"]] if rules.get("extra") else [])]
