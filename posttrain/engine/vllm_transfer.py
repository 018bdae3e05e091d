"""The receiving end of ``posttrain.engine.transfer`` as a weight transfer engine of vLLM's, in its workers.

vLLM's own for NCCL needs vLLM at the trainer's end too, which is another environment, and has no way without GPUs."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# (vLLM has an environment of its own)

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from posttrain.engine.transfer import Layout, Link
from posttrain.engine.vllm_worker import after_loading, before_loading


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the trainer waits."""

    file: str
    size: int
    """Ends: the trainer and every worker of the server."""
    timeout_s: float
    loopback: bool


@dataclass
class Announced(WeightTransferUpdateInfo):
    """What comes."""

    layout: list[list[Any]] = field(default_factory=list[list[Any]])


class Receiver(WeightTransferEngine[Meeting, Announced]):
    """Loads what the trainer sends, layer by layer."""

    init_info_cls = Meeting
    update_info_cls = Announced
    _link: Link | None = None

    def init_transfer_engine(self, init_info: Meeting) -> None:
        """Meet the trainer."""
        self.shutdown()
        own = self.parallel_config
        rank = 1 + own.data_parallel_index * own.world_size + own.rank
        self._link = Link(
            Path(init_info.file), rank, init_info.size, self.device, init_info.timeout_s, init_info.loopback
        )

    def start_weight_update(self) -> None:
        """Make room for plain weights."""
        from vllm.model_executor.model_loader.reload import (
            initialize_layerwise_reload,
        )

        before_loading(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take them. Unlike vLLM's, does not ask for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Announced) -> None:
        """Take them; whatever goes wrong, the trainer's end notices."""
        if self._link is None:
            raise RuntimeError("there is no connection to the trainer")
        try:
            self.model.load_weights(self._link.receive([Layout(*entry) for entry in update_info.layout]))
        except BaseException:
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Make of plain weights what the kernels want."""
        import torch
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
        )

        finalize_layerwise_reload(self.model, self.model_config)
        after_loading(self.model)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def shutdown(self) -> None:
        """Let go of the trainer."""
        if self._link is not None:
            self._link.close()
            self._link = None


__all__ = ["Receiver"]
