"""The connection between trainer and servers: every byte arrives, and whoever is left alone says so."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from posttrain.engine import transfer
from posttrain.engine.transfer import Layout, Link, Lost, layout_of

CPU = torch.device("cpu")


def tensors() -> list[tuple[str, Tensor]]:
    """Of every kind that a model may have."""
    torch.manual_seed(0)
    return [
        ("matrix", torch.randn(30, 17)),
        ("scalar", torch.tensor(3)),
        ("turned", torch.randn(7, 3).T.to(torch.bfloat16)),
        ("nothing", torch.zeros(0, 4)),
        ("flags", torch.rand(5) > 0.5),
        ("nan", torch.tensor([float("nan"), -0.0])),
        ("large", torch.randn(300, 9, dtype=torch.float64)),
    ]


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def ends(folder: Path, size: int, use: Callable[[Link, int], object]) -> list[object]:
    """What ``use`` gives at each end of a connection."""

    def end(rank: int) -> object:
        link = Link(folder / "meeting", rank, size, CPU, 20, True)
        try:
            return use(link, rank)
        finally:
            link.close()
            link.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(end, range(size)))


@pytest.mark.parametrize("bucket", [1, 600, 1 << 28])
@pytest.mark.parametrize("size", [2, 3])
def test_all_arrives_bit_for_bit(bucket: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET", bucket)
    sent = tensors()

    def use(link: Link, rank: int) -> list[tuple[str, torch.dtype, torch.Size, list[int]]]:
        got = list[tuple[str, Tensor]]()
        for _ in range(2):  # again on the same connection
            if rank == 0:
                link.send(sent)
            got += sent if rank == 0 else link.receive(layout_of(sent))
        return [(name, t.dtype, t.shape, bits(t)) for name, t in got]

    found = ends(tmp_path, size, use)
    assert found[1:] == [found[0]] * (size - 1)


def test_buckets_hold_what_they_may_and_a_larger_tensor_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 16 bytes is the least that a tensor takes."""
    monkeypatch.setattr(transfer, "BUCKET", 64)
    sizes = [4, 12, 1, 40, 4, 4]  # float32: 16, 48, 16, 160, 16, 16 bytes
    layout = [Layout(str(i), "float32", [n]) for i, n in enumerate(sizes)]
    assert list(transfer._buckets(layout)) == [(0, 2, 64), (2, 3, 16), (3, 4, 160), (4, 6, 32)]
    assert transfer._spans(layout[:3]) == [(0, 16), (16, 64), (64, 68)]
    assert list(transfer._buckets([])) == []


def _vanish(meeting: Path) -> None:
    """When it is told to: else the other end might still be connecting."""
    Link(meeting, 1, 2, CPU, 60, True)
    told, until = meeting.with_name("vanish"), time.monotonic() + 60
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os._exit(1)


def test_an_end_that_dies_is_noticed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_vanish, args=(tmp_path / "meeting",))
    process.start()
    link = Link(tmp_path / "meeting", 0, 2, CPU, 120, True)
    (tmp_path / "vanish").touch()
    process.join()
    start = time.monotonic()
    with pytest.raises(Lost):
        link.send(tensors())
    assert time.monotonic() - start < 60  # of the 120 that it may wait
    link.close()


def test_whoever_waits_in_vain_ends(tmp_path: Path) -> None:
    with pytest.raises(Lost, match=r"not all of 2 ends came to .*meeting"):
        Link(tmp_path / "meeting", 0, 2, CPU, 0.2, True)


def test_whoever_waits_can_be_told_to_stop(tmp_path: Path) -> None:
    given_up = threading.Event()
    threading.Timer(0.2, given_up.set).start()
    start = time.monotonic()
    with pytest.raises(Lost):
        Link(tmp_path / "meeting", 0, 2, CPU, 60, True, given_up)
    assert time.monotonic() - start < 10


def test_it_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}

    def use(link: Link, rank: int) -> set[str]:
        listening = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
        return {address.ip for address in listening - before}

    assert ends(tmp_path, 2, use)[0] == {"127.0.0.1"}


def test_two_ends_without_gpus_of_their_own_use_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL refuses two ends on one GPU, so the places decide, which are the same here."""
    monkeypatch.setattr(transfer, "_place", lambda device: f"{socket.gethostname()} GPU-1")
    assert ends(tmp_path, 2, lambda link, rank: link.by_nccl) == [False, False]
