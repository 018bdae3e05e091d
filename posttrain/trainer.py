"""Steps on batches. One class for one process or many: what is parallel is Accelerate's business.

Shapes: B sequences, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from posttrain import determinism, objective, packing
from posttrain.batch import Batch, pack
from posttrain.errors import UserError
from posttrain.files import needs_room
from posttrain.logprobs import bare, plain_head, token_logprobs
from posttrain.mismatch import Gaps, Mismatch
from posttrain.model import Longcat2ForCausalLM
from posttrain.model.layer import LayerReplay
from posttrain.model.outputs import Longcat2CausalOutput
from posttrain.objective import Extent, OnSupport, Tokens
from posttrain.objective_settings import DistillLoss, LossConfig
from posttrain.optim import make_optimizer
from posttrain.prompts import can_share, read
from posttrain.settings import TrainerConfig
from posttrain.types import Sample, Weights
from posttrain.weights import Outlet, SharedOutlet, state_of


class _Earlier(NamedTuple):
    """Log-probs [N] of the tokens of a micro-batch under other weights than those being trained."""

    prox_N: Tensor | None = None
    """Those at the start of the step; None: they are the ones being trained."""
    reference_N: Tensor | None = None
    """Those at the start of the stage; None: the objective does not use them."""


class Trainer:
    """Owns the model being trained, its optimizer and the outlet through which the engine gets its weights.

    ``model`` is where the stage starts, also for a trainer that is then restored: the reference of ``loss.kl``."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        loss: LossConfig,
        total_steps: int,
        outlet: Outlet | None = None,
    ):
        torch.set_num_threads(config.threads)
        if config.deterministic:
            determinism.enforce()
        self.config, self.loss, self.version = config, loss, 0
        self.gaps: dict[int, Gaps] = {}
        """Between trainer and engine, of the tokens of the last step, by their staleness."""
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        model.train()
        if config.packed:
            packing.enable(model)
        if isinstance(model, Longcat2ForCausalLM):
            model.freeze_idle()
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in config.freeze):
                parameter.requires_grad_(False)
        self._reference: nn.Module | None = None
        if config.lora is None and not isinstance(loss, DistillLoss) and loss.kl:
            frozen = copy.deepcopy(model).eval().requires_grad_(False)
            self._reference = self.accelerator.prepare_model(frozen, evaluation_mode=True)
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
        if config.activations != "keep":
            # On a CPU they are in the host's memory as it is, and torch refuses to pin it.
            offload = config.activations == "offload" and self.accelerator.device.type != "cpu"
            model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
        if config.compile:
            _compile(model)
        total = max(1, total_steps * config.updates_per_batch)

        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
            return rise * (1 - 0.9 * min(1.0, step / total)) if config.decay else rise

        self.base = model
        self.model, self.optimizer = self.accelerator.prepare(trained, optimizer)
        ours, alone = isinstance(model, Longcat2ForCausalLM), self.accelerator.num_processes == 1
        self._shares_prompts = config.share_prompts and alone and not ours and can_share(model)
        # Not prepared: Accelerate would advance it once a process and step.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        self._outlet: Outlet = outlet or SharedOutlet()

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
        share, packed = self._shares_prompts, self.config.packed
        groups = [pack(ordered[i::parts], size, replay, share, packed) for i in range(parts)]
        # All of it before the first update: prox is the policy that the step starts with.
        earlier = [[self._earlier(b) for b in g] for g in groups]
        mismatch = Mismatch(self.version)
        totals: dict[str, float] = {}
        norms: list[float] = []
        for batches, known in zip(groups, earlier, strict=True):
            if not batches:
                continue
            extent = Extent(num_rollouts / parts, sum(int(b.sampled_BT.sum()) for b in batches))
            real = sum(int(b.real_BT.sum()) for b in batches)
            for batch, known_N in zip(batches, known, strict=True):
                self._accumulate(batch, known_N, extent, real, totals, mismatch)
            norms.append(self._update())
        self.gaps = mismatch.gaps()
        tokens, rate = totals.get("tokens", 0.0), float(self.schedule.get_last_lr()[0])
        return {
            **objective.means(totals, len(norms)),
            "tokens": tokens,
            "grad_norm": max(norms, default=0.0),
            "lr": rate,
        }

    def _earlier(self, batch: Batch) -> _Earlier:
        if isinstance(self.loss, DistillLoss):
            return _Earlier()
        # With one update a batch, prox is the policy being trained, and its log-probs are at hand without a forward.
        moves = self.config.updates_per_batch > 1 and self.loss.uses_prox
        return _Earlier(
            self._logprobs(batch, False)[0] if moves else None,
            self._reference_logprobs(batch) if self.loss.kl else None,
        )

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self._reference is not None:
            return self._logprobs(batch, False, self._reference)[0]
        model: Any = self.accelerator.unwrap_model(self.model)
        with model.disable_adapter():
            return self._logprobs(batch, False)[0]

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
        self,
        batch: Batch,
        earlier: _Earlier,
        extent: Extent,
        real: int,
        totals: dict[str, float],
        mismatch: Mismatch,
    ) -> None:
        batch = batch.to(self.accelerator.device)
        found, entropy_N, aux = self._logprobs(batch, True)
        pi_N, support = _on_support(batch, found)
        mask_BT = batch.sampled_BT
        tokens = Tokens(
            pi_N=pi_N,
            prox_N=pi_N.detach() if earlier.prox_N is None else earlier.prox_N,
            mu_N=batch.behaviour_BT[mask_BT],
            advantage_N=batch.advantages_BT[mask_BT],
            row_N=mask_BT.nonzero()[:, 0],
            entropy_N=entropy_N,
            reference_N=earlier.reference_N,
            teacher_N=None if batch.teacher_BT is None else batch.teacher_BT[mask_BT],
            support=support,
        )
        total, stats, gated_N = objective.loss(tokens, self.loss, extent)
        mismatch.add(tokens.prox_N - tokens.mu_N, batch.versions_BT[mask_BT], gated_N)
        if aux is not None:
            total = total + aux * (batch.real_BT.sum().item() / real)
            stats["aux_loss"] = aux.item() * len(pi_N)
        self.accelerator.backward(total)
        for key, value in stats.items():
            totals[key] = totals.get(key, 0.0) + value

    def _logprobs(
        self, batch: Batch, with_grad: bool, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs of ``batch.judged_ids`` and entropies ``[N]`` of the sampled tokens, row by row; and the model's
        auxiliary loss, a mean over real tokens, if it has one. ``model``: another than the one being trained."""
        batch = batch.to(self.accelerator.device)
        # Padding is at the right, where causality hides it; our model is told of it for its expert load alone.
        extra: dict[str, Any] = {}
        if isinstance(self.base, Longcat2ForCausalLM):
            extra = {"attention_mask": batch.real_BT, "replay": _replay(batch)}
        model = model or self.model
        head = plain_head(self.accelerator.unwrap_model(model))
        row = packing.packed(batch) if self.config.packed else None
        with torch.set_grad_enabled(with_grad), bare(head) if head is not None else nullcontext():
            extra |= {"input_ids": batch.ids_BT} if row is None else row.arguments()
            extra["past_key_values"] = None if batch.prompts is None else read(model, batch.prompts)
            out = model(use_cache=batch.prompts is not None, **extra)
        learns_entropy = not isinstance(self.loss, DistillLoss) and self.loss.entropy > 0
        ids = batch.judged_ids
        with torch.set_grad_enabled(with_grad):
            found_N = out.logits[:, :-1][batch.sampled_BT[:, 1:]] if row is None else out.logits[0, row.before_N]
            if head is not None:
                dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else None
                pi, entropy_N = token_logprobs(found_N, head.weight, ids, dtype)
            else:
                logp_NV = torch.log_softmax(found_N.float(), dim=-1)
                pi = logp_NV.gather(1, ids.view(len(ids), -1)).view_as(ids)
                entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        if not learns_entropy:
            entropy_N = entropy_N.detach()
        return pi, entropy_N, out.aux_loss if isinstance(out, Longcat2CausalOutput) else None

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
        return Weights(version=self.version, where=self._outlet.put(self))

    def plain_weights(self) -> Mapping[str, Tensor]:
        """The policy as ``save_policy`` would save it."""
        return revert_weight_conversion(self.base, self.weights())

    def save_policy(self, folder: Path) -> None:
        """The policy as it is now in Hugging Face format, adapters added in; training can go on."""
        self.base.save_pretrained(folder, state_dict=self.weights())

    def save_adapter(self, folder: Path) -> None:
        """The adapter alone, in peft's format."""
        assert self.config.lora is not None
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """The policy in Hugging Face format, adapters merged."""
        with needs_room(folder):
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
        """Take away what was published; idempotent."""
        self._outlet.close()


def _compile(model: PreTrainedModel) -> None:
    if isinstance(model, Longcat2ForCausalLM):
        raise UserError(
            "trainer.compile: models of type longcat2 choose experts and columns as they go: set it to false"
        )
    # In place, so that names of weights stay. Not the head, which token_logprobs applies in chunks.
    model.base_model.compile(dynamic=True)


def _on_support(batch: Batch, logprobs: Tensor) -> tuple[Tensor, OnSupport | None]:
    """Log-probs of ``batch.judged_ids`` taken apart: of the trained tokens, ``[N]``, and of the support."""
    if batch.support_NK is None or batch.support_teacher_NK is None:
        return logprobs, None
    holds_N = (batch.support_NK == batch.judged_ids[:, :1]).any(1)
    return logprobs[:, 0], OnSupport(logprobs[:, 1:], batch.support_teacher_NK, batch.support_NK >= 0, holds_N)


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
    with needs_room(path), open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
