"""How a policy's weights travel: through a shared-memory block on one machine, or through a folder.

Both sides derive the layout from the model itself (``state_dict`` order), so nothing but the bytes is sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.files import no_room

SHM = "shm:"
_ALIGN = 64


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=False).items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            out[name] = tensor
    return out


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in state_of(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class SharedWeights:
    """One block that holds a whole state dict. The creator unlinks it on ``close``."""

    def __init__(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        self._offsets: dict[str, int] = {}
        size = 0
        for key, tensor in state.items():
            self._offsets[key] = size
            size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        self._owner = name is None
        # The tracker process is shared with spawned children, so an attached block is registered once, as it should be.
        self._memory = SharedMemory(name=name, create=self._owner, size=max(size, 1))
        if self._owner and Path("/dev/shm").is_dir():
            self._claim(max(size, 1))
        self.name = self._memory.name

    def _claim(self, size: int) -> None:
        """Have the memory now: a write to memory that is not to be had later would be a bus error."""
        fd = os.open(f"/dev/shm/{self._memory.name.lstrip('/')}", os.O_RDWR)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if not no_room(error):  # a file system that cannot promise memory
                return
            self.close()
            raise UserError(
                f"/dev/shm: there is no room for {size / 2**20:.0f} MiB of weights that trainer and engine share. Make "
                "it larger: mount -o remount,size=, or docker run --shm-size="
            ) from None
        finally:
            os.close(fd)

    def _view(self, key: str, like: Tensor) -> Tensor:
        return torch.frombuffer(self._memory.buf, dtype=like.dtype, count=like.numel(), offset=self._offsets[key]).view(
            like.shape
        )

    @torch.no_grad()
    def write(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` in; same names and shapes as at creation."""
        for key, tensor in state.items():
            if tensor.numel():
                self._view(key, tensor).copy_(tensor)

    @torch.no_grad()
    def read(self, state: Mapping[str, Tensor]) -> None:
        """Copy out into the tensors of ``state``, in place."""
        for key, tensor in state.items():
            if tensor.numel():
                tensor.copy_(self._view(key, tensor))

    def close(self) -> None:
        """Detach, and remove the block if this side made it."""
        self._memory.close()
        if self._owner:
            self._memory.unlink()
            self._owner = False


def read_into(model: nn.Module, where: str) -> None:
    """Load weights from ``where`` (see ``types.Weights``) into ``model``, in place."""
    state = state_of(model)
    if where.startswith(SHM):
        shared = SharedWeights(state, name=where.removeprefix(SHM))
        try:
            shared.read(state)
        finally:
            shared.close()
        return
    from posttrain.model.checkpoint import load_any

    loaded = state_of(load_any(Path(where), next(model.parameters()).dtype))
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(loaded[key])
