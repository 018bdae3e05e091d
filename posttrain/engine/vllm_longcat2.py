"""``longcat2`` as vLLM serves it: the training model's own modules around vLLM's attention and its paged cache.

vLLM hands over all tokens of a forward in one row, and keeps keys and values in slots of blocks that it deals out. What
it does not know is the n-gram embedding, which looks back at the ids before a token: they are kept here as it keeps
keys, an id a slot (``TokenHistory``), so that chunks, the prefix cache and preemption need nothing more.

Attention is vLLM's dense one, over keys and values expanded per head. What it cannot do is refused: see ``_served``.

Legend: T tokens of all requests, H hidden, h heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim,
W width of a head in the cache, n = oe_neighbor_num.
"""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own)

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from posttrain.model.attention import Attended, AttentionPlan, IndexSet, LongcatMLA
from posttrain.model.config import Longcat2Config
from posttrain.model.layer import LayerReplay
from posttrain.model.model import Longcat2Model
from posttrain.model.moe import LongcatRoutedBank
from posttrain.model.ngram import PADDING, NgramHasher
from posttrain.model.plan import ForwardPlan
from posttrain.model.rope import rotations
from posttrain.model.visibility import Visibility

_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those that vLLM 0.32 has an attention for on a CPU; on a GPU it has more."""
_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Those that tell the model which blocks a request has."""
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_IDLE = re.compile(r"\.mtp\.|\.indexer\.")
"""Weights of what is not run here: nothing is drafted, and where everything is in sight nothing is chosen."""


class TokenHistory:
    """Ids of the tokens that are in vLLM's cache, by slot. Whatever vLLM finds in its cache again has its ids here too.

    Nothing tells it when vLLM copies or moves a block, which it does for nobody but those whom ``_served`` refuses.
    """

    def __init__(self, layer: str, config: Any) -> None:
        self._layer, self._config = layer, config
        self._ids_S: Tensor | None = None

    def contexts(self, ids_T: Tensor, positions_T: Tensor, count: int) -> Tensor:
        """Token contexts, int64 [T, ``count``] as ``NgramHasher.ids`` wants them; keeps the ids of this forward."""
        seen = get_forward_context().attn_metadata
        if seen is None:  # a forward that vLLM only measures
            return F.pad(ids_T.unsqueeze(1), (0, count - 1), value=PADDING)
        seen, block = seen[self._layer], self._config.block_size
        slots = self._config.num_gpu_blocks * block
        if self._ids_S is None or len(self._ids_S) != slots:
            self._ids_S = ids_T.new_full((slots,), PADDING)
        live = seen.num_actual_tokens
        tokens_T = torch.arange(len(ids_T), device=ids_T.device)
        request_T = torch.searchsorted(seen.query_start_loc[1:], tokens_T, right=True).clamp(max=len(seen.seq_lens) - 1)
        back_Tn = positions_T.unsqueeze(1) - torch.arange(count, device=ids_T.device)
        row_Tn = back_Tn.clamp(min=0)
        slots_Tn = seen.block_table[request_T.unsqueeze(1), row_Tn // block] * block + row_Tn % block
        own_T, known_T = slots_Tn[:live, 0], seen.slot_mapping[:live]
        if not ((own_T == known_T) | (known_T < 0)).all():
            raise RuntimeError("vLLM's block table and slots disagree: the ids of past tokens cannot be found")
        self._ids_S[own_T] = ids_T[:live]
        return self._ids_S[slots_Tn].masked_fill(back_Tn < 0, PADDING)


class _Attention(LongcatMLA):
    """The training model's projections around vLLM's attention, which sees what each request's tokens see."""

    def __init__(self, config: Longcat2Config, attention_id: int, vllm_config: VllmConfig) -> None:
        super().__init__(config, attention_id)
        self.width = _width(config)
        self.attn = Attention(
            self.heads,
            self.width,
            self.logit_scale,
            cache_config=vllm_config.cache_config,
            prefix=_layer_name(attention_id),
        )
        if (backend := self.attn.attn_backend.get_name()) not in _BACKENDS:
            raise ValueError(f"longcat2 is not served with {backend}: give --attention-backend {_BACKENDS[1]}")

    def forward(
        self,
        x_BTH: Tensor,
        rotations_BTP: Tensor,
        plan: AttentionPlan,
        cache: Cache | None,
        shared: IndexSet | None = None,
        replay_BTK: Tensor | None = None,
    ) -> Attended:
        """Of one row. Heads are padded to a width that vLLM has an attention for."""
        _, q_nope, q_rope = self.queries(x_BTH, rotations_BTP)
        latent_BTC, k_rope = self.keys(x_BTH, rotations_BTP)
        k_nope, v = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)
        q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1)
        q, k, v = (F.pad(x, (0, self.width - x.shape[-1])).flatten(2)[0] for x in (q, k, v))
        out_ThW = self.attn(q, k, v).unflatten(-1, (self.heads, self.width))
        return Attended(self.o_proj(out_ThW[..., : self.value].flatten(1)).unsqueeze(0), None, None)


