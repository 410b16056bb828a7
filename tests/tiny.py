"""Tiny models and adapters, built on the spot; no hub, no file of the repository."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 61
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of two layers whose output varies with its input."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = functools.partial(_exact_norm, module)
    return model


def _exact_norm(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour through float32, which would drown finite differences."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2, whose layers are Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def lora(base: Any, seed: int = 1, dtype: torch.dtype | None = None, **changes: Any) -> PeftModel:
    """A LoRA adapter with random, unequal components on a base."""
    torch.manual_seed(seed)
    settings = dict(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        lora_dropout=0.1,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, LoraConfig(**{**settings, **changes}), autocast_adapter_dtype=dtype is None)
    if dtype is not None:
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(dtype)
    return model.eval()


def batch(rows: int = 3, length: int = 9, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens, right-padded to different lengths, with labels on a different tail of each row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.tensor([length - i for i in range(rows)])
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    answer = torch.arange(length) >= (lengths - 2 - torch.arange(rows))[:, None]
    labels = torch.where(answer & attention_mask.bool(), input_ids, -100)
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "labels": labels,
    }


def loss(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per-example mean negative log-likelihood of the labelled tokens, from all logits."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    mask = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(chosen * mask).sum(1) / mask.sum(1)


def tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer with beginning, end and padding tokens, within the tiny vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:?!#\n"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rows(count: int = 12) -> list[dict[str, str]]:
    """Distinct prompts and answers that the tokenizer knows."""
    return [{"prompt": f"double {i}:", "answer": str(2 * i)} for i in range(count)]


@dataclass(frozen=True)
class World:
    """A base model, an adapter and rows on disk."""

    base: Path
    adapter: Path
    data: Path


def world(folder: Path, **changes: Any) -> World:
    """Saves a tiny base model with its tokenizer, an adapter that records it, and rows."""
    there = World(folder / "base", folder / "adapter", folder / "rows.jsonl")
    base = llama()
    base.save_pretrained(there.base)
    tokenizer().save_pretrained(there.base)
    base.config.name_or_path = base.name_or_path = str(there.base)
    lora(base, **changes).save_pretrained(there.adapter)
    there.data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return there
