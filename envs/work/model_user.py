"""A user whose words are a model's.

The script decides (``users.ScriptedUser``): what is wanted, in which parts, what is kept back until it is asked for,
when the user is content and when it leaves. So a score means the same whoever speaks. The model says it: it is told
what to say next and shown the conversation, and what it answers is taken if it tells all that it must and nothing that
it must not. After ``tries`` answers that do not, the script's own words stand: a task is never unsolvable because a
user could not speak. What it says hangs on the conversation alone, so equal conversations are answered alike.

The engine lives in a thread with an event loop of its own, because a world is used from one event loop after another.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from envs.work.users import Line, ModelUserConfig
from posttrain.errors import EngineError
from posttrain.types import Completion, Sampling

if TYPE_CHECKING:
    from posttrain.protocols import Engine

log = logging.getLogger(__name__)

_CLOSE_S = 15.0
"""More than the engine's own bound on ending its process."""
_ASK = (
    "You play the user of a service and talk to its agent. You wanted: {wanted}\n"
    "The conversation so far:\n{talk}\n"
    "Say to the agent, in your own words and in one sentence: {line}\nAnswer with that sentence alone."
)

T = TypeVar("T")


def instruction(wanted: str, talk: Sequence[tuple[str, str]], line: Line) -> str:
    """What the model is asked. ``talk``: pairs of who and what."""
    told = "\n".join(f"{who}: {text}" for who, text in talk)
    return _ASK.format(wanted=wanted, talk=told, line=line.text)


def marks_of(tokenizer: Any) -> re.Pattern[str]:
    """Whatever was added to the vocabulary: Qwen3 does not call its tokens for thinking and tools special."""
    marks = {t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()}
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")


class _Served:
    """A tokenizer, and an engine in a thread of its own."""

    def __init__(self, config: ModelUserConfig) -> None:
        # Here and not above: checking a config must not import torch.
        from transformers import AutoTokenizer, GenerationConfig

        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.path)
        try:
            stops = GenerationConfig.from_pretrained(config.path).eos_token_id
        except OSError:  # a folder without generation_config.json
            stops = None
        ends = stops if isinstance(stops, list) else [stops]
        self.stop_ids = tuple(sorted({i for i in (*ends, self.tokenizer.eos_token_id) if i is not None}))
        self._marks = marks_of(self.tokenizer)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="posttrain-user")
        self._thread.start()
        self.end: Callable[[], Any] = self.close
        try:
            # Starting is bounded by the engine itself, and so is the clearing up after it.
            self.engine: Engine = self.submit(self._start(config)).result(config.engine.timeout_s + _CLOSE_S)
        except BaseException:
            self.loop.call_soon_threadsafe(self.loop.stop)
            raise

    async def _start(self, config: ModelUserConfig) -> Engine:
        from posttrain.engine.start import start_engine

        return await start_engine(config.engine, config.path, config.path)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``work`` in the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def encode(self, text: str) -> list[int]:
        """Ids up to where the model answers. Markup in ``text``, which holds the agent's words, is taken out: the
        template's encoding would make turns of it."""
        while self._marks.search(text):
            text = self._marks.sub("", text)
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=False
        )

    def close(self) -> None:
        """End the process and the thread."""
        ending = self.submit(self.engine.close())
        if threading.current_thread() is not self._thread:  # a garbage collector runs anywhere
            # RuntimeError: at the interpreter's exit no thread waits for the process, which has been told to end.
            with suppress(RuntimeError, TimeoutError):
                ending.result(_CLOSE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)


class ModelUser:
    """One model for all sessions of a world; started at the first use, ended with the world or the process."""

    def __init__(self, config: ModelUserConfig) -> None:
        self.config = config
        self.spoke = self.fell_back = 0
        """Lines that the model said, and lines that the script had to."""
        self._served: _Served | None = None
        self._lock = threading.Lock()

    async def start(self) -> None:
        """Have the model ready. Raises EngineError if it cannot be had."""
        await asyncio.to_thread(self._serve)

    async def say(self, wanted: str, talk: Sequence[tuple[str, str]], line: Line, within_s: float) -> str:
        """``line`` in the model's words, or in the script's. Raises EngineError if the model died since ``start``, or
        took longer."""
        served = self._served
        if served is None:
            raise EngineError("the model that plays the user died; the next session has another one")
        try:
            async with asyncio.timeout(within_s):
                return await self._say(served, instruction(wanted, talk, line), line)
        except (EngineError, TimeoutError) as error:
            await asyncio.shield(asyncio.to_thread(self._give_up, served))
            raise EngineError(f"the model that plays the user: {error or 'no answer in time'}") from error

    async def _say(self, served: _Served, text: str, line: Line) -> str:
        ids = served.encode(text)
        for attempt in range(self.config.tries):
            seed = int.from_bytes(hashlib.sha256(f"{attempt}\n{text}".encode()).digest()[:8], "big") >> 1
            sampling = Sampling(
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                stop_ids=served.stop_ids,
                seed=seed,
            )
            done: Completion = await asyncio.wrap_future(served.submit(served.engine.generate(ids, sampling)))
            words = " ".join(served.tokenizer.decode(list(done.ids), skip_special_tokens=True).split())
            if done.finish == "stop" and line.said_by(words):
                self.spoke += 1
                return words
        self.fell_back += 1
        log.info("the model user did not say it in %d tries, the script does: %s", self.config.tries, line.text)
        return line.text

    def _serve(self) -> _Served:
        with self._lock:
            if self._served is None:
                self._served = _Served(self.config)
                self._served.end = weakref.finalize(self, self._served.close)
            return self._served

    def _give_up(self, served: _Served) -> None:
        """The next session starts another engine."""
        with self._lock:
            if self._served is served:
                self._served = None
        served.end()  # that one's: there may be another by now


__all__ = ["ModelUser", "instruction"]
