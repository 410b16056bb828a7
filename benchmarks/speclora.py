"""Step time and memory of SpecLoRA beside plain LoRA and the naive mask: ``python benchmarks/speclora.py``.

A Llama of random weights does whole training steps (forward, backward, AdamW) with four kinds of adapters. Times are
taken in turns within one process, so that what else the machine does meets all kinds alike, and are printed as ratios
to plain LoRA of the same rank, with the median over rounds; on a CPU it is the process's own time, which a busy
machine stretches less. Memory is counted, not sampled: what autograd keeps from the forward for the backward pass.

``naive`` multiplies the weight by Gamma in every forward pass, as the formula reads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_surgery.speclora import SpecLoraConfig
from spectral_surgery.tables import table

KINDS = ("lora", "first", "random", "svd", "naive")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    hidden: int = 1024
    """Width of the model; its feed-forward part is 2.75 times as wide."""
    layers: int = 2
    """Transformer layers."""
    rows: int = 4
    """Texts in a batch."""
    tokens: int = 128
    """Tokens in a text."""
    rank: int = 16
    """LoRA rank."""
    k: int = 200
    """Scaled rows or directions of a module."""
    rounds: int = 11
    """Steps of each kind that are timed."""
    dtype: str = "float32"
    """Of the base model."""
    device: str = "cpu"
    """Where it runs."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""


class Naive(nn.Module):
    """A linear layer that multiplies its weight by Gamma, beside its LoRA layer."""

    def __init__(self, base: nn.Linear, k: int) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros(k, 1, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(Gamma * W) x + b``."""
        gamma = torch.cat([1 + self.delta, self.delta.new_ones(len(self.base.weight) - len(self.delta), 1)])
        return nn.functional.linear(x, gamma.to(x.dtype) * self.base.weight, self.base.bias)


def build(kind: str, sizes: Sizes) -> PeftModel:
    """Returns a model with one kind of adapter, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=sizes.hidden,
        intermediate_size=11 * sizes.hidden // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=sizes.hidden // 128,
    )
    base = LlamaForCausalLM(config).to(sizes.device, getattr(torch, sizes.dtype))
    lora: dict[str, Any] = dict(r=sizes.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    if kind in ("lora", "naive"):
        model = get_peft_model(base, LoraConfig(**lora))
    elif kind == "svd":
        model = get_peft_model(base, SpecLoraConfig(**lora, k=sizes.k, basis="svd"))
    else:
        model = get_peft_model(base, SpecLoraConfig(**lora, k=sizes.k, rows=kind))
    if kind == "naive":
        for module in list(model.modules()):
            if hasattr(module, "lora_A"):
                module.base_layer = Naive(module.base_layer, min(sizes.k, module.out_features))
    if sizes.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def stepper(model: PeftModel, sizes: Sizes) -> Callable[[], None]:
    """Returns a function that does one training step."""
    ids = torch.randint(0, 512, (sizes.rows, sizes.tokens), device=sizes.device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], sizes: Sizes) -> float:
    """Returns how long one step takes."""
    if sizes.device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    step()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def times(sizes: Sizes) -> dict[str, list[float]]:
    """Returns the seconds of every timed step of every kind, taken in turns."""
    steps = {kind: stepper(build(kind, sizes), sizes) for kind in KINDS}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_number in range(sizes.rounds):
        for shift in range(len(KINDS)):
            kind = KINDS[(round_number + shift) % len(KINDS)]
            found[kind].append(seconds(steps[kind], sizes))
    return found


def saved(kind: str, sizes: Sizes) -> int:
    """Returns the bytes that one forward pass keeps for the backward pass, parameters not counted."""
    model = build(kind, sizes)
    ids = torch.randint(0, 512, (sizes.rows, sizes.tokens), device=sizes.device)
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    total = sum(kept.values())
    loss.backward()
    return total


def main(sizes: Sizes) -> None:
    """Prints the table."""
    found = times(sizes)
    kept = {kind: saved(kind, sizes) for kind in KINDS}
    rows = []
    for kind in KINDS:
        ratios = [own / lora for own, lora in zip(found[kind], found["lora"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        cells = [f"{statistics.median(found[kind]):.3f}", f"{statistics.median(ratios):.2f}", spread]
        rows.append([kind, *cells, f"{kept[kind] / 2**20:.1f}", f"{kept[kind] / kept['lora']:.2f}"])
    print(table(["adapter", "s a step", "x LoRA", "over rounds", "MiB saved", "x LoRA"], rows))
    print(f"{sizes}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(tyro.cli(Sizes))
