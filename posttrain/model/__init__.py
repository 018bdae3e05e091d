"""LongCat-2.0 style model for transformers; importing this package registers ``model_type`` "longcat2".

On disk the official per-expert weight names are used; in memory the routed SwiGLUs are fused. The mapping is
transformers' public weight conversion, so ``from_pretrained`` and ``save_pretrained`` both speak official names.
``posttrain.model.checkpoint`` reads and writes whole official folders, strictly and in the memory of one model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from posttrain.model.causal import Longcat2ForCausalLM
from posttrain.model.checkpoint import LITE_NAMES
from posttrain.model.config import Longcat2Config
from posttrain.model.model import Longcat2Model

__all__ = ["Longcat2Config", "Longcat2ForCausalLM", "Longcat2Model"]


class _LiteName(WeightRenaming):
    """Another family's name of a weight: read, never written."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """A renaming that no name matches."""
        return WeightRenaming("$.", "")


def _register() -> None:
    """Registers config, models and weight names; safe to call twice."""
    AutoConfig.register(Longcat2Config.model_type, Longcat2Config, exist_ok=True)
    AutoModel.register(Longcat2Config, Longcat2Model, exist_ok=True)
    AutoModelForCausalLM.register(Longcat2Config, Longcat2ForCausalLM, exist_ok=True)
    mapping: list[WeightConverter | WeightRenaming] = [
        *(_LiteName(lite, ours) for lite, ours in LITE_NAMES.items()),
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    # By class too: the config of a Flash or Flash-Lite folder keeps the folder's model_type.
    for key in (Longcat2Config.model_type, Longcat2ForCausalLM.__name__, Longcat2Model.__name__):
        register_checkpoint_conversion_mapping(key, mapping, overwrite=True)


_register()
