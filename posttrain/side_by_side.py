"""Several micro-batches at the same time, each in a thread of its own, on the cores of a CPU.

Threads within an operation (``trainer.threads``) wait for each other after every one of them, also for a core that the
engine has at the moment. Micro-batches have nothing to wait for until the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class SideBySide:
    """Threads that compute gradients. Not those of an executor, which a process waits for when it ends, though one
    hangs."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._work = SimpleQueue[Callable[[], None] | None]()
        for number in range(count):
            Thread(target=self._go_on, daemon=True, name=f"micro-batch-{number}").start()

    def _go_on(self) -> None:
        while (job := self._work.get()) is not None:
            job()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = Future[T]()

        def job() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(job)
        return future

    def accumulate(
        self, parameters: Sequence[nn.Parameter], losses: Sequence[Callable[[], tuple[Tensor, T]]]
    ) -> Iterator[T]:
        """Adds the gradient of each loss to the parameters', and yields what came with it. In the order of the losses,
        so that sums are those of one thread, bit for bit. Raises what a loss raises, when the others have ended."""

        def work(loss: Callable[[], tuple[Tensor, T]]) -> tuple[Sequence[Tensor | None], T]:
            total, rest = loss()
            return torch.autograd.grad(total, parameters, allow_unused=True), rest

        def add() -> T:
            grads, rest = begun.popleft().result()
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            return rest

        # No more of them than there are threads, ended ones too: each has gradients that are still to be added.
        begun = deque[Future[tuple[Sequence[Tensor | None], T]]]()
        try:
            for loss in losses:
                if len(begun) == self._count:
                    yield add()
                begun.append(self._submit(partial(work, loss)))
            while begun:
                yield add()
        finally:
            for other in begun:
                other.exception()

    def close(self) -> None:
        """The threads end after what they are at; idempotent."""
        for _ in range(self._count):
            self._work.put(None)


__all__ = ["SideBySide"]
