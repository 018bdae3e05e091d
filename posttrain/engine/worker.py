"""The process behind ``LocalEngine``: requests and weights come by a pipe, between two steps of its ``Scheduler``."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import nn

from posttrain.engine.batching import Scheduler
from posttrain.errors import UserError
from posttrain.weights import read_into


def load_model(folder: str) -> nn.Module:
    """Any causal LM in a Hugging Face folder, ours included."""
    from posttrain.model.checkpoint import load_any

    return load_any(folder, torch.float32)


def _read(pipe: Connection, inbox: SimpleQueue[tuple[Any, ...]]) -> None:
    """Empties the pipe at all times: an owner that writes while this process writes would wait forever."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        inbox.put(("close",))


def _report(scheduler: Scheduler, pipe: Connection) -> None:
    """Send what has ended, and forget it."""
    if scheduler.done or scheduler.failed:
        pipe.send(("ended", scheduler.done, scheduler.failed, scheduler.counts))
        scheduler.done, scheduler.failed = [], []


def main(
    pipe: Connection,
    folder: str,
    num_slots: int,
    max_context: int,
    threads: int,
    draft_steps: int = 0,
    record_choices: bool = False,
    on_swap: Literal["keep", "recompute"] = "keep",
    compiling: bool = False,
) -> None:
    """Serve requests from ``pipe`` until it closes. A closed pipe means that the owner is gone, however it went."""
    torch.set_num_threads(threads)
    model = load_model(folder)
    try:
        scheduler = Scheduler(model, num_slots, max_context, draft_steps, record_choices, on_swap, compiling)
    except (ValueError, UserError) as error:
        pipe.send(("refused", str(error)))
        return
    scheduler.warm_up()
    pipe.send(("ready",))
    inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    try:
        while True:
            while not scheduler.busy or not inbox.empty():
                kind, *rest = inbox.get()
                if kind == "generate":
                    scheduler.submit(rest[0])
                elif kind == "load":
                    key, weights, keep = rest
                    read_into(scheduler.set_version(weights.version, keep), weights.where)
                    pipe.send(("loaded", key, tuple(scheduler.resident)))
                elif kind == "forget":
                    scheduler.forget(rest[0])
                elif kind == "close":
                    return
                _report(scheduler, pipe)
            scheduler.step()
            _report(scheduler, pipe)
    except (ConnectionError, KeyboardInterrupt):
        return
