"""Steps on batches. One class for one process or many: what is parallel is Accelerate's business.

With several, whoever has the trainer has rank 0, and calls it as if it were alone. Methods whose name begins with an
underscore and that ``_everywhere`` is given run on all ranks at once (``posttrain.ranks``).

Shapes: B sequences, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from posttrain import determinism, objective, packing, shards
from posttrain.batch import Batch, deal
from posttrain.errors import UserError
from posttrain.files import needs_room
from posttrain.logprobs import bare, plain_head, token_logprobs
from posttrain.mismatch import Gaps, Mismatch, together
from posttrain.model import Longcat2ForCausalLM
from posttrain.model.outputs import Longcat2CausalOutput
from posttrain.objective import Extent, Tokens, on_support
from posttrain.objective_settings import DistillLoss, LossConfig
from posttrain.optim import make_optimizer, rate_of
from posttrain.prepare import compile_layers, keep_memory, refuse_parts, refuse_side_by_side, trainable
from posttrain.prompts import can_share, read
from posttrain.ranks import Place, Ranks, make_accelerator
from posttrain.settings import AloneConfig, FsdpConfig, TrainerConfig
from posttrain.side_by_side import SideBySide
from posttrain.types import Sample, Weights
from posttrain.weights import Outlet, SharedOutlet, merged_state_of, state_of


class _Earlier(NamedTuple):
    """Log-probs [N] of the tokens of a micro-batch under other weights than those being trained."""

    prox_N: Tensor | None = None
    """Those at the start of the step; None: they are the ones being trained."""
    reference_N: Tensor | None = None
    """Those at the start of the stage; None: the objective does not use them."""


class _Found(NamedTuple):
    """What a micro-batch tells beside its gradient."""

    stats: dict[str, float]
    gaps: tuple[Tensor, Tensor, Tensor]
    """For ``Mismatch.add``."""


class _Part(NamedTuple):
    """What one rank saw of a step."""

    totals: dict[str, float]
    """Sums for ``objective.means``."""
    gaps: dict[int, Gaps]
    norms: list[float]
    """Of the gradient of each optimizer step, over all ranks."""


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
        place: Place | None = None,
    ):
        """``place``: of a follower; see ``posttrain.ranks``."""
        self.config, self.loss, self.version = config, loss, 0
        self.gaps: dict[int, Gaps] = {}
        """Between trainer and engine, of the tokens of the last step, by their staleness."""
        self._outlet: Outlet = outlet or SharedOutlet()
        self._ranks: Ranks | None = None
        if isinstance(config.parallel, AloneConfig) or place is not None:
            self._build(model, total_steps, place)
        else:
            refuse_parts(model, config)
            follower = partial(_follower, shards.outline(model), torch.initial_seed(), config, loss, total_steps)
            self._ranks = Ranks(config.parallel)
            self._ranks.begin(follower, partial(self._build, model, total_steps, self._ranks.place))

    def _build(self, model: PreTrainedModel, total_steps: int, place: Place | None) -> None:
        config, loss = self.config, self.loss
        torch.set_num_threads(config.threads)
        if config.deterministic:
            determinism.enforce()
        self.accelerator = make_accelerator(config, place)
        if self.accelerator.device.type == "cpu":
            keep_memory()
        at_once = config.micro_batches_at_once
        if at_once > 1:
            refuse_side_by_side(model, self.accelerator.device.type)
        self._side_by_side = SideBySide(at_once) if at_once > 1 else None
        trained = trainable(model, config, self.accelerator.device.type)
        if place is not None:
            shards.make_alike(trained)
        self._rank, self._count = self.accelerator.process_index, self.accelerator.num_processes
        self._sharded, self._stale = isinstance(config.parallel, FsdpConfig), False
        self._reference: nn.Module | None = None
        if config.lora is None and not isinstance(loss, DistillLoss) and loss.kl:
            frozen = copy.deepcopy(model).eval().requires_grad_(False)
            if self._sharded:
                self._reference = fsdp2_prepare_model(self.accelerator, frozen)
            else:
                self._reference = self.accelerator.prepare_model(frozen, evaluation_mode=True)
        # Rank 0 has the weights as a whole too, for all that reads them.
        whole = copy.deepcopy(trained) if self._sharded and self._rank == 0 else None
        optimizer = make_optimizer(trained.named_parameters(), config)
        if config.activations != "keep":
            # On a CPU they are in the host's memory as it is, and torch refuses to pin it.
            offload = config.activations == "offload" and self.accelerator.device.type != "cpu"
            model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
        if config.compile:
            compile_layers(model, "trainer.compile")
        self.base = model
        self.model, self.optimizer = self.accelerator.prepare(trained, optimizer)
        self._plain: Any = self.accelerator.unwrap_model(self.model) if whole is None else whole
        ours = isinstance(model, Longcat2ForCausalLM)
        self._shares_prompts = config.share_prompts and not ours and can_share(model)
        # Not prepared: Accelerate would advance it once a process and step.
        rate = rate_of(config.warmup_steps, config.decay, max(1, total_steps * config.updates_per_batch))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def _everywhere(self, method: str, *args: Any, others: Sequence[Any] | None = None) -> list[Any]:
        """What the method returns, by rank; ``others`` are the arguments of all but rank 0, if they are not its."""
        work = partial(getattr(self, method), *args)
        return [work()] if self._ranks is None else self._ranks.together(method, others or args, work)

    def step(self, samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        """Train on ``samples``, which came from ``num_rollouts`` rollouts (those without signal counted too).

        Returns means over the trained tokens. With no trained token at all the weights stay as they are. Raises
        FloatingPointError on a gradient that is not finite, before the optimizer sees it, and RankError if a process
        of the trainer is gone."""
        self._stale = self._sharded
        parts: list[_Part] = self._everywhere("_step", samples, num_rollouts, self.version)
        self.gaps = together(part.gaps for part in parts)
        totals: dict[str, float] = {}
        for part in parts:
            _add(totals, part.totals)
        norms = parts[0].norms
        return {
            **objective.means(totals, len(norms)),
            "tokens": totals.get("tokens", 0.0),
            "grad_norm": max(norms, default=0.0),
            "lr": float(self.schedule.get_last_lr()[0]),
        }

    def _step(self, samples: Sequence[Sample], num_rollouts: int, version: int) -> _Part:
        self.version, parts = version, self.config.updates_per_batch
        # Without trained tokens there is no gradient, and a step on none would still move by momentum and decay.
        ordered = sorted((s for s in samples if any(s.sampled[1:])), key=lambda s: s.rollout)
        if self.config.replay_choices and any(s.choices is None for s in ordered):
            raise UserError(
                "trainer.replay_choices: there are samples without recorded choices: set engine.record_choices to "
                "true, or trainer.replay_choices to false"
            )
        shares = [ordered[i::parts] for i in range(parts) if ordered[i::parts]]
        size, replay = self.config.tokens_per_micro_batch, self.config.replay_choices
        shared, packed = self._shares_prompts, self.config.packed
        groups = [deal(s, size, self._rank, self._count, replay, shared, packed) for s in shares]
        # All of it before the first update: prox is the policy that the step starts with.
        earlier = [[self._earlier(b) for b in g] for g in groups]
        mismatch = Mismatch(self.version)
        totals: dict[str, float] = {}
        norms: list[float] = []
        for share, batches, known in zip(shares, groups, earlier, strict=True):
            # Of all ranks, as the gradient is.
            extent = Extent(num_rollouts / parts, sum(sum(s.sampled[1:]) for s in share))
            real = sum(len(s.ids) for s in share)
            losses = [partial(self._loss, b, known[i], extent, real) for i, b in enumerate(batches)]
            for found in self._accumulate(losses):
                mismatch.add(*found.gaps)
                _add(totals, found.stats)
            norms.append(self._update())
        return _Part(totals, mismatch.gaps(), norms)

    def _accumulate(self, losses: Sequence[Callable[[], tuple[Tensor, _Found]]]) -> Iterator[_Found]:
        """Add up the gradients of micro-batches, and yield what else is known of each, in their order."""
        if self._side_by_side is not None:
            yield from self._side_by_side.accumulate([p for p in self.model.parameters() if p.requires_grad], losses)
            return
        for i, loss in enumerate(losses):
            with self._summing(i == len(losses) - 1):
                total, found = loss()
                self.accelerator.backward(total * self._count)  # of the ranks' gradients the mean is taken
            del total  # and with it what the graph still holds, before there is another one
            yield found

    def _summing(self, last: bool) -> AbstractContextManager[Any]:
        """With whole gradients in every rank they travel once an update, after the last micro-batch."""
        return nullcontext() if last or self._sharded else self.accelerator.no_sync(self.model)

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

    def _loss(self, batch: Batch, earlier: _Earlier, extent: Extent, real: int) -> tuple[Tensor, _Found]:
        batch = batch.to(self.accelerator.device)
        found, entropy_N, aux = self._logprobs(batch, True)
        pi_N, support = on_support(batch, found)
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
        if aux is not None:
            total = total + aux * (batch.real_BT.sum().item() / real)
            stats["aux_loss"] = aux.item() * len(pi_N)
        return total, _Found(stats, (tokens.prox_N - tokens.mu_N, batch.versions_BT[mask_BT], gated_N))

    def _logprobs(
        self, batch: Batch, with_grad: bool, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs of ``batch.judged_ids`` and entropies ``[N]`` of the sampled tokens, row by row; and the model's
        auxiliary loss, a mean over real tokens, if it has one. ``model``: another than the one being trained."""
        batch = batch.to(self.accelerator.device)
        # Padding is at the right, where causality hides it; our model is told of it for its expert load alone.
        extra: dict[str, Any] = {}
        if isinstance(self.base, Longcat2ForCausalLM):
            extra = {"attention_mask": batch.real_BT, "replay": batch.replay}
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
                pi, entropy_N = token_logprobs(found_N, shards.whole_weight(head.weight), ids, dtype)
            else:
                logp_NV = torch.log_softmax(found_N.float(), dim=-1)
                pi = logp_NV.gather(1, ids.view(len(ids), -1)).view_as(ids)
                entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        if not learns_entropy:
            entropy_N = entropy_N.detach()
        return pi, entropy_N, out.aux_loss if isinstance(out, Longcat2CausalOutput) else None

    def _whole(self) -> Any:
        """The model being trained with all of its weights, on rank 0. After ``close`` as they were last asked for."""
        if self._stale:
            self._everywhere("_gather")
            self._stale = False
        return self._plain

    @torch.no_grad()
    def _gather(self) -> None:
        """Put what training may have changed into the whole model of rank 0."""
        whole = self._plain.state_dict() if self._rank == 0 else {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                found = shards.gathered(tensor.detach())
                if self._rank == 0:
                    whole[name].copy_(found)

    def _base(self) -> Any:
        model = self._whole()
        return model if self.config.lora is None else model.get_base_model()

    def weights(self) -> dict[str, Tensor]:
        """The policy's state dict as the engine's model has it; adapters are added in, without touching the base."""
        model = self._whole()
        return state_of(model) if self.config.lora is None else merged_state_of(model)

    def publish(self) -> Weights:
        """Put the weights where the engine can take them. The engine must have taken the last ones before."""
        return Weights(version=self.version, where=self._outlet.put(self))

    def plain_weights(self) -> Mapping[str, Tensor]:
        """The policy as ``save_policy`` would save it."""
        return revert_weight_conversion(self._base(), self.weights())

    def save_policy(self, folder: Path) -> None:
        """The policy as it is now in Hugging Face format, adapters added in; training can go on."""
        self._base().save_pretrained(folder, state_dict=self.weights())

    def save_adapter(self, folder: Path) -> None:
        """The adapter alone, in peft's format."""
        assert self.config.lora is not None
        self._whole().save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """The policy in Hugging Face format, adapters merged."""
        with needs_room(folder):
            self.base_model().save_pretrained(folder)

    def base_model(self) -> PreTrainedModel:
        """The plain model with what was learned in it. With adapters this merges them: call it at the end."""
        model = self._whole()
        return model if self.config.lora is None else model.merge_and_unload()

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs of the trainer, with as many processes or with others."""
        return {
            "model": self._whole().state_dict(),
            "optimizer": self._everywhere("_optimizer_state")[0],
            "schedule": self.schedule.state_dict(),
            "version": self.version,
            "rng": torch.get_rng_state(),
        }

    def _optimizer_state(self) -> dict[str, Any] | None:
        state = shards.gathered(self.optimizer.state_dict())
        return state if self._rank == 0 else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self._plain.load_state_dict(state["model"])
        self._stale = False
        self._everywhere("_restore", state, others=[shards.without_values(dict(state))])

    def _restore(self, state: Mapping[str, Any]) -> None:
        """On ranks other than 0 ``state`` is without values."""
        optimizer = state["optimizer"]
        if self._count > 1:
            shards.load(self.accelerator.unwrap_model(self.model), state["model"])
            optimizer = shards.optimizer_state(self.optimizer, optimizer)
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.version = state["version"]
        if self._rank == 0:
            torch.set_rng_state(state["rng"])

    def close(self) -> None:
        """Take away what was published, and end the other processes; idempotent."""
        self._outlet.close()
        if self._side_by_side is not None:
            self._side_by_side.close()
        if self._ranks is not None:
            self._ranks.close()


def _follower(
    outline: bytes, seed: int, config: TrainerConfig, loss: LossConfig, total_steps: int, place: Place
) -> Trainer:
    """The trainer of another rank; its weights come from rank 0."""
    torch.manual_seed(seed + place.rank)
    return Trainer(shards.from_outline(outline), config, loss, total_steps, place=place)


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        totals[key] = totals.get(key, 0.0) + value
