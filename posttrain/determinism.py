"""Two runs with the same seed give the same bits. On a CPU they do anyway; on CUDA, sums whose order is not fixed would
break it. These are the ones in this system, and what ``enforce`` makes of them:

* ``index_add`` where the MoE puts its rows together (``model/moe.py``) and where chosen columns get their gradient
  (``model/sparse.py``, ``model/index_loss.py``); the gradients of ``gather``, ``index_select`` and of embeddings: torch
  sorts before it adds;
* the Triton kernel for attention over chosen tokens, whose gradient for the latents adds atomically: the plain path is
  taken instead;
* fused dense attention: its backward pass takes a fixed order;
* cuBLAS: a fixed workspace, so that it does not split sums by what is free.

What has no fixed order and no replacement makes torch raise a RuntimeError that names it. Left to the caller: the same
number of processes and threads, and the same split into micro-batches, since a sum over parts is not the sum over all.
"""

import os

import torch


def enforce() -> None:
    """Fix the order of every sum of this process from now on. Before the first use of CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
