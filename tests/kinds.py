"""Every kind of adapter, built by PEFT on tiny models, beside its update written out densely from the file's tensors.

The dense formulas (:mod:`dense_kinds`) are put into a copy of the base model, so what is compared is what whole models
compute.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from dense_kinds import (
    ALPHA,
    INVOCATION,
    RANK,
    Deltas,
    Put,
    adaptive,
    add,
    add_biases,
    add_to_experts,
    add_twice,
    attended,
    blocked,
    embedded,
    everything,
    from_invocation,
    kasa,
    patterned,
    plain,
    repeat_and_add,
    rescale,
    stacked,
    truncate_and_add,
)
from peft import (
    AdaLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


class Net(nn.Module):
    """A classifier of random vectors around one layer."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shape = shape
        self.layer = copy.deepcopy(layer)
        for weight in self.layer.parameters():
            nn.init.normal_(weight, std=0.3)
        with torch.no_grad():
            width = self._features(torch.zeros(1, *shape)).shape[1]
        self.out = nn.Linear(width, 6)

    def _features(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention) or hasattr(self.layer, "num_heads"):
            return self.layer(x, x, x)[0].tanh().flatten(1)
        return self.layer(x).tanh().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.out(self._features(x))


def vectors(model: Any, rows: int = 3) -> dict[str, Tensor]:
    """Random inputs of a :class:`Net`, with labels."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, *base.shape, generator=generator, dtype=base.out.weight.dtype)
    return {"x": x, "labels": torch.arange(rows)}


def of_vectors(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a :class:`Net`."""
    return model(batch["x"])


def tokens(model: Any, rows: int = 3) -> dict[str, Tensor]:
    """Random tokens."""
    return tiny.batch(rows)


def invoked(model: Any, rows: int = 3) -> dict[str, Tensor]:
    """Random tokens with the invocation tokens in them, further back in every row."""
    batch = tiny.batch(rows)
    for i in range(rows):
        batch["input_ids"][i, 2 + i : 4 + i] = torch.tensor(INVOCATION)
    return batch


def of_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a language model at real tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits * batch["attention_mask"][..., None]


def vector_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Per-example cross-entropy of a :class:`Net`."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def qwen_moe() -> Any:
    """A random Qwen3 of four experts, whose gate and up projections are fused."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, moe_intermediate_size=12)
    heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    return eager(Qwen3MoeForCausalLM(config))


def gpt_oss() -> Any:
    """A random gpt-oss of four experts, whose weights are stored transposed."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3)
    return eager(GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)))


