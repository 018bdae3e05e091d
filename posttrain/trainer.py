"""Steps on batches. One class for one process or many: what is parallel is Accelerate's business.

Shapes: B sequences, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain import determinism
from posttrain.batch import Batch, pack
from posttrain.errors import UserError
from posttrain.loss import clipped_loss, distill_loss
from posttrain.model import Longcat2ForCausalLM
from posttrain.model.layer import LayerReplay
from posttrain.model.outputs import Longcat2CausalOutput
from posttrain.optim import make_optimizer
from posttrain.settings import ClippedLoss, DistillLoss, TrainerConfig
from posttrain.types import Sample, Weights
from posttrain.weights import SHM, SharedWeights, state_of


class Trainer:
    """Owns the model being trained, its optimizer and the block through which the engine gets its weights."""

    def __init__(
        self, model: PreTrainedModel, config: TrainerConfig, loss: ClippedLoss | DistillLoss, total_steps: int
    ):
        torch.set_num_threads(config.threads)
        if config.deterministic:
            determinism.enforce()
        self.config, self.loss, self.version = config, loss, 0
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        model.train()
        if isinstance(model, Longcat2ForCausalLM):
            model.freeze_idle()
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in config.freeze):
                parameter.requires_grad_(False)
        trained: nn.Module = model
        if config.lora is not None:
            import peft

            spec = peft.LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,  # pyright: ignore[reportArgumentType]  # peft takes floats too
                target_modules=config.lora.targets,
                lora_dropout=0.0,
            )
            trained = peft.get_peft_model(model, spec)  # pyright: ignore[reportArgumentType]
        optimizer = make_optimizer(trained.named_parameters(), config)
        total = max(1, total_steps * config.updates_per_batch)

        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
            return rise * (1 - 0.9 * min(1.0, step / total)) if config.decay else rise

        self.base = model
        self.model, self.optimizer = self.accelerator.prepare(trained, optimizer)
        # Not prepared: Accelerate would advance it once a process and step.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        self._shared: SharedWeights | None = None

    def step(self, samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        """Train on ``samples``, which came from ``num_rollouts`` rollouts (those without signal counted too).

        Returns means over the trained tokens. With no trained token at all the weights stay as they are. Raises
        FloatingPointError on a gradient that is not finite, before the optimizer sees it."""
        parts = self.config.updates_per_batch
        # Without trained tokens there is no gradient, and a step on none would still move by momentum and decay.
        ordered = sorted((s for s in samples if any(s.sampled[1:])), key=lambda s: s.rollout)
        if self.config.replay_choices and any(s.choices is None for s in ordered):
            raise UserError(
                "trainer.replay_choices: there are samples without recorded choices: set engine.record_choices to "
                "true, or trainer.replay_choices to false"
            )
        size, replay = self.config.tokens_per_micro_batch, self.config.replay_choices
        groups = [pack(ordered[i::parts], size, replay) for i in range(parts)]
        prox: list[list[Tensor | None]] = [[None] * len(g) for g in groups]
        if parts > 1 and isinstance(self.loss, ClippedLoss):
            prox = [[self._logprobs(b, False)[0] for b in g] for g in groups]
        totals: dict[str, float] = {"tokens": 0.0}
        norms: list[float] = []
        for batches, proximal in zip(groups, prox, strict=True):
            if not batches:
                continue
            real = sum(int(b.real_BT.sum()) for b in batches)
            for batch, reference in zip(batches, proximal, strict=True):
                self._accumulate(batch, reference, num_rollouts / parts, real, totals)
            norms.append(self._update())
        tokens = totals.pop("tokens")
        means = {k: v / tokens for k, v in totals.items()}
        rate = float(self.schedule.get_last_lr()[0])
        return {**means, "tokens": tokens, "grad_norm": max(norms, default=0.0), "lr": rate}

    def _update(self) -> float:
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm) or 0.0)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at version {self.version}: lower trainer.lr")
        self.optimizer.step()
        if isinstance(self.base, Longcat2ForCausalLM):
            peak, rate = (float(rates[0]) for rates in (self.schedule.base_lrs, self.schedule.get_last_lr()))
            self.base.model.update_router_biases(rate / peak)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _accumulate(
        self, batch: Batch, prox_N: Tensor | None, rollouts: float, real: int, totals: dict[str, float]
    ) -> None:
        pi_N, entropy_N, aux = self._logprobs(batch, True)
        mask_BT = batch.sampled_BT
        mu_N = batch.behaviour_BT[mask_BT]
        if isinstance(self.loss, ClippedLoss):
            reference_N = pi_N.detach() if prox_N is None else prox_N
            total, stats = clipped_loss(pi_N, reference_N, mu_N, batch.advantages_BT[mask_BT], self.loss)
            total = total / (rollouts * self.loss.constant_length)
        else:
            if batch.teacher_BT is None:
                raise ValueError("the distillation loss needs teacher log-probs in every sample")
            share_BT = (1.0 / mask_BT.sum(1, keepdim=True).clamp_min(1)).expand_as(mask_BT)
            total, stats = distill_loss(pi_N, mu_N, batch.teacher_BT[mask_BT], share_BT[mask_BT], self.loss)
            total = total / rollouts
        if aux is not None:
            total = total + aux * (batch.real_BT.sum().item() / real)
            totals["aux_loss"] = totals.get("aux_loss", 0.0) + aux.item() * len(pi_N)
        self.accelerator.backward(total)
        stats |= {"entropy": entropy_N.sum().item(), "gap_abs": (pi_N.detach() - mu_N).abs().sum().item()}
        totals["tokens"] += len(pi_N)
        for key, value in stats.items():
            totals[key] = totals.get(key, 0.0) + value

    def _logprobs(self, batch: Batch, with_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies ``[N]`` of the sampled tokens, row by row; and the model's auxiliary loss, a mean
        over real tokens, if it has one."""
        batch = batch.to(self.accelerator.device)
        # Padding is at the right, where causality hides it; our model is told of it for its expert load alone.
        extra: dict[str, Any] = {}
        if isinstance(self.base, Longcat2ForCausalLM):
            extra = {"attention_mask": batch.real_BT, "replay": _replay(batch)}
        with torch.set_grad_enabled(with_grad):
            out = self.model(input_ids=batch.ids_BT, use_cache=False, **extra)
            logits_BTV = out.logits
            logp_NV = torch.log_softmax(logits_BTV[:, :-1][batch.sampled_BT[:, 1:]].float(), dim=-1)
            pi_N = logp_NV.gather(1, batch.ids_BT[:, 1:][batch.sampled_BT[:, 1:]][:, None])[:, 0]
        with torch.no_grad():
            entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return pi_N, entropy_N, out.aux_loss if isinstance(out, Longcat2CausalOutput) else None

    def weights(self) -> dict[str, Tensor]:
        """The policy's state dict as the engine's model has it; adapters are added in, without touching the base."""
        if self.config.lora is None:
            return state_of(self.accelerator.unwrap_model(self.model))
        state: dict[str, Tensor] = {}
        prefix = "base_model.model."
        layers = dict(self.accelerator.unwrap_model(self.model).named_modules())
        for name, tensor in state_of(self.accelerator.unwrap_model(self.model)).items():
            if ".lora_" in name:
                continue
            plain = name.removeprefix(prefix)
            if ".base_layer." in plain:
                layer: Any = layers[name.rsplit(".base_layer.", 1)[0]]
                if plain.endswith(".base_layer.weight"):
                    tensor = tensor + layer.get_delta_weight("default")
                plain = plain.replace(".base_layer.", ".")
            state[plain] = tensor.detach()
        return state

    def publish(self) -> Weights:
        """Put the weights where the engine can take them. The engine must have taken the last ones before."""
        state = self.weights()
        if self._shared is None:
            self._shared = SharedWeights(state)
        self._shared.write(state)
        return Weights(version=self.version, where=SHM + self._shared.name)

    def save(self, folder: Path) -> None:
        """The policy in Hugging Face format, adapters merged."""
        self.base_model().save_pretrained(folder)

    def base_model(self) -> PreTrainedModel:
        """The plain model with what was learned in it. With adapters this merges them: call it at the end."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model if self.config.lora is None else model.merge_and_unload()

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs of the trainer."""
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "version": self.version,
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.version = state["version"]
        torch.set_rng_state(state["rng"])

    def close(self) -> None:
        """Remove the shared block; idempotent."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _replay(batch: Batch) -> list[LayerReplay] | None:
    """What each layer shall choose; None: the model chooses."""
    if batch.slots_BTLK is None:
        return None
    slots = batch.slots_BTLK.unbind(2)
    columns = [None] * len(slots) if batch.columns_BTLOK is None else batch.columns_BTLOK.unbind(2)
    return [LayerReplay(s, c) for s, c in zip(slots, columns, strict=True)]


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint that is either whole or absent."""
    temporary = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
