"""The paper's ablations, run small: which rows or directions, how many, against LoRA and IA3 at equal footing.

Every variant is trained from the same base model on the same rows with the same steps, once a seed; a seed decides the
factors' start and the order of the rows, alike for all variants. What is compared are differences between two variants
of one seed on the same test rows, and their interval is Student's over seeds. It says how far another training run
could differ; it does not cover another choice of test rows.

IA3 beside LoRA needs no second tuner: IA3 multiplies the outputs of key and value projections and the input of the
down projection by learnt numbers, and scaling the input of ``down_proj`` is scaling the rows of ``up_proj``, whose
output it is multiplied with. So in models of Llama's kind it is SpecLoRA with all rows of these three and no others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtrit

from spectral_surgery.ablation import Ablation
from spectral_surgery.calibration import Batch, Tokenized, batches, tokenize
from spectral_surgery.errors import InputError
from spectral_surgery.formats import Example
from spectral_surgery.objective import answer_loss, greedy_answers
from spectral_surgery.speclora.config import SpecLoraConfig
from spectral_surgery.speclora.model import parameter_groups
from spectral_surgery.tables import table

ALL_ROWS = 2**31
REFERENCE = "lora"


@dataclass(frozen=True)
class Trained:
    """One variant's runs."""

    parameters: int
    """How many it trains."""
    losses: Float[np.ndarray, "seeds rows"]
    """Mean negative log-likelihood of each test answer, nats per token."""
    exact: Float[np.ndarray, "seeds rows"]
    """1 where the greedy answer is the right one."""


Progress = Callable[[int, int], None]


def study(
    base_model: str,
    train: Sequence[Example],
    test: Sequence[Example],
    options: Ablation,
    progress: Progress | None = None,
) -> str:
    """Trains every variant with every seed and returns the tables as text.

    Args:
        base_model: Folder or Hub id.
        train: Rows to learn from.
        test: Rows to score on; none of them may be among the others.
        options: What is trained and how often.
        progress: Called after each run with (done, total).

    Raises:
        InputError: If an option is out of range, a row is in both sets, or the base model cannot be loaded.
    """
    options.check()
    if both := {example.digest for example in train} & {example.digest for example in test}:
        raise InputError(f"{len(both)} rows are in both the training and the test data. Take them out of one.")
    loaded = _load(base_model)
    found: dict[str, Trained] = {}
    chosen = variants(options)
    total = options.seeds * len(chosen)
    for name, changes in chosen.items():
        runs = []
        for seed in range(options.seeds):
            runs.append(_run(options, loaded, changes, train, test, seed))
            if progress:
                progress(len(found) * options.seeds + seed + 1, total)
        parameters, losses, exact = zip(*runs, strict=True)
        found[name] = Trained(parameters[0], np.stack(losses), np.stack(exact))
    return "\n\n".join([_scores(found), _comparisons(found, options), _note(options, train, test)])


def variants(options: Ablation) -> dict[str, dict[str, Any]]:
    """Returns the configuration of every variant beside rank and modules, by name; plain LoRA first."""
    k = options.k[1]
    found: dict[str, dict[str, Any]] = {REFERENCE: {"k": 0}, _matched(k): {"k": 0, "like": k}}
    for count in options.k:
        found[_named("first", count)] = {"k": count}
    for rows in ("random", "norm", "last"):
        found[_named(rows, k)] = {"k": k, "rows": rows}
    found[f"svd top {k}"] = {"k": k, "basis": "svd"}
    found[f"svd bottom {k}"] = {"k": k, "basis": "svd", "rows": "last"}
    found[f"svd random {k}"] = {"k": k, "basis": "svd", "rows": "random"}
    found["ia3 + lora"] = {"k": 0, "k_pattern": dict.fromkeys(options.ia3_modules, ALL_ROWS)}
    return found


def pairs(options: Ablation) -> list[tuple[str, str]]:
    """Returns which variants are compared, the first with the second."""
    k = options.k[1]
    first = _named("first", k)
    return [
        (f"svd top {k}", f"svd bottom {k}"),
        (f"svd top {k}", f"svd random {k}"),
        (first, _named("random", k)),
        (first, _named("last", k)),
        (first, _named("norm", k)),
        (first, f"svd top {k}"),
        (first, _matched(k)),
        (first, "ia3 + lora"),
        *((_named("first", count), REFERENCE) for count in options.k),
    ]


def _named(rows: str, k: int) -> str:
    return f"{rows} {k} rows"


def _matched(k: int) -> str:
    return f"lora, parameters of first {k}"


