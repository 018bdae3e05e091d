"""What a vLLM server runs of ours, in its own processes: named by ``--worker-extension-cls``. Imports nothing of vLLM
and of the project, so that it loads in whatever environment the server has."""

from __future__ import annotations

from typing import Any


class Extension:
    """Mixed into vLLM's worker; its methods are called by ``/collective_rpc``."""

    model_runner: Any
    reload_weights: Any

    def take_weights(self, folder: str) -> None:
        """Replace the model's weights by those in ``folder`` (Hugging Face format)."""
        before_loading(self.model_runner.model)
        self.reload_weights(weights_path=folder)
        after_loading(self.model_runner.model)


def before_loading(model: Any) -> None:
    """A fused mixture of experts prepares its weights for the kernel only while it has none: on the second load it
    would copy plain weights into the prepared buffer, and report success (vLLM 0.32 on a CPU)."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def after_loading(model: Any) -> None:
    """A head that is tied to the embedding loads nothing itself, so what a CPU had made of its weights stays the old
    ones' (vLLM 0.32)."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


__all__ = ["Extension", "after_loading", "before_loading"]
