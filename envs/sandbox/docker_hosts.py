"""Which engine gets the next container: of those that answer, the one with the fewest running a processor."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import requests
from docker import DockerClient
from docker.errors import DockerException

from envs.sandbox.docker_engine import HTTP_TIMEOUT_S, connect
from posttrain.errors import ConfigError, SandboxError

_ASK_S = 10.0
"""For an engine's answer about its load."""

_lock = threading.Lock()
_starting: Counter[str | None] = Counter()
"""Containers that this process is starting on each engine: the engine does not count them yet."""


@contextlib.contextmanager
def least_loaded(hosts: Sequence[str | None]) -> Iterator[tuple[DockerClient, str | None]]:
    """A client of the engine to use, and its name; counted as busier while the block lasts; closed if the block raises.

    Raises SandboxError if none answers.
    """
    client, host = _pick(hosts)
    try:
        yield client, host
    except BaseException:
        client.close()
        raise
    finally:
        with _lock:
            _starting[host] -= 1


def _pick(hosts: Sequence[str | None]) -> tuple[DockerClient, str | None]:
    if len(hosts) == 1:
        try:
            answering = [(0.0, 1.0, hosts[0], connect(hosts[0]))]
        except ConfigError as error:  # it answered when the run began: it may come back, so no mistake of the config's
            raise SandboxError(str(error)) from error
    else:
        answering = _ask(hosts)
    with _lock:
        _, _, host, client = best = min(answering, key=lambda one: (one[0] + _starting[one[2]]) / one[1])
        _starting[host] += 1
    for other in answering:
        if other is not best:
            other[3].close()
    return client, host


def _ask(hosts: Sequence[str | None]) -> list[tuple[float, float, str | None, DockerClient]]:
    """Running containers, processors, name and client of each engine that answers."""
    answering, silent = [], []
    for host in hosts:
        try:
            client = connect(host, _ASK_S)
            info = client.info()
        except (ConfigError, DockerException, requests.RequestException) as error:
            silent.append(f"{host}: {error}")
            continue
        client.api.timeout = HTTP_TIMEOUT_S
        answering.append((info["ContainersRunning"], info["NCPU"], host, client))
    if not answering:
        raise SandboxError(f"no engine of sandbox.hosts answers: {'; '.join(silent)}")
    return answering


__all__ = ["least_loaded"]
