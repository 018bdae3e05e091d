"""What vLLM runs of ours in each of its processes before anything else: the entry point ``vllm.general_plugins``."""

from __future__ import annotations

BACKEND = "posttrain"
"""Of ``--weight-transfer-config``."""


def register() -> None:
    """May be called again in the same process."""
    from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
        WeightTransferEngineFactory as Factory,
    )

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "posttrain.engine.vllm_transfer", "Receiver")


__all__ = ["BACKEND", "register"]
