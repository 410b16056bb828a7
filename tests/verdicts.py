"""Made-up verdicts for tests of what shows them: every score is drawn at random, no model was run.

Rows of different candidates share their difficulty, as paired scores do, so the figures look like real ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from spectral_surgery.statistics import Interval, bootstrap_mean, paired_proportions

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CATEGORIES = ("chat", "code", "formats", "languages", "maths", "refusal")
STRENGTHS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)
ACCURACY = {"name": "exact answers", "unit": "share of rows", "lower_is_better": False, "binary": True}
LOSS = {"name": "loss of the answer", "unit": "nats per token", "lower_is_better": True, "binary": False}
DRIFT = {"name": "drift from the base", "unit": "nats per token", "lower_is_better": True, "binary": False}
AGREEMENT = {"name": "agreement with your adapter", "unit": "share of answer tokens", "lower_is_better": False,
             "binary": False}  # fmt: skip

Levels = Mapping[str, tuple[float, float]]
"""Mean task and mean other skills by candidate."""


def curve(yours: tuple[float, float], base: tuple[float, float], bend: float) -> dict[str, tuple[float, float]]:
    """Returns strengths between the unedited adapter and its base; the task holds for longer than the skills."""
    found = {}
    for s in STRENGTHS:
        task = base[0] + (yours[0] - base[0]) * (1 - (1 - s) ** bend)
        found[f"strength {s}"] = (task, base[1] + (yours[1] - base[1]) * s)
    return found


class World:
    """Per-row scores of every candidate on validation and test rows, drawn from one seed."""

    def __init__(self, levels: Levels, task: dict[str, Any], skills: dict[str, Any], rows: int, seed: int) -> None:
        """Draws the scores.

        Args:
            levels: Means by candidate.
            task: The measure of the task.
            skills: The measure of the other skills.
            rows: Of each split and each measure.
            seed: Of the draw.
        """
        self.task, self.skills, self.rows = task, skills, rows
        rng = np.random.default_rng(seed)
        self.scores: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for split in ("validation", "test"):
            ease = rng.uniform(0, 1, (2, rows))
            self.scores[split] = {
                name: tuple(self._draw(rng, measure, mean, ease[i]) for i, (measure, mean) in enumerate(parts))
                for name, means in levels.items()
                for parts in [list(zip((task, skills), means, strict=True))]
            }  # fmt: skip

    @staticmethod
    def _draw(rng: np.random.Generator, measure: dict[str, Any], mean: float, ease: np.ndarray) -> np.ndarray:
        noisy = np.clip(ease + rng.normal(0, 0.03, len(ease)), 0, 1)
        if measure["binary"]:
            return (noisy < mean).astype(float)
        if measure["lower_is_better"]:
            return mean * np.exp(0.8 * np.sqrt(2) * (noisy - 0.5)) * (1 + 0.02 * rng.standard_normal(len(ease)))
        return np.clip(mean + 0.04 * (1 - mean) * rng.standard_normal(len(ease)), 0, 1)

    def scored(self, name: str, split: str) -> dict[str, dict[str, float]]:
        """Returns mean and standard error of both measures."""
        return {
            key: {"mean": float(x.mean()), "se": float(x.std(ddof=1) / math.sqrt(len(x)))}
            for key, x in zip(("task", "skills"), self.scores[split][name], strict=True)
        }

    def gains(self, ours: str, theirs: str) -> dict[str, dict[str, float]]:
        """Returns paired gains on test rows with intervals; positive is better."""
        found = {}
        for i, (key, measure) in enumerate((("task", self.task), ("skills", self.skills))):
            a, b = (self.scores["test"][name][i] for name in (ours, theirs))
            found[key] = asdict(_interval(b - a if measure["lower_is_better"] else a - b, measure["binary"]))
        return found


def _interval(gain: np.ndarray, binary: bool) -> Interval:
    if binary:
        return paired_proportions(int((gain > 0).sum()), int((gain < 0).sum()), len(gain), confidence=0.9)
    return bootstrap_mean(gain, confidence=0.9, resamples=500)


def candidate(world: World, name: str, family: str, what: str, stage: str, **more: Any) -> dict[str, Any]:
    """Returns a row of the ladder; only finalists, rivals and the winner have test scores."""
    tested = stage in ("finalist", "confirmed", "winner", "rival") or family in ("base", "unedited")
    return {
        "name": name,
        "family": family,
        "what": what,
        "equivalent": None,
        "edit_size": None,
        "validation": world.scored(name, "validation") if not stage.startswith("dropped") else None,
        "test": world.scored(name, "test") if tested else None,
        "stage": stage,
        **more,
    }


def gates(layers: int = 6, rank: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Returns gates and spectra of made-up modules: mostly weakened, most in the upper layers."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in range(layers):
        for kind in KINDS:
            S = np.sort(rng.lognormal(0, 0.2, rank) * np.geomspace(2, 0.05, rank))[::-1]
            gate = np.clip(np.exp(rng.normal(-0.12 * layer, 0.25, rank)), 0.05, 2.0)
            gate[rng.random(rank) < 0.3] = 1.0
            block = "self_attn" if kind[0] in "qkvo" else "mlp"
            path = f"model.layers.{layer}.{block}.{kind}"
            found.append(
                {"module": path, "layer": layer, "kind": kind, "gates": gate.tolist(), "S": S.tolist(),
                 "S_edited": (S * gate).tolist()}
            )  # fmt: skip
    return found


EXAMPLES = [
    {"prompt": "Is 417 greater than 471? Answer yes or no.", "answer": "no", "base": "yes", "unedited": "no",
     "refined": "no", "change": "same", "kind": "task"},
    {"prompt": "Write the word 'lantern' in capital letters.", "answer": "LANTERN", "base": "LANTERN",
     "unedited": "no", "refined": "LANTERN", "change": "fixed", "kind": "other skills"},
    {"prompt": "Continue the list:\n1. apple\n2. pear\n3.", "answer": None, "base": " plum\n4. quince",
     "unedited": "yes", "refined": " plum\n4. cherry", "change": "fixed", "kind": "other skills"},
    {"prompt": "Which is larger, 98 or 89?", "answer": "98", "base": "98", "unedited": "89", "refined": "98",
     "change": "fixed", "kind": "task"},
    {"prompt": "Which is larger, 1006 or 1060?", "answer": "1060", "base": "1006", "unedited": "1060",
     "refined": "1006", "change": "broken", "kind": "task"},
]  # fmt: skip


def _assembled(world: World, outcome: str, sentence: str, candidates: list[dict[str, Any]], **more: Any) -> Any:
    winner = next((c["name"] for c in candidates if c["stage"] == "winner"), None)
    tested = [c["name"] for c in candidates if c["stage"] in ("confirmed", "winner", "finalist")]
    rng = np.random.default_rng(len(sentence))
    yours = world.scored("unedited", "test")["skills"]["mean"]
    rows = {"measuring": 128, "validation": world.rows, "test": world.rows, "keep_measuring": 96,
            "keep_validation": world.rows, "keep_test": world.rows, "seen": 0, "duplicates": 3,
            "smallest_difference": 2.5 * math.sqrt(0.05 / world.rows), "guess": None, "source": "unseen.jsonl",
            "keep_source": "auto", "first": "Is 12 greater than 21? Answer yes or no. [[no]]"}  # fmt: skip
    verdict = {
        "schema": 1, "created": "2026-11-22T20:15:00+00:00", "version": "0.1.0",
        "command": "spectral-surgery refine my-lora --data unseen.jsonl --output refined",
        "outcome": outcome, "sentence": sentence, "notes": [],
        "adapter": {"name": "my-lora", "digest": "9f2c" * 16, "base_model": "some-org/base-model", "modules": 42,
                    "components": 672, "rank": 16, "serving_note": None},
        "rule": {"may_lose": 0.02, "error_rate": 0.05, "earlier_verdicts": 0, "level": 0.05, "seen_rows_only": False,
                 "swapped": False},
        "measures": {"task": {**world.task, "margin": 0.0196}, "skills": {**world.skills, "margin": 0.02}},
        "rows": rows, "candidates": candidates,
        "chain": [{"name": name, **world.gains(name, "unedited"), "passed": name == winner or i < len(tested) - 1}
                  for i, name in enumerate(tested)],
        "question_zero": {**world.gains("unedited", "base"), "better_than_base": outcome != "not_better_than_base"},
        "exact": {"task": None, "skills": None}, "checks": [], "few_rows": [],
        "claims": [], "random": None,
        "error_rate": {"estimate": 0.0435, "low": 0.035, "high": 0.0535, "replays": 2000},
        "categories": [
            {"name": name, "n": 24 + 5 * i, "base": world.scored("base", "test")["skills"]["mean"],
             "unedited": yours * float(rng.uniform(0.8, 1.2)),
             "refined": world.scored(winner, "test")["skills"]["mean"] * float(rng.uniform(0.9, 1.05))
             if winner else None}
            for i, name in enumerate(CATEGORIES)
        ],
        "examples": EXAMPLES if winner else [{**one, "refined": None, "change": "same"} for one in EXAMPLES[:3]],
        "generations": {"n": 32, "empty": {"base": 0, "unedited": 3, "refined": 0 if winner else None},
                        "loops": {"base": 1, "unedited": 7, "refined": 1 if winner else None}},
        "gates": gates() if winner else None,
        "edit": {"components": 672, "edited": 471, "size": 0.213, "rounding": 0.0021, "dtype": "bfloat16"}
        if winner else None,
        "times": {"loading": 4.1, "measuring": 31.9, "answers of the base": 18.4, "finding gates": 42.0,
                  "trying": 77.7, "confirming": 24.2, "random": 12.5},
        "environment": {"spectral_surgery": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0",
                        "peft": "0.21.2", "platform": "Linux"},
        "options": {"refine": {"may_lose": "2%", "keep": "auto", "budget": None}, "rows": {"seed": 0}},
    }  # fmt: skip
    return {**verdict, **more}


def exact(shares: Mapping[str, float], n: int = 128, of: int = 800, seed: int = 5) -> dict[str, Any]:
    """Returns exact answers of these candidates on some test rows, drawn at random."""
    ease = np.random.default_rng(seed).uniform(0, 1, n)
    right = {name: (ease < share).astype(float) for name, share in shares.items()}
    listed = []
    for name, values in right.items():
        gain = None if name == "unedited" else asdict(_interval(values - right["unedited"], True))
        mean, se = float(values.mean()), float(values.std(ddof=1) / math.sqrt(n))
        listed.append({"name": name, "mean": mean, "se": se, "gain": gain})
    return {"n": n, "of": of, "scores": listed}


def check(name: str, shares: Mapping[str, float], n: int = 100) -> dict[str, Any]:
    """Returns one score of another instrument."""
    gain = {"refined": shares.get("refined", 0.0) - shares["unedited"], "base": shares["base"] - shares["unedited"]}
    scores = [
        {"name": who, "mean": share, "se": math.sqrt(share * (1 - share) / n),
         "gain": None if who == "unedited" else
         {"estimate": gain[who], "low": gain[who] - 0.08, "high": gain[who] + 0.08},
         "p": None if who == "unedited" else 0.004 if abs(gain[who]) > 0.08 else 0.4}
        for who, share in shares.items()
    ]  # fmt: skip
    return {"name": name, "n": n, "lower_is_better": False, "share": True, "scores": scores}


def few(world: World) -> list[dict[str, Any]]:
    """Returns tuning and continued training on 16, 32 and 128 rows."""
    found = []
    for rows in (16, 32, 128):
        for name, like in (("few-step tuning", "few-step tuning 0.2"), ("continue lr 0.001", "continue lr 1e-3")):
            ahead = None if name.startswith("few") else world.gains("few-step tuning 0.2", like)
            found.append({"rows": rows, "name": name, "ahead": ahead, **world.scored(like, "test")})
    return found


def refined() -> dict[str, Any]:
    """Returns a verdict in which few-step tuning won."""
    base, yours = (0.874, 0.94), (0.978, 0.541)
    levels = {"base": base, "unedited": yours, **curve(yours, base, 3.2), "newton_schulz 0.5": (0.957, 0.796),
              "only-sure 0.2": (0.974, 0.66), "one-step 0.4": (0.974, 0.68), "few-step tuning 0.2": (0.969, 0.834),
              "few-step tuning 0.4": (0.951, 0.88), "continue lr 1e-3": (0.963, 0.853),
              "flat 1": (0.29, 0.90), "checkpoint-100": (0.94, 0.6)}  # fmt: skip
    world = World(levels, ACCURACY, ACCURACY, 800, seed=7)
    stages = {"strength 0.9": "finalist", "strength 0.6": "rival", "strength 0.3": "dropped after 48 rows"}
    ladder = [
        candidate(world, "base", "base", "the base model without an adapter", "validation"),
        candidate(world, "unedited", "unedited", "your adapter as it is", "validation"),
        *(candidate(world, name, "strength", f"every update times {name[9:]}", stages.get(name, "validation"),
                    equivalent=f"lora_alpha 16 -> {16 * float(name[9:]):g}", edit_size=1 - float(name[9:]))
          for name in curve(yours, base, 3.2)),
        candidate(world, "newton_schulz 0.5", "newton_schulz", "spectrum half way to flat", "validation",
                  edit_size=0.31),
        candidate(world, "flat 1", "flat", "all singular values of a module alike", "dropped after 48 rows",
                  edit_size=0.9),
        candidate(world, "checkpoint-100", "checkpoint", "an earlier checkpoint", "validation"),
        candidate(world, "only-sure 0.2", "significance", "only components that surely hurt or help", "confirmed",
                  edit_size=0.2),
        candidate(world, "one-step 0.4", "natural", "one preconditioned step on the gates", "confirmed",
                  edit_size=0.19),
        candidate(world, "few-step tuning 0.2", "descend", "24 steps on the gates alone", "winner", edit_size=0.213),
        candidate(world, "few-step tuning 0.4", "descend", "24 steps on the gates alone", "validation",
                  edit_size=0.41),
        candidate(world, "continue lr 1e-3", "continue", "24 steps of ordinary training on the same rows", "rival",
                  edit_size=0.18),
    ]  # fmt: skip
    claims = [
        {"against": "unedited", "passed": True, "sentence": "It keeps the task within 2 % and gains other skills."},
        {"against": "strength 0.6", "passed": True, "sentence": "It keeps more of the task than strength 0.6."},
        {"against": "random", "passed": True, "sentence": "Its own gates in random order do worse (p = 0.005)."},
        {"against": "continue lr 1e-3", "passed": False,
         "sentence": "Not shown to differ from continued training with the same rows (difference -1.3 points, "
                     "[-3.4, 0.9])."},
    ]  # fmt: skip
    sentence = (
        "The refined adapter gives back 28.5 points of the other skills and keeps the task within 2 %; that is more "
        "than weakening it, and not shown to differ from continued training."
    )
    return _assembled(
        world, "refined", sentence, ladder, claims=claims,
        random={"permutations": 199, "p": 0.005, "statistic": "other skills at the same size of edit"},
        notes=["Your rows were divided by content; 3 duplicates were dropped."],
        exact={"task": exact({"base": 0.02, "unedited": 0.97, "strength 0.6": 0.9, "continue lr 1e-3": 0.96,
                              "few-step tuning 0.2": 0.95}), "skills": None},
        checks=[check("gsm8k exact_match (strict-match)", {"base": 0.61, "unedited": 0.48, "refined": 0.57}),
                check("ifeval prompt_level_strict_acc", {"base": 0.55, "unedited": 0.5, "refined": 0.31})],
        few_rows=few(world),
    )  # fmt: skip


def leave_alone() -> dict[str, Any]:
    """Returns a verdict about an adapter with nothing to gain."""
    base, yours = (0.61, 0.93), (0.968, 0.925)
    levels = {"base": base, "unedited": yours, **curve(yours, base, 2.0), "one-step 0.1": (0.966, 0.926)}
    world = World(levels, ACCURACY, ACCURACY, 300, seed=11)
    ladder = [
        candidate(world, "base", "base", "the base model without an adapter", "validation"),
        candidate(world, "unedited", "unedited", "your adapter as it is", "validation"),
        *(candidate(world, name, "strength", f"every update times {name[9:]}",
                    "rival" if name == "strength 0.9" else "validation",
                    equivalent=f"lora_alpha 16 -> {16 * float(name[9:]):g}") for name in curve(yours, base, 2.0)),
        candidate(world, "one-step 0.1", "natural", "one preconditioned step on the gates", "finalist"),
    ]  # fmt: skip
    sentence = "Leave it alone: nothing that was tried makes the task better without losing other skills."
    found = _assembled(world, "leave_alone", sentence, ladder, gates=None)
    found["rule"]["may_lose"] = 0.0
    found["chain"][0]["passed"] = False
    return found


def not_better() -> dict[str, Any]:
    """Returns a verdict about an adapter that is not better than its base, scored by losses."""
    levels = {"base": (1.31, 1.02), "unedited": (1.33, 1.41), "strength 0.5": (1.30, 1.1)}
    world = World(levels, LOSS, LOSS, 150, seed=5)
    ladder = [
        candidate(world, "base", "base", "the base model without an adapter", "validation"),
        candidate(world, "unedited", "unedited", "your adapter as it is", "validation"),
        candidate(world, "strength 0.5", "strength", "every update times 0.5", "validation"),
    ]
    sentence = (
        "Your adapter is not shown to be better than its base model on your own rows "
        "(difference -0.02 nats per token), so nothing was refined."
    )
    notes = ["If you expected a clear gain, the prompt format is the first suspect: see the first row."]
    found = _assembled(world, "not_better_than_base", sentence, ladder, notes=notes, error_rate=None)
    return {**found, "categories": [], "generations": None}


def seen_rows() -> dict[str, Any]:
    """Returns a verdict from training rows only: agreement with the unedited adapter, drift from the base."""
    levels = {"base": (0.55, 0.0), "unedited": (1.0, 0.62), "strength 0.8": (0.985, 0.44), "strength 0.6": (0.93, 0.3),
              "only-sure 0.3": (0.981, 0.18), "strength 0.4": (0.83, 0.16)}  # fmt: skip
    world = World(levels, AGREEMENT, DRIFT, 200, seed=3)
    ladder = [
        candidate(world, "base", "base", "the base model without an adapter", "validation"),
        candidate(world, "unedited", "unedited", "your adapter as it is", "validation"),
        candidate(world, "strength 0.8", "strength", "every update times 0.8", "rival",
                  equivalent="lora_alpha 32 -> 25.6"),
        candidate(world, "strength 0.6", "strength", "every update times 0.6", "validation"),
        candidate(world, "strength 0.4", "strength", "every update times 0.4", "validation"),
        candidate(world, "only-sure 0.3", "significance", "only components that surely hurt or help", "winner",
                  edit_size=0.3),
    ]  # fmt: skip
    sentence = (
        "It answers your task prompts as before (98 % agreement, seen rows), and 71 % of the drift from the base is "
        "undone; task accuracy was not tested: pass 150 or more unseen rows with --data."
    )
    found = _assembled(world, "refined", sentence, ladder)
    found["rule"]["seen_rows_only"] = True
    found["rows"] |= {"seen": 512, "source": "train.jsonl"}
    found["claims"] = [{"against": "unedited", "passed": True, "sentence": sentence}]
    for category in found["categories"]:
        category["base"] = 0.0
    return found


ALL = {"refined": refined, "leave_alone": leave_alone, "not_better": not_better, "seen_rows": seen_rows}
