"""What a vLLM server runs of ours, in its own processes: named by ``--worker-extension-cls``. Imports nothing of vLLM
and of the project, so that it loads in whatever environment the server has."""

from __future__ import annotations

from typing import Any

import torch


class Extension:
    """Mixed into vLLM's worker; its methods are called by ``/collective_rpc``."""

    model_runner: Any
    reload_weights: Any

    def take_weights(self, folder: str) -> None:
        """Replace the model's weights by those in ``folder`` (Hugging Face format)."""
        before_loading(self.model_runner.model)
        self.reload_weights(weights_path=folder)
        after_loading(self.model_runner.model)

    def judge_always(self, ids: list[int]) -> None:
        """From now on the last ``len(ids)`` of the most likely tokens that a request wants of its prompt are these
        instead, if it wants so many. For a server that only scores, with vLLM's first model runner: the second one has
        a parameter for it, but needs kernels that a CPU has not (vLLM 0.32)."""
        if not hasattr(self.model_runner, "_get_prompt_logprobs_dict"):
            raise RuntimeError("decision tokens need VLLM_USE_V2_MODEL_RUNNER=0 in the server's environment")
        sampler: Any = self.model_runner.sampler
        gather = type(sampler).gather_logprobs

        def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
            if num_logprobs < len(ids):
                return gather(logprobs, num_logprobs, token_ids)
            found = gather(logprobs, num_logprobs - len(ids), token_ids)
            always = torch.tensor(ids, device=logprobs.device).expand(len(logprobs), -1)
            return found._replace(
                logprob_token_ids=torch.cat([found.logprob_token_ids, always.to(found.logprob_token_ids.dtype)], 1),
                logprobs=torch.cat([found.logprobs, logprobs.gather(1, always)], 1),
            )

        sampler.gather_logprobs = gather_logprobs


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
