"""What a model config comes to: parameters of every part, active parameters, cache bytes. Makes no model.

Legend: the formulas use the names of the config's fields; K_e is the number of routed slots that a token uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from posttrain.model.config import Longcat2Config

_BF16 = 2
"""Bytes of a value."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters, biases of the routers included."""

    mla: int
    dense: int
    routed: int
    """One SwiGLU of the routed bank."""
    router: int
    indexer: int
    """0: dense attention."""
    layer: int
    layers: int
    ngram_tables: int
    ngram_projections: int
    embedding_and_head: int
    total: int
    """All of the above, without the draft block."""
    always_active: int
    """What a token uses at K_e = 0: everything but the routed bank and the embedding rows that are not read."""
    per_routed_slot: int
    """What K_e + 1 adds to K_e, over all layers."""
    draft: int
    """The draft block, without a word embedding of its own; 0: none."""
    draft_embedding: int
    """The copy of the word embedding that official checkpoints hold for the draft block."""

    def active(self, slots: float) -> int:
        """Parameters that a token uses at K_e = ``slots``."""
        return round(self.always_active + slots * self.per_routed_slot)


def count(c: Longcat2Config) -> Counts:
    """Numbers of parameters by formula."""
    hidden, latent_q, latent_kv, heads = c.hidden_size, c.q_lora_rank, c.kv_lora_rank, c.num_attention_heads
    nope, rope, value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    queries = hidden * latent_q + latent_q + latent_q * heads * (nope + rope)
    keys_values = hidden * (latent_kv + rope) + latent_kv + latent_kv * heads * (nope + value)
    mla = queries + keys_values + heads * value * hidden
    dense, routed = 3 * hidden * c.ffn_hidden_size, 3 * hidden * c.expert_ffn_hidden_size
    router = c.num_moe_slots * (hidden + 1)
    width, index_heads = c.index_head_dim, c.index_n_heads
    indexer = (latent_q * index_heads + hidden + 1) * width + hidden * index_heads if c.use_lsa else 0
    common = 2 * mla + 2 * dense + router + 2 // c.cli_factor * indexer + 4 * hidden
    layer = common + c.n_routed_experts * routed
    tables, head = c.num_ngram_tables, c.vocab_size * hidden
    rows = tables * int((c.oe_vocab_size_ratio or 0) * c.vocab_size) + tables**2  # the t-th table has 2 t + 1 more
    ngram_tables = hidden // tables * rows if tables else 0
    ngram_projections = hidden * hidden if tables else 0
    draft = 2 * hidden * hidden + mla + indexer + dense + 5 * hidden
    return Counts(
        mla=mla,
        dense=dense,
        routed=routed,
        router=router,
        indexer=indexer,
        layer=layer,
        layers=c.num_layers * layer,
        ngram_tables=ngram_tables,
        ngram_projections=ngram_projections,
        embedding_and_head=2 * head,
        total=c.num_layers * layer + ngram_tables + ngram_projections + 2 * head + hidden,
        always_active=c.num_layers * common + ngram_projections + head + hidden,
        per_routed_slot=c.num_layers * routed,
        draft=draft if c.mtp_num_layers else 0,
        draft_embedding=head if c.mtp_num_layers else 0,
    )


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes that a token takes in a bf16 cache."""

    latents: int
    """Latents and rotary keys of all attentions."""
    index_keys: int
    draft: int
    """Both kinds, of the draft block."""


def cache_bytes(c: Longcat2Config) -> CacheBytes:
    """Bytes a token by formula."""
    latents = (c.kv_lora_rank + c.qk_rope_head_dim) * _BF16
    key = c.index_head_dim * _BF16 if c.use_lsa else 0
    attentions = c.num_attentions
    return CacheBytes(
        latents=attentions * latents,
        index_keys=attentions // c.cli_factor * key,
        draft=latents + key if c.mtp_num_layers else 0,
    )


def tables(c: Longcat2Config) -> list[Table]:
    """For a terminal: parameters, active parameters, the draft block if there is one, the cache."""
    n, cache = count(c), cache_bytes(c)
    found = [
        _table(
            "Parameters",
            {
                "MLA (one attention)": n.mla,
                "dense FFN": n.dense,
                "one routed SwiGLU": n.routed,
                "router": n.router,
                "indexer": n.indexer,
                "one layer": n.layer,
                f"all {c.num_layers} layers": n.layers,
                "n-gram tables": n.ngram_tables,
                "n-gram projections": n.ngram_projections,
                "embedding + head": n.embedding_and_head,
                "total": n.total,
            },
        ),
        _table("Active for a token", _active(c, n), "Embedding and n-gram rows do not count."),
    ]
    if n.draft:
        found.append(
            _table(
                "MTP block (not in the total)",
                {"without an embedding": n.draft, "with its own embedding copy": n.draft + n.draft_embedding},
            )
        )
    bytes_of = {"latents + rotary keys": cache.latents, "index keys": cache.index_keys, "MTP block": cache.draft}
    found.append(_table("Cache bytes a token, bf16", {**bytes_of, "all": sum(bytes_of.values())}))
    return found


def _active(c: Longcat2Config, n: Counts) -> dict[str, int]:
    """Rows for the values of K_e that are spoken of, and for the one that the config aims at."""
    notes = {0: "", 8: "", c.moe_target_topk: " (moe_target_topk)", c.moe_topk: " (moe_topk)"}
    values = sorted(slots for slots in notes if slots is not None and slots <= c.moe_topk)
    rows = {f"K_e = {slots:g}{notes[slots]}": n.active(slots) for slots in values}
    return {**rows, "each unit of K_e": n.per_routed_slot}


def _table(title: str, rows: dict[str, int], caption: str | None = None) -> Table:
    """Rows of zero are left out."""
    table = Table("part", title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("exactly", justify="right")
    table.add_column("short", justify="right")
    for name, value in rows.items():
        if value:
            table.add_row(name, f"{value:,}", short(value))
    return table


def short(number: int) -> str:
    """``111_684_608`` as ``111.685 M``."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.{2 if number >= 1000 * size else 3}f}{unit}"
    return str(number)
