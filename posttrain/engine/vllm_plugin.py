"""What every process of a vLLM server runs of ours when it starts (entry point ``vllm.general_plugins``)."""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own)

from __future__ import annotations


def register() -> None:
    """Makes ``longcat2`` known to transformers and to vLLM, which imports the model itself only to serve it. Changes
    nothing for other models; may be called twice."""
    from vllm.model_executor.models import ModelRegistry

    import posttrain.model  # noqa: F401  (registers the config)

    ModelRegistry.register_model("Longcat2ForCausalLM", "posttrain.engine.vllm_longcat2:Longcat2ForCausalLM")


__all__ = ["register"]