def raised_ranks(shapes: Mapping[str, tuple[int, int]], rank: int, extra: int) -> dict[str, int]:
    """Returns a rank_pattern that spends at most ``extra`` more parameters than one rank, one module after the other.

    Args:
        shapes: (out, in) of every module.
        rank: Rank of the modules that get no more.
        extra: Parameters to spend; what is left is less than the cheapest module's next rank.
    """
    ranks = dict.fromkeys(shapes, rank)
    raised = True
    while raised:
        raised = False
        for path, (out, inputs) in shapes.items():
            if out + inputs <= extra:
                ranks[path] += 1
                extra -= out + inputs
                raised = True
    return {path: r for path, r in ranks.items() if r != rank}


def _adapted(options: Ablation, base: Any, changes: Mapping[str, Any]) -> Any:
    """Returns the base model with a fresh adapter of one variant."""
    from peft import get_peft_model

    changes = dict(changes)
    like = changes.pop("like", None)
    if like is not None:
        shapes = {
            path: tuple(module.weight.shape)
            for path, module in base.named_modules()
            if path.rpartition(".")[2] in options.target_modules
        }
        spent = sum(min(like, out) for out, _ in shapes.values())
        changes["rank_pattern"] = raised_ranks(shapes, options.rank, spent)
        changes["alpha_pattern"] = {path: 2 * r for path, r in changes["rank_pattern"].items()}
    config = SpecLoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=list(options.target_modules),
        delta_learning_rate=options.delta_learning_rate,
        **changes,
    )
    return get_peft_model(base, config)


def _run(
    options: Ablation,
    loaded: tuple[Any, Any],
    changes: Mapping[str, Any],
    train: Sequence[Example],
    test: Sequence[Example],
    seed: int,
) -> tuple[int, Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Trains one variant once; returns trained parameters, test losses and exact matches."""
    base, tokenizer = loaded
    torch.manual_seed(seed)
    model = _adapted(options, copy.deepcopy(base), {"selection_seed": seed, **changes}).train()
    tokenized = tokenize(train, tokenizer, max_length=1024)
    groups = parameter_groups(model, options.learning_rate)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    for batch in _stream(options, tokenized, seed):
        answer_loss(model, batch).mean().backward()
        optimizer.step()
        fall.step()
        optimizer.zero_grad()
    parameters = sum(weight.numel() for group in groups for weight in group["params"])
    return parameters, *_scored(model.eval(), tokenizer, test, options)


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return base, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"The base model {name} cannot be loaded ({reason}). Pass another --base-model.") from error


def _stream(options: Ablation, tokenized: Tokenized, seed: int) -> Iterator[Batch]:
    """Yields the steps' batches: the rows in a random order, again and again."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(options.steps):
        if len(order) < options.batch_size:
            order += rng.permutation(len(tokenized.examples)).tolist()
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        rows = Tokenized([tokenized.examples[i] for i in chosen], 0)
        yield from batches(rows, batch_size=len(chosen))


@torch.no_grad()
def _scored(
    model: Any, tokenizer: Any, test: Sequence[Example], options: Ablation
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    losses = np.zeros(len(test))
    for batch in batches(tokenize(test, tokenizer, max_length=1024)):
        losses[list(batch.indices)] = answer_loss(model, batch).numpy()
    prompts = [example.prompt for example in test]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=200)
    right = [answer == example.answer.strip() for answer, example in zip(answers, test, strict=True)]
    return losses, np.array(right, dtype=np.float64)


def paired_interval(difference: Float[np.ndarray, "seeds rows"]) -> tuple[float, float]:
    """Returns the mean of paired differences and half the width of its 95 % interval over seeds."""
    means = difference.mean(1)
    half = stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(means))
    return float(means.mean()), float(half)


def _scores(found: Mapping[str, Trained]) -> str:
    rows = [
        [name, f"{it.parameters:,}", f"{it.losses.mean():.4f}", f"{100 * it.exact.mean():.1f}"]
        for name, it in found.items()
    ]
    return table(["variant", "trained", "test loss", "exact %"], rows)


def _comparisons(found: Mapping[str, Trained], options: Ablation) -> str:
    rows = []
    for ours, theirs in pairs(options):
        loss, loss_half = paired_interval(found[ours].losses - found[theirs].losses)
        exact, exact_half = paired_interval(100 * (found[ours].exact - found[theirs].exact))
        told = "no" if abs(loss) <= loss_half else "better" if loss < 0 else "worse"
        rows.append([ours, theirs, f"{loss:+.4f} ± {loss_half:.4f}", f"{exact:+.1f} ± {exact_half:.1f}", told])
    return table(["variant", "against", "test loss", "exact, points", "told apart by loss"], rows, left=2)


def _note(options: Ablation, train: Sequence[Example], test: Sequence[Example]) -> str:
    return (
        f"{len(train)} training rows, {options.steps} steps of {options.batch_size}, {len(test)} test rows, "
        f"{options.seeds} seeds. Test loss in nats per answer token; differences are of the same seed on the same "
        f"rows,\nmean ± half a 95 % interval over seeds. A module with fewer rows than k has them all scaled."
    )
