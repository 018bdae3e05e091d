"""Official checkpoint folders, read and written tensor by tensor.

In memory the routed SwiGLUs of a layer are fused into two tensors; on disk every one has three of its own.
``official_views`` gives each official name the part of the model's memory that holds its weight, and that is all that
reading and writing need: no tensor is made that the model does not keep. (``from_pretrained`` reads the same folders,
but holds two copies on the way, fills what is missing at random with no more than a warning, and does not compare the
draft block's copy of the word embedding.)
"""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from posttrain.errors import UserError
from posttrain.files import new_folder, write_json
from posttrain.model.causal import Longcat2ForCausalLM
from posttrain.model.config import Longcat2Config
from posttrain.model.config_files import NgramNames, is_longcat, official_config, read_config, read_layer

Part = Literal["indexer", "mtp"]
"""What may be added to trained weights: their own losses train them while the rest stands still."""

LITE_NAMES = {
    r"ngram_embeddings\.embedders\.(\d+)\.weight": r"oe_embed_tokens\1.weight",
    r"ngram_embeddings\.post_projs\.(\d+)\.weight": r"oe_embed_proj\1.weight",
}
"""Flash-Lite's names of the n-gram weights, as patterns -> ours."""

DRAFT_EMBEDDING = "model.mtp.embed_tokens.weight"
"""Official checkpoints hold a copy of the word embedding under this name; the model here has one for both."""

_EMBEDDING = "model.embed_tokens.weight"
_INDEX = "model.safetensors.index.json"
_READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ADDITIONS: tuple[tuple[Part, ...], ...] = (("mtp",), ("indexer",), ("indexer", "mtp"))
_SWITCHES = ("mla_scale_q_lora", "mla_scale_kv_lora")
_SHOWN = 4
"""Names that an error lists."""

_log = logging.getLogger(__name__)


