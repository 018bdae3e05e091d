"""What vLLM runs of ours in each of its processes before anything else: the entry point ``vllm.general_plugins``."""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own)

from __future__ import annotations

BACKEND = "posttrain"
"""Of ``--weight-transfer-config``."""


def register() -> None:
    """Makes ``longcat2`` known to transformers and to vLLM, which imports the model itself only to serve it, and our
    way for weights. Changes nothing for other models; may be called twice."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory
    from vllm.model_executor.models import ModelRegistry

    import posttrain.model  # noqa: F401  (registers the config)

    ModelRegistry.register_model("Longcat2ForCausalLM", "posttrain.engine.vllm_longcat2:Longcat2ForCausalLM")
    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "posttrain.engine.vllm_transfer", "Receiver")


__all__ = ["BACKEND", "register"]