class _Decoder(Longcat2Model):
    """``Longcat2Model`` on a row of tokens of several requests."""

    def __init__(self, config: Longcat2Config, vllm_config: VllmConfig) -> None:
        with no_init_weights():
            super().__init__(config)
        self.history = TokenHistory(_layer_name(0), vllm_config.cache_config)
        for index, layer in enumerate(self.layers):
            halves = [_Attention(config, 2 * index + half, vllm_config) for half in (0, 1)]
            layer.self_attn = nn.ModuleList(halves)
        # As a buffer it would be looked for among new weights.
        self.inv_freq_P = self.rotary.compute()
        del self.rotary

    def run(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """States after the final norm, [T, H]."""
        row_BT = ids_T.unsqueeze(0)
        visibility = Visibility.causal(len(ids_T), 0, ids_T.device)
        attention = AttentionPlan(None, True, False, len(ids_T), visibility, sparse=False, learn_index=False, live=None)
        plan = ForwardPlan(attention, positions_T.unsqueeze(0), None)
        x_BTH = self._embed(row_BT, plan, None)
        rotations_BTP = rotations(plan.position_ids, self.inv_freq_P)
        for layer in self.layers:
            x_BTH = layer(x_BTH, rotations_BTP, attention, LayerReplay()).x_BTH
        return self.norm(x_BTH)[0]

    def _contexts(self, hasher: NgramHasher, ids_BT: Tensor, plan: ForwardPlan, cache: Cache | None) -> Tensor:
        return self.history.contexts(ids_BT[0], plan.position_ids[0], hasher.context).unsqueeze(0)


class Longcat2ForCausalLM(nn.Module):
    """What vLLM asks of a model. Weights have the names and the precision that they have in training."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = _served(vllm_config)
        self.model = _Decoder(config, vllm_config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for bank in self.modules():
            if isinstance(bank, LongcatRoutedBank):
                for weights in bank.parameters():
                    set_weight_attrs(weights, {"weight_loader": _load_expert})

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The word embedding alone."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """States [T, H] of the tokens of all requests."""
        return self.model.run(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [T, V]."""
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes weights by their official names; returns the names of what was loaded, which vLLM compares with what
        there is. Raises ValueError for a weight without a place."""
        own, found = self.state_dict(keep_vars=True), set[str]()
        for name, weight in weights:
            expert = _EXPERT.fullmatch(name)
            if expert is not None:
                bank, number, part = expert.groups()
                name = f"{bank}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
                own[name].weight_loader(own[name], weight, int(number), part)
            elif name in own:
                getattr(own[name], "weight_loader", default_weight_loader)(own[name], weight)
            elif not _IDLE.search(name):
                raise ValueError(f"{name}: the config has no place for this weight; correct config.json")
            found.add(name)
        return found


def _load_expert(param: Tensor, weight: Tensor, expert: int | None = None, part: str = "") -> None:
    """One expert's part of a fused bank, gate rows first, then up rows; or all of it."""
    if expert is None:
        param.data.copy_(weight)
        return
    rows = param.data[expert]
    {"gate": rows.chunk(2)[0], "up": rows.chunk(2)[-1], "down": rows}[part].copy_(weight)


def _layer_name(attention_id: int) -> str:
    """vLLM orders layers by the one number in their names."""
    return f"attention.{attention_id}"


def _width(config: Longcat2Config) -> int:
    widest = max(config.qk_head_dim, config.v_head_dim)
    return next((size for size in _HEAD_SIZES if size >= widest), widest)


def _served(vllm_config: VllmConfig) -> Longcat2Config:
    """The config of the part of the model that is run. Raises ValueError for what would not be that model."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = model.hf_config
    if not isinstance(config, Longcat2Config):
        raise ValueError(f"config.json has the model_type {config.model_type}: save the model with save_pretrained")
    length, most = model.max_model_len, config.dense_context
    parallel = vllm_config.parallel_config
    refused = (
        (
            most is not None and length > most,
            f"a context of {length}: its attention is sparse beyond {most} tokens, and here it is dense; lower "
            "--max-model-len (engine.max_context)",
        ),
        (
            not model.enforce_eager,
            "CUDA graphs: how many tokens an expert has is not known beforehand; give --enforce-eager (engine.eager)",
        ),
        (
            parallel.world_size > 1 or parallel.use_ubatching,
            "a model on several devices or in several parts: give every device a server (engine.replicas)",
        ),
        (vllm_config.quant_config is not None, "quantization: give the weights as they are"),
        (
            vllm_config.kv_transfer_config is not None or cache.prefix_match_unit is not None,
            "blocks that are copied or come from elsewhere: the ids of their tokens would not",
        ),
    )
    for asked, what in refused:
        if asked:
            raise ValueError(f"longcat2 is not served with {what}")
    served = copy.deepcopy(config)
    served.mtp_num_layers = served.index_topk = served.streaming_attentions = None
    return served
