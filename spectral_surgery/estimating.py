"""What a measurement needs in memory and time, by arithmetic alone, before any weight is loaded.

Weights are counted on a skeleton of the base on the meta device. What autograd keeps is that of a decoder whose
weights are frozen, from the first edited layer on. Per token and layer, with b bytes a number, hidden size h, heads'
width a and feed-forward width f:

- two norms, which work in float32: 4h each (in a float32 model too, where it is the hidden state itself);
- attention: query, key, value and output as the kernel takes them, 4ab (sdpa or flash; eager keeps more);
- feed-forward: 3fb, the gate before and after its non-linearity and what it multiplies;
- component outputs of the gates: 4r a module.

With recomputed activations it is one hidden state a layer (bh), and one layer's whole while that is passed. Passing a
layer takes half as much again as it keeps. Before, at the other peak, there are the logits and their gradient at
answer tokens (2bV), in float32 in small pieces.
Rows that are packed into one sequence on a base without flash attention need a mask of every pair of their tokens: a
byte, and b bytes more in every layer whose activations are kept.
What the allocator wastes is not known beforehand; :data:`SLACK` is allowed for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import IGNORED, Tokenized, TokenizedExample
from spectral_surgery.formats import DataOptions
from spectral_surgery.live.loading import TASKS, default_device, load_config
from spectral_surgery.objective import AT_ONCE
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.packing import formed, is_wanted
from spectral_surgery.selection import Selection, layer, select

NF4 = 0.5 + 4 / 64
"""Bytes of a 4-bit weight: half of one, and a float32 scale for every 64."""
CPU_TOKENS = 512
"""Tokens of a batch on a CPU: larger ones are no faster there, and have more padding."""
SLACK = 0.1
"""Share of what is not weights that an allocator may waste."""
GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """Bytes that measuring one adapter on one base takes."""

    weights: int
    """Of the base."""
    adapter: int
    """Factors in float32, and the directions that the gates need."""
    token: int
    """Kept for every token of a batch, padding included."""
    working: int
    """Taken beside that for every token while the backward pass is in one layer."""
    label: int
    """For every answer token of a batch."""
    fixed: int
    """Whatever the batch: float32 pieces of the logits, a layer's weights where they are quantised."""
    matrix: int
    """Numbers in the weight matrices that every token goes through; the layers' and the head's."""
    recomputed: bool
    pair: int = 0
    """For every pair of tokens that are packed into one sequence, where attention needs a mask of them."""

    def peak(self, tokens: int, labels: int, *, packed: bool = False) -> int:
        """Returns the bytes at the peak of a batch."""
        masks = self.pair * tokens**2 if packed else 0
        moving = self.fixed + masks + tokens * self.token + max(labels * self.label, tokens * self.working)
        return round(self.weights + self.adapter + (1 + SLACK) * moving)

    def tokens(self, free: int) -> int:
        """Returns how many tokens fit into so many free bytes, the weights apart, if all of them are answers."""
        return max(0, int((free / (1 + SLACK) - self.fixed) / (self.token + max(self.label, self.working))))

    def operations(self, tokens: int) -> int:
        """Returns floating-point operations: a forward, a backward of activations, perhaps a second forward."""
        return 2 * self.matrix * tokens * (3 if self.recomputed else 2)


def costs(adapter: Adapter, options: ModelOptions, paths: Sequence[str]) -> Costs:
    """Returns what measuring these modules costs; loads no weight.

    Raises:
        BaseModelError: If the base model's configuration cannot be had.
    """
    config = load_config(adapter, options, tasks=TASKS)
    import transformers

    kind = getattr(transformers, TASKS.get(adapter.config.task_type or "CAUSAL_LM", "AutoModelForCausalLM"))
    with torch.device("meta"):
        skeleton = kind.from_config(config, trust_remote_code=options.trust_remote_code)
    return costs_of(skeleton, config, adapter, options, paths)


def costs_of(skeleton: Any, config: Any, adapter: Adapter, options: ModelOptions, paths: Sequence[str]) -> Costs:
    """Returns what measuring these modules costs on a base of which only shapes are read."""
    text = config.get_text_config()
    size = _element(config, options)
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    linear = [m for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head]
    matrix = sum(m.weight.numel() for m in linear)
    rest = sum(weight.numel() for weight in skeleton.parameters()) - matrix
    quantised = options.load_in_4bit or options.load_in_8bit
    packed = NF4 if options.load_in_4bit else 1 if options.load_in_8bit else size
    updates = {path: adapter.updates[path] for path in paths}
    ranks = sum(update.A.shape[0] for update in updates.values())
    first = min((layer(path) or 0 for path in paths), default=0)
    layers = text.num_hidden_layers - first
    whole = _layer_bytes(text, size) + 4 * ranks // max(layers, 1)
    again = options.gradient_checkpointing
    widest = max((m.weight.numel() for m in linear), default=0)
    return Costs(
        weights=round(matrix * packed + rest * size),
        adapter=4 * (sum(t.numel() for t in adapter.tensors.values()) + sum(u.B.numel() for u in updates.values())),
        token=layers * size * text.hidden_size if again else layers * whole,
        working=whole + whole // 2 if again else whole // 2,
        label=2 * size * text.vocab_size,
        fixed=2 * 4 * AT_ONCE + (2 * size * widest if quantised else 0),
        matrix=matrix + (head.weight.numel() if isinstance(head, nn.Linear) else 0),
        recomputed=again,
        pair=0 if is_wanted(BatchOptions(), options.attn_implementation) else 1 + size * (1 if again else layers),
    )


