"""Small random longcat2 models, and a minimal slot cache, shared by the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from posttrain.model import Longcat2Config, Longcat2ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 3,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "ffn_hidden_size": 40,
    "expert_ffn_hidden_size": 16,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "moe_topk": 4,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 256,
}
NGRAM: dict[str, Any] = {"oe_vocab_size_ratio": 3.567, "oe_neighbor_num": 4, "oe_split_num": 2}
LSA: dict[str, Any] = {
    "index_topk": 14,
    "index_init_tokens": 2,
    "index_local_tokens": 5,
    "index_n_heads": 3,
    "index_head_dim": 8,
}
MTP: dict[str, Any] = {"mtp_num_layers": 3}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 120.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1,
    "mscale_all_dim": 1,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Overwrites every weight with values that hide nothing: norms away from 1, correction bias away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "layernorm" in name or name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif "correction_bias" in name:
                tensor.copy_(0.05 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            elif "classifier" in name:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)


def tiny(seed: int = 0, ngram: bool = True, **changes: Any) -> Longcat2ForCausalLM:
    """A random model in eval mode."""
    model = Longcat2ForCausalLM(Longcat2Config(**{**SHAPE, **(NGRAM if ngram else {}), **changes}))
    randomise(model, seed)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0, low: int = 0, vocab: int = SHAPE["vocab_size"]) -> Tensor:
    """Random ids; EOS (2) occurs when ``low`` <= 2."""
    return torch.randint(low, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class SlotCache:
    """Preallocated buffers [B, 1, S, width]; row b's current tokens go to the columns ``position_ids[b]``."""

    def __init__(self, batch: int, columns: int) -> None:
        self.batch, self.columns = batch, columns
        self.position_ids = torch.zeros(batch, 1, dtype=torch.int64)
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not meaningful for slots; 0."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes [B, 1, T, width] at the current positions, returns the whole buffers."""
        if layer_idx not in self.buffers:
            shape = (self.batch, 1, self.columns)
            # finite garbage: columns that are masked must not matter
            self.buffers[layer_idx] = (
                keys.new_full((*shape, keys.shape[-1]), 7),
                values.new_full((*shape, values.shape[-1]), 7),
            )
        rows = torch.arange(self.batch).unsqueeze(1)
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[rows, 0, self.position_ids] = new[:, 0]
        return self.buffers[layer_idx]


def slot_forward(model: Longcat2ForCausalLM, cache: SlotCache, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of ``ids`` [B, T] written at ``positions`` [B, T]."""
    cache.position_ids = positions
    mask = (torch.arange(cache.columns) <= positions.unsqueeze(-1)).unsqueeze(1)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