class _Stored(NamedTuple):
    file: Path
    name: str
    """In the file."""
    dtype: str
    shape: tuple[int, ...]


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    fresh: Collection[Part] = (),
    **changes: Any,
) -> Longcat2ForCausalLM:
    """The model of a LongCat folder, in eval mode: official (either family's names), or written by ``save_pretrained``.

    Args:
        dtype: of the weights but those that are always float32; None: the config's, or else the word embedding's.
        fresh: parts that start at random if the folder does not hold them.
        changes: config fields in place of the folder's: ``index_topk=2048, fresh=("indexer",)`` makes a dense model
            sparse. A draft block or indexers that the config does not ask for are left out.

    Raises:
        UserError: bad config; weights that are missing, of another shape, without a place in the model, or quantised;
            or a draft block that has a word embedding of its own.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one with config.json and *.safetensors")
    folded = bool(read_layer(folder).data.get("fold_mla_scales"))
    if folded:  # by ``save_official``
        changes |= {"fold_mla_scales": False, **dict.fromkeys(_SWITCHES, True)}
    config = read_config(folder, **changes)
    stored = _contents(folder)
    with torch.device("meta"):
        model: Longcat2ForCausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype or _dtype(config, stored))
    missing = _compare(folder, dict(official_views(model)), stored, fresh)
    model.to_empty(device=device)
    with torch.no_grad():
        model._init_weights(model.model.rotary)
        for name in missing:
            model._init_weights(model.get_submodule(name.rpartition(".")[0]))
        views = dict(official_views(model))
        _fill(views, stored, config, -1 if folded else 0)
        if model.model.mtp is not None and DRAFT_EMBEDDING in stored:
            _check_draft_embedding(views[_EMBEDDING], stored[DRAFT_EMBEDDING])
    if missing:
        _log.info("%s: started at random: %s", folder, _some(missing))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def load_any(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """``load`` for a LongCat folder, transformers' Auto class for any other causal language model."""
    if is_longcat(read_layer(Path(folder)).data):
        return load(folder, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def save_official(
    model: Longcat2ForCausalLM,
    folder: str | Path,
    max_shard_size: int = 5 * 10**9,
    ngram_names: NgramNames = "oe",
    fold_scales: bool = False,
) -> None:
    """Writes an official checkpoint folder: config, generation config, weights. Shard by shard, without a copy.

    Args:
        folder: a new or an empty one.
        max_shard_size: bytes; a larger tensor has a shard to itself.
        fold_scales: write the latent norms' weights times the variance scales, with both switches off and the field
            ``fold_mla_scales`` on: the same function to a reader that heeds the switches. ``load`` undoes it. Without
            it the weights are unfolded even if the model's are folded.

    Raises:
        UserError: the folder is in use, the family of ``ngram_names`` has no place for the model's indexers, or the
            model has no scales to fold.
    """
    folder, config = Path(folder), model.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is in use; give a new folder")
    if ngram_names == "lite" and config.use_lsa:
        raise UserError(
            f'{folder}: Flash-Lite has no place for indexers; take ngram_names="oe", or set index_topk to 0'
        )
    fields, turns = official_config(config, str(model.dtype).removeprefix("torch."), ngram_names), 0
    if fold_scales != _is_folded(config):
        turns = 1 if fold_scales else -1
        _require_scales(config, on=fold_scales)
        fields |= dict.fromkeys(_SWITCHES, not fold_scales)
    if fold_scales:
        fields["fold_mla_scales"] = True
    shards = _shards(model, max_shard_size)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    places: dict[str, str] = {}
    with new_folder(folder) as partial:
        write_json(partial / "config.json", fields)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        for file, shard in zip(names, shards, strict=True):
            tensors = {_on_disk(name, ngram_names): _turned(name, t, config, turns) for name, t in shard.items()}
            # safetensors refuses two names of one memory
            if DRAFT_EMBEDDING in tensors:
                tensors[DRAFT_EMBEDDING] = tensors[DRAFT_EMBEDDING].clone()
            save_file(tensors, partial / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            write_json(partial / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def fold_scales(model: Longcat2ForCausalLM) -> Longcat2ForCausalLM:
    """The same function with the variance scales inside the latent norms' weights, as SGLang and vLLM hold it in
    memory, and the config's switches off. All other weights are shared with ``model``.

    Raises:
        UserError: a switch is off.
    """
    return _rescaled(model, 1)


def unfold_scales(model: Longcat2ForCausalLM) -> Longcat2ForCausalLM:
    """Undoes ``fold_scales``, up to rounding. All other weights are shared with ``model``.

    Raises:
        UserError: a switch is on.
    """
    return _rescaled(model, -1)


def official_views(model: Longcat2ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Official names (``oe_*``) and the parts of the model's memory that hold their weights."""
    for name, tensor in model.state_dict().items():
        bank, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for n, both in enumerate(tensor):
                gate, up = both.chunk(2)
                yield f"{bank}.{n}.gate_proj.weight", gate
                yield f"{bank}.{n}.up_proj.weight", up
        elif kind == "down_proj":
            for n, down in enumerate(tensor):
                yield f"{bank}.{n}.down_proj.weight", down
        else:
            yield name, tensor


def _contents(folder: Path) -> dict[str, _Stored]:
    """All weights of a folder by their ``oe_*`` names. Reads the files' headers."""
    index = folder / _INDEX
    files = [folder / "model.safetensors"]
    if index.is_file():
        places = read_layer(index).data.get("weight_map") or {}
        files = sorted({folder / str(file) for file in places.values()})
    found: dict[str, _Stored] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: this file of the checkpoint is not there; fetch the folder again")
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                stored = _Stored(file, name, part.get_dtype(), tuple(part.get_shape()))
                if stored.dtype not in _READABLE:
                    raise UserError(
                        f"{file}: {name} is stored as {stored.dtype}: quantised weights are not read; "
                        "take the bf16 or float32 checkpoint of this model"
                    )
                found[_in_memory(name)] = stored
    return found


def _dtype(config: Longcat2Config, stored: Mapping[str, _Stored]) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return _READABLE[stored[_EMBEDDING].dtype] if _EMBEDDING in stored else torch.float32


def _compare(
    folder: Path, views: Mapping[str, Tensor], stored: Mapping[str, _Stored], fresh: Collection[Part]
) -> list[str]:
    """Names of weights that start at random. Raises UserError if model and folder are not of one shape."""
    missing = [name for name in views if name not in stored]
    if lacking := [name for name in missing if not _belongs(name, fresh)]:
        parts = next((p for p in _ADDITIONS if all(_belongs(name, p) for name in lacking)), None)
        cure = "fetch the folder again"
        if parts:
            off = " and ".join({"mtp": "mtp_num_layers=0", "indexer": "index_topk=0"}[part] for part in parts)
            cure = f"fresh={parts!r} starts them at random, {off} does without"
        raise UserError(f"{folder}: {len(lacking)} weights are not there: {_some(lacking)}; {cure}")
    if surplus := [name for name in stored if name not in views and not _optional(name, views)]:
        raise UserError(
            f"{folder}: the config has no place for {len(surplus)} weights: {_some(surplus)}; "
            "correct config.json so that it describes them"
        )
    for name, view in views.items():
        if name in stored and stored[name].shape != tuple(view.shape):
            raise UserError(
                f"{stored[name].file}: {stored[name].name} has the shape {list(stored[name].shape)}, by config.json "
                f"it is {list(view.shape)}; correct config.json, or fetch the folder again"
            )
    return missing


def _optional(name: str, views: Mapping[str, Tensor]) -> bool:
    """Whether a stored weight may be left: a part that is switched off, or what the draft block has no use for."""
    if name == DRAFT_EMBEDDING or name.startswith("model.mtp.oe_embed_"):
        return True
    off: list[Part] = [part for part in _ADDITIONS[-1] if not any(_belongs(known, (part,)) for known in views)]
    return _belongs(name, off)


def _belongs(name: str, parts: Collection[Part]) -> bool:
    return any(f".{part}." in name for part in parts)


def _fill(views: Mapping[str, Tensor], stored: Mapping[str, _Stored], config: Longcat2Config, turns: int) -> None:
    """Copies one file after the other, so that no more than one is mapped. ``turns``: see ``_turned``."""
    by_file: defaultdict[Path, list[str]] = defaultdict(list)
    for name in views:
        if name in stored:
            by_file[stored[name].file].append(name)
    for file, names in by_file.items():
        with safe_open(file, "pt") as opened:
            for name in names:
                views[name].copy_(_turned(name, opened.get_tensor(stored[name].name), config, turns))


def _check_draft_embedding(embedding_VH: Tensor, stored: _Stored, rows: int = 4096) -> None:
    with safe_open(stored.file, "pt") as opened:
        part = opened.get_slice(stored.name)
        same = stored.shape == tuple(embedding_VH.shape) and all(
            torch.equal(part[at : at + rows].to(own_VH.device, own_VH.dtype), own_VH)
            for at, own_VH in zip(range(0, len(embedding_VH), rows), embedding_VH.split(rows), strict=True)
        )
    if not same:
        raise UserError(
            f"{stored.file}: {stored.name} differs from {_EMBEDDING}: a draft block with a word embedding of its own "
            "is not implemented; mtp_num_layers=0 reads the model without it"
        )


def _shards(model: Longcat2ForCausalLM, max_bytes: int) -> list[dict[str, Tensor]]:
    """The weights in the order of the model, each in the first shard that it still fits."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in _written(model):
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _written(model: Longcat2ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from official_views(model)
    if model.model.mtp is not None:
        yield DRAFT_EMBEDDING, model.model.embed_tokens.weight.detach()


def _rescaled(model: Longcat2ForCausalLM, turns: int) -> Longcat2ForCausalLM:
    folds = turns == 1
    _require_scales(model.config, on=folds)
    config = copy.deepcopy(model.config)
    config.update({"fold_mla_scales": folds, **dict.fromkeys(_SWITCHES, not folds)})
    with torch.device("meta"):
        other = Longcat2ForCausalLM(config)
    state = {name: _turned(name, tensor, config, turns) for name, tensor in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    other.model.rotary.inv_freq = model.model.rotary.inv_freq
    other.generation_config = model.generation_config
    return other.train(model.training)


def _turned(name: str, tensor: Tensor, config: Longcat2Config, turns: int) -> Tensor:
    """A latent norm's weight times (``turns`` 1) or divided by (-1) its variance scale; others as they are."""
    rank = {"q_a_layernorm": config.q_lora_rank, "kv_a_layernorm": config.kv_lora_rank}.get(name.split(".")[-2])
    if rank is None or not turns:
        return tensor
    return (tensor.double() * (config.hidden_size / rank) ** (turns / 2)).to(tensor.dtype)


def _is_folded(config: Longcat2Config) -> bool:
    return bool(getattr(config, "fold_mla_scales", False))


def _require_scales(config: Longcat2Config, on: bool) -> None:
    if any(getattr(config, switch) != on for switch in _SWITCHES):
        what = "fold: one of them is off already" if on else "unfold: one of them is on still"
        raise UserError(f"{' and '.join(_SWITCHES)} leave no scales to {what}")


def _in_memory(name: str) -> str:
    for lite, ours in LITE_NAMES.items():
        name = re.sub(lite, ours, name)
    return name


def _on_disk(name: str, names: NgramNames) -> str:
    """The official name of the wanted family for an ``oe_*`` name."""
    if names == "lite":
        name = re.sub(r"^model\.oe_embed_tokens(\d+)\.", r"model.ngram_embeddings.embedders.\1.", name)
        name = re.sub(r"^model\.oe_embed_proj(\d+)\.", r"model.ngram_embeddings.post_projs.\1.", name)
    return name


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
