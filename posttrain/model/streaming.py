"""The streaming pattern of LoZA (LongCat ZigZag Attention, arXiv 2512.23966): first and last blocks only.

Legend: B batch, T current tokens, K = block size * (sink blocks + local blocks).
"""

import torch
from torch import Tensor

from posttrain.model.config import Longcat2Config
from posttrain.model.visibility import Visibility


def streaming_columns(visibility: Visibility, config: Longcat2Config) -> Tensor:
    """Columns of every current token, int32 [1 or B, T, K], -1 for none: the sink blocks, and its own block with those
    before it."""
    block, sinks = config.streaming_block_size, config.streaming_sink_blocks * config.streaming_block_size
    own_BT = visibility.own_rank_BT()
    # clamped to the end of the sinks, so that no column comes twice
    left_BT = ((own_BT // block - config.streaming_local_blocks + 1) * block).clamp(min=sinks)
    steps = torch.arange(block * config.streaming_local_blocks, device=own_BT.device)
    local_BTK = left_BT.unsqueeze(-1) + steps
    sink_BTK = torch.arange(sinks, device=own_BT.device).expand(*own_BT.shape, -1)
    return visibility.columns_of(torch.cat((sink_BTK, local_BTK), dim=-1)).to(torch.int32)
