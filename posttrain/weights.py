"""How a policy's weights travel: through a shared-memory block on one machine, through a folder that holds all of them
or an adapter, or held in this process for an engine that sends them itself.

Of a block both sides derive the layout from the model itself (``state_dict`` order), so nothing but the bytes is sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.files import needs_room, new_folder, no_room, remove

SHM, HELD = "shm:", "held:"
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


def merged_state_of(model: Any) -> dict[str, Tensor]:
    """What ``state_of`` would give of the plain model with the adapters of this one, peft's, added in."""
    state: dict[str, Tensor] = {}
    prefix = "base_model.model."
    layers = dict(model.named_modules())
    for name, tensor in state_of(model).items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix(prefix)
        if ".base_layer." in plain:
            if plain.endswith(".base_layer.weight"):
                tensor = tensor + layers[name.rsplit(".base_layer.", 1)[0]].get_delta_weight("default")
            plain = plain.replace(".base_layer.", ".")
        state[plain] = tensor.detach()
    return state


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


class Published(Protocol):
    """What an outlet needs of the trainer."""

    version: int

    def weights(self) -> Mapping[str, Tensor]:
        """The policy's state dict as the engine's model has it."""
        ...

    def plain_weights(self) -> Mapping[str, Tensor]:
        """What ``save_policy`` would save: the names and shapes that other systems know."""
        ...

    def save_policy(self, folder: Path) -> None:
        """The policy in Hugging Face format."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """What is trained beside the base, in peft's format."""
        ...


class Outlet(Protocol):
    """Where the trainer puts its weights for an engine."""

    def put(self, policy: Published) -> str:
        """Put the weights there; returns ``types.Weights.where``. The engine must have taken the last ones before."""
        ...

    def close(self) -> None:
        """Take away what nobody needs any more; idempotent."""
        ...


class SharedOutlet:
    """One block, written over every time: for an engine on the same machine."""

    def __init__(self) -> None:
        self._shared: SharedWeights | None = None

    def put(self, policy: Published) -> str:
        """See ``Outlet``."""
        state = policy.weights()
        if self._shared is None:
            self._shared = SharedWeights(state)
        self._shared.write(state)
        return SHM + self._shared.name

    def close(self) -> None:
        """See ``Outlet``."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


class FolderOutlet:
    """A folder a version under ``root``, the last ``last`` of them: a server that starts anew reads them again."""

    def __init__(self, root: Path, *, last: int = 2, adapters: bool = False) -> None:
        self.root, self._last, self._adapters = root, last, adapters
        # Those that a process left which was killed go first.
        left = [p for p in root.glob("v*") if p.name[1:].isdigit()]
        self._there = sorted(left, key=lambda p: int(p.name[1:]))

    def put(self, policy: Published) -> str:
        """See ``Outlet``."""
        path = self.root / f"v{policy.version}"
        with needs_room(path), new_folder(path) as partial:
            if self._adapters:
                policy.save_adapter(partial)
            else:
                policy.save_policy(partial)
        self._there = [*(p for p in self._there if p != path), path]
        for old in self._there[: -self._last]:
            remove(old)
        self._there = self._there[-self._last :]
        return str(path.resolve())

    def close(self) -> None:
        """See ``Outlet``."""
        for path in self._there:
            remove(path)
        self._there = []


class HeldOutlet:
    """Copies in the host's memory, of the last ``last`` versions: a server that starts anew needs them again.

    ``dtype``: what they are sent in, None for that of the weights."""

    _held: ClassVar[dict[str, Mapping[str, Tensor]]] = {}

    def __init__(self, *, last: int = 2, dtype: torch.dtype | None = None) -> None:
        self._last, self._dtype = last, dtype
        self._there: list[str] = []

    def put(self, policy: Published) -> str:
        """See ``Outlet``."""
        where = f"{HELD}{id(self)}/{policy.version}"
        self._held[where] = {k: self._copy(t) for k, t in policy.plain_weights().items()}
        self._there = [*(w for w in self._there if w != where), where]
        for old in self._there[: -self._last]:
            del self._held[old]
        self._there = self._there[-self._last :]
        return where

    def _copy(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)

    @classmethod
    def held(cls, where: str) -> list[tuple[str, Tensor]]:
        """What was put there. Raises KeyError if it is held no more."""
        return list(cls._held[where].items())

    def close(self) -> None:
        """See ``Outlet``."""
        for where in self._there:
            del self._held[where]
        self._there = []


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
