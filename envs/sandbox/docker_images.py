"""Images from folders, named by what is in them, so that nothing is built twice and a name never lies."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from pathlib import Path

import requests
from docker import DockerClient
from docker.errors import BuildError, DockerException, ImageNotFound

from envs.sandbox.docker_engine import connect
from posttrain.errors import ConfigError, SandboxError

_BUILD_S = 1800
"""For one step of a build to say something, and for another thread's build of the same folder."""
_building: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""By tag: two tasks with the same folder wait for one build."""


def image_tag(folder: Path) -> str:
    """``posttrain-task:<digest>`` of the names, the executable bits and the contents below ``folder``.

    Raises ConfigError if it has no Dockerfile.
    """
    if not (folder / "Dockerfile").is_file():
        raise ConfigError(f"{folder}: no Dockerfile in it; write one (FROM posttrain-base, ...)")
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            kind, content = b"link", os.readlink(path).encode()
        elif path.is_file():
            kind, content = b"program" if os.access(path, os.X_OK) else b"file", path.read_bytes()
        else:
            continue
        for part in (str(path.relative_to(folder)).encode(), kind, content):
            digest.update(len(part).to_bytes(8, "little") + part)
    return f"posttrain-task:{digest.hexdigest()[:32]}"


def build_image(folder: Path, host: str | None = None) -> str:
    """The tag of the image of ``folder`` on the engine at ``host``, built there if it is missing; blocks.

    Its base must be there: nothing is pulled that the Dockerfile does not name. Raises ConfigError with the end of the
    log if the Dockerfile does not build, SandboxError if the engine fails.
    """
    tag = image_tag(folder)
    client = connect(host, _BUILD_S)
    building = _building[tag]
    if not building.acquire(timeout=_BUILD_S):
        raise SandboxError(f"image of {folder}: its build in this process does not end within {_BUILD_S} s")
    try:
        client.images.get(tag)
    except ImageNotFound:
        _build(client, folder, tag)
    except (DockerException, requests.RequestException) as error:
        raise SandboxError(f"image of {folder}: {error}") from error
    finally:
        building.release()
        client.close()
    return tag


def _build(client: DockerClient, folder: Path, tag: str) -> None:
    try:
        client.images.build(path=str(folder), tag=tag, rm=True, forcerm=True)
    except BuildError as error:
        log = "".join(line.get("stream") or line.get("error") or "" for line in error.build_log)
        raise ConfigError(f"{folder / 'Dockerfile'} does not build: {error.msg}\n{log[-2000:]}") from error
    except (DockerException, requests.RequestException) as error:
        raise SandboxError(f"image of {folder}: {error}") from error


__all__ = ["build_image", "image_tag"]