def gemma() -> Any:
    """A random Gemma 3, which multiplies its embeddings."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, tie_word_embeddings=False, pad_token_id=0)).eval()


def eager(model: Any) -> Any:
    """The model with its experts computed one by one, as they also are in float64."""
    model.set_experts_implementation("eager")
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of adapter on one tiny model."""

    kind: str
    """The kind's name in the registry."""
    what: str
    """What is adapted."""
    base: Callable[[], Any] = tiny.llama
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    deltas: Callable[[dict[str, Tensor], dict[str, Any]], Deltas] = plain
    put: Put = add
    inputs: Callable[..., dict[str, Tensor]] = tokens
    logits: Callable[[Any, dict[str, Tensor]], Tensor] = of_tokens
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = tiny.loss
    config: Any = LoraConfig
    alone: bool = False
    """Whether it is measured one example at a time."""
    step: float = 1e-5
    """Step of finite differences; larger where the model itself works in float32."""

    def fresh(self, dtype: torch.dtype = torch.float32) -> Any:
        """The base model, the same every time."""
        return precise(self.base().to(dtype))

    def adapted(self, dtype: torch.dtype = torch.float32, stored: torch.dtype | None = None) -> PeftModel:
        """The base with a random adapter, in a dtype, its values rounded to the stored dtype."""
        torch.manual_seed(1)
        usual: dict[str, Any] = dict(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
        if self.config is LoraConfig:
            usual |= dict(r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
        if self.logits is of_tokens:
            usual["task_type"] = "CAUSAL_LM"
        model = get_peft_model(self.fresh(), self.config(**(usual | copy.deepcopy(self.settings))))
        generator = torch.Generator().manual_seed(5)
        seen: set[int] = set()
        for name, weight in model.named_parameters():
            if "lora_" not in name or "monteclora" in name or weight.data_ptr() in seen:
                continue
            seen.add(weight.data_ptr())
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_(noise.abs() + 0.5 if "magnitude" in name else 0.3 * noise)
        for name, weight in model.named_parameters():
            if "lora_" in name and stored is not None:
                weight.data = weight.data.to(stored)
        model = precise(model.to(dtype)) if stored is None else model
        return model.eval()

    def reloaded(self, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
        """What stock PEFT loads from a folder."""
        return PeftModel.from_pretrained(self.fresh(dtype), str(folder)).eval()

    def dense(self, folder: Path, config: dict[str, Any], gates: dict[str, np.ndarray] | None) -> Any:
        """The base model in float64 with the gated dense update of the file in its weights."""
        tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        deltas = self.deltas(tensors, config)
        if gates is not None:
            deltas = {path: gated(delta, gates.get(path, np.ones(0))) for path, delta in deltas.items()}
        base = self.fresh(torch.float64)
        with torch.no_grad():
            self.put(base, self.inputs(base), deltas, tensors)
        return base


def precise(model: Any) -> Any:
    """The model with norms that do not go through float32 where it is in float64."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and module.weight.dtype == torch.float64:
            module.forward = functools.partial(tiny._exact_norm, module)
    return model


def gated(delta: Tensor, gates: np.ndarray) -> Tensor:
    """The update with its leading singular values multiplied, by a dense SVD."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = len(gates)
    return (U[:, :k] * (S[:k] * torch.from_numpy(gates))) @ Vh[:k]


def net(layer: nn.Module, *shape: int) -> Callable[[], Net]:
    """Builds a :class:`Net`."""
    return lambda: Net(layer, shape).eval()


NET: dict[str, Any] = dict(inputs=vectors, logits=of_vectors, loss=vector_loss)
LAYER: dict[str, Any] = {"target_modules": ["layer"]}
EXPERTS: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {"experts.down_proj": 2},
}
LINEAR, CONV, EMBEDDING = "LoRA on linear layers", "LoRA on convolutions", "LoRA on embeddings"
STACKED, ATTENTION = "LoRA on parameters (experts)", "LoRA on nn.MultiheadAttention"


def tied_llama() -> Any:
    """A Llama whose output head is its input embedding."""
    return tiny.llama(tie_word_embeddings=True)


def biased_llama() -> Any:
    """A Llama with biases."""
    return tiny.llama(attention_bias=True, mlp_bias=True)


CASES = {
    "linear": Case(LINEAR, "nn.Linear"),
    "patterns": Case(
        LINEAR,
        "rsLoRA, rank_pattern, alpha_pattern",
        settings={"use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"v_proj": 7}},
        deltas=patterned,
    ),
    "conv1d_gpt2": Case(
        LINEAR, "GPT-2's Conv1D", tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    ),
    "lora_bias": Case(LINEAR, "lora_bias", biased_llama, {"lora_bias": True}, put=add_biases),
    "layer_replication": Case(
        LINEAR, "layer_replication", settings={"layer_replication": [[0, 2], [0, 2]]}, put=repeat_and_add
    ),
    "head": Case(LINEAR, "with lm_head", settings={"target_modules": ["o_proj", "lm_head"]}),
    "conv1d": Case(CONV, "Conv1d", net(nn.Conv1d(4, 7, 3, padding=1), 4, 8), LAYER, **NET),
    "conv2d": Case(CONV, "Conv2d, stride 2", net(nn.Conv2d(4, 7, 3, stride=2), 4, 8, 8), LAYER, **NET),
    "conv2d_1x1": Case(CONV, "Conv2d, 1x1", net(nn.Conv2d(6, 7, 1), 6, 4, 4), LAYER, **NET),
    "conv3d": Case(CONV, "Conv3d", net(nn.Conv3d(3, 5, 2), 3, 4, 4, 4), LAYER, **NET),
    "embedding": Case(
        EMBEDDING,
        "embed_tokens and lm_head",
        settings={"target_modules": ["embed_tokens", "lm_head"]},
        deltas=everything,
    ),
    "embedding_scaled": Case(
        EMBEDDING,
        "Gemma 3's embed_tokens, which it multiplies",
        gemma,
        {"target_modules": ["embed_tokens"]},
        deltas=embedded,
        step=2e-3,
    ),
    "tied": Case(
        EMBEDDING,
        "tied embed_tokens and lm_head",
        tied_llama,
        {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
        deltas=lambda tensors, config: {
            path: delta for path, delta in everything(tensors, config).items() if path != "lm_head"
        },
    ),
    "experts": Case(
        STACKED, "Qwen3-MoE, fused gate_up_proj", qwen_moe, EXPERTS, stacked, add_to_experts, alone=True, step=2e-3
    ),
    "experts_transposed": Case(
        STACKED, "gpt-oss, transposed experts", gpt_oss, EXPERTS, stacked, add_to_experts, alone=True
    ),
    "parameter": Case(
        STACKED,
        "one weight by target_parameters",
        settings={"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
        alone=True,
    ),
    "attention": Case(
        ATTENTION,
        "nn.MultiheadAttention",
        net(nn.MultiheadAttention(8, 2, batch_first=True), 5, 8),
        LAYER,
        attended,
        add_twice,
        alone=True,
        **NET,
    ),
    "dora": Case("DoRA", "nn.Linear with bias", biased_llama, {"use_dora": True}, put=rescale),
    "dora_conv1d_gpt2": Case(
        "DoRA",
        "GPT-2's Conv1D",
        tiny.gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        put=rescale,
    ),
    "dora_conv2d": Case(
        "DoRA", "Conv2d", net(nn.Conv2d(4, 7, 3), 4, 6, 6), LAYER | {"use_dora": True}, put=rescale, **NET
    ),
    "dora_embedding": Case(
        "DoRA",
        "embed_tokens",
        settings={"target_modules": ["embed_tokens"], "use_dora": True},
        deltas=embedded,
        put=rescale,
    ),
    "kasa": Case("KaSA", "nn.Linear", settings={"kasa_config": KasaConfig()}, deltas=kasa, put=truncate_and_add),
    "bdlora": Case(
        "BD-LoRA",
        "B in blocks on q_proj, A on o_proj",
        settings={
            "target_modules": ["q_proj", "o_proj"],
            "r": 4,
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
        },
        deltas=blocked,
    ),
    "mica": Case(
        "MiCA",
        "nn.Linear and embed_tokens",
        settings={"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"},
        deltas=everything,
    ),
    "alora": Case(
        "aLoRA",
        "nn.Linear",
        settings={"alora_invocation_tokens": INVOCATION},
        put=from_invocation,
        inputs=invoked,
        alone=True,
    ),
    "velora": Case("VeLoRA", "nn.Linear", settings={"velora_config": VeloraConfig()}),
    "monteclora": Case(
        "MonteCLoRA", "nn.Linear", settings={"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)}
    ),
    "adalora": Case(
        "AdaLoRA",
        "nn.Linear",
        settings={"init_r": 5, "target_r": 3, "lora_alpha": ALPHA, "total_step": 10, "tinit": 1, "tfinal": 1},
        deltas=adaptive,
        config=AdaLoraConfig,
    ),
}
