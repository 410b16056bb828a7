"""Module paths for the flat names of LoRA files: ``lora_unet_input_blocks_4_..._to_q`` -> ``unet.input_blocks.4...``.

kohya's format writes a module's path with underscores for dots, so what is one name (``to_q``) and what is two cannot
be told from the name alone. The names that image and text models use are known; what is not is split at every
underscore. The paths are for people, for selecting and for grouping; tensors keep their own names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
"""What stands after ``lora_``, where it is not the component's own name."""
WORDS = (
    "adaLN_modulation", "adaln_single", "add_embedding", "add_k_proj", "add_q_proj", "add_v_proj", "audio_attn",
    "caption_projection", "context_block", "context_embedder", "conv_in", "conv_out", "conv_shortcut",
    "cross_attn", "double_blocks", "down_blocks", "down_proj", "emb_layers", "ff_context", "final_layer",
    "final_layer_norm", "gate_proj", "guidance_embedder", "guidance_in", "img_attn", "img_emb", "img_in",
    "img_mlp", "img_mod", "in_layers", "in_proj", "input_blocks", "joint_blocks", "k_img", "k_proj", "label_emb",
    "layer_norm1", "layer_norm2", "linear_1", "linear_2", "mid_block", "middle_block", "norm1_context", "norm_out",
    "o_proj", "out_layers", "out_proj", "output_blocks", "patch_embedding", "proj_in", "proj_mlp", "proj_out",
    "q_proj", "self_attn", "single_blocks", "single_transformer_blocks", "skip_connection", "text_embedding",
    "text_embedder", "text_model", "text_projection", "time_emb_proj", "time_embed", "time_embedding", "time_in",
    "time_projection", "time_text_embed", "timestep_embedder", "to_add_out", "to_k", "to_out", "to_q", "to_v",
    "token_embedding", "transformer_blocks", "txt_attn", "txt_in", "txt_mlp", "txt_mod", "up_blocks", "up_proj",
    "v_img", "v_proj", "vector_in", "wi_0", "wi_1", "x_block", "x_embedder",
)  # fmt: skip
"""Names with an underscore in them."""
FLAT = re.compile(r"lora_(?P<component>[a-z0-9]+)_(?P<rest>[^.]+)")
PART = re.compile(rf"_({'|'.join(sorted(WORDS, key=len, reverse=True))}|[^_]+)(?=_|$)")


def dotted(names: Iterable[str]) -> dict[str, str]:
    """Returns a dotted module path for every name; names that would share one keep their own."""
    paths = {name: _dotted(name) for name in names}
    counts = Counter(paths.values())
    return {name: path if counts[path] == 1 else name for name, path in paths.items()}


def _dotted(name: str) -> str:
    match = FLAT.fullmatch(name)
    if not match:
        return name
    component = COMPONENTS.get(match["component"], match["component"])
    return ".".join([component, *PART.findall("_" + match["rest"])])