def _layer_bytes(text: Any, size: int) -> int:
    """Returns what autograd keeps of one layer for one token."""
    hidden, heads = text.hidden_size, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or hidden // heads)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    if used := getattr(text, "num_experts_per_tok", None):
        inner = used * (getattr(text, "moe_intermediate_size", None) or inner)
    return 2 * 4 * hidden + 4 * width * size + 3 * inner * size


def _element(config: Any, options: ModelOptions) -> int:
    """Returns bytes of a base weight that is not quantised."""
    name = options.dtype if options.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    return (getattr(torch, name) if isinstance(name, str) else name).itemsize


def speed(device: str, size: int = 1024, seconds: float = 0.3) -> float:
    """Returns floating-point operations per second of matrix products on a device, tried for a moment."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, device=device, dtype=dtype)

    def product() -> None:
        matrix @ matrix
        if device != "cpu":
            torch.accelerator.synchronize()

    product()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - start)


@dataclass(frozen=True)
class Estimated:
    """What one measurement needs."""

    costs: Costs
    rows: int
    tokens: int
    """Of all rows together, padding included."""
    batch: int
    """Of the largest batch, padding included."""
    labels: int
    """Answer tokens of that batch."""
    packed: bool
    """Whether rows are packed into one sequence."""
    memory: float | None
    """GiB that there are."""
    speed: float
    """Floating-point operations per second of matrix products on this machine's device."""
    device: str

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.costs.peak(self.batch, self.labels, packed=self.packed)

    def in_words(self) -> str:
        """Returns some lines for the terminal."""
        c, seconds = self.costs, self.costs.operations(self.tokens) / self.speed
        lines = [
            f"Rows: {self.rows}, {self.tokens} tokens; the largest batch has {self.batch}, of which {self.labels} are "
            f"answers.",
            f"Memory: {_gib(self.peak)} at the peak: base model {_gib(c.weights)}, adapter and directions "
            f"{_gib(c.adapter)}, the batch {_gib(self.peak - c.weights - c.adapter)} "
            f"({c.token / 1024:.0f} KiB kept a token, {c.label / 1024:.0f} KiB an answer token for logits).",
            f"Time: about {seconds:.0f} s or more on {self.device}, at the speed of its matrix products "
            f"({self.speed / 1e12:.2g} Tflop/s).",
        ]
        if self.memory is not None:
            fits = self.peak <= self.memory * GIB
            advice = "" if fits else " Use --gradient-checkpointing, --load-in-4bit or a smaller --token-budget."
            lines.append(f"It {'fits' if fits else 'does not fit'} into {self.memory:g} GiB.{advice}")
        return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def estimate(
    adapter: Adapter,
    rows: Sequence[TokenizedExample] | None,
    selection: Selection,
    data: DataOptions,
    model: ModelOptions,
    batching: BatchOptions,
    *,
    memory: float | None = None,
) -> Estimated:
    """Returns what measuring needs; loads no weight.

    Args:
        adapter: The adapter.
        rows: What will be measured; by default as many rows as ``data`` says, of the longest length, all answer.
        selection: Modules and layers.
        data: Number and longest length, where there are no rows.
        model: How the base will be loaded.
        batching: How rows will be batched.
        memory: GiB of the device; by default those of the first accelerator, if there is one.

    Raises:
        InputError: If selection or base model is wrong.
    """
    found = costs(adapter, model, select(adapter.updates, selection))
    if rows is None:
        rows = [TokenizedExample((0,) * data.max_length, 1, "")] * data.count()
    device = model.device or default_device()
    budget = CPU_TOKENS if batching.token_budget == "auto" and device == "cpu" else batching.tokens
    packed = is_wanted(batching, model.attn_implementation)
    made = formed(Tokenized(list(rows), 0), budget, batching, packed=packed)
    sizes = [(batch.input_ids.numel(), int((batch.labels != IGNORED).sum())) for batch in made]
    tokens, labels = max(sizes, key=lambda one: found.peak(*one, packed=packed))
    if memory is None and device != "cpu":
        memory = torch.accelerator.get_memory_info(device)[1] / GIB
    whole = sum(count for count, _ in sizes)
    return Estimated(found, len(rows), whole, tokens, labels, packed, memory, speed(device), device)
