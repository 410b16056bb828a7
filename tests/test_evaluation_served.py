"""vLLM as the engine: every variant's scores and cut answers are those of Transformers; a wrong engine is refused.

vLLM needs an environment of its own. Name its python in SPECTRAL_SURGERY_VLLM_PYTHON: one that also finds this
package, PEFT and lm-evaluation-harness.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny

from spectral_surgery.evaluating.records import Record, read_records

PYTHON = os.environ.get("SPECTRAL_SURGERY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SPECTRAL_SURGERY_VLLM_PYTHON names no python with vLLM"),
]

SCORE = """
import json, sys
import numpy as np
from spectral_surgery.errors import RunError
from spectral_surgery.evaluating.evaluation import evaluate
from spectral_surgery.options import ModelOptions
from spectral_surgery.evaluating.suite import SuiteOptions
job = json.loads(sys.argv[1])
model = ModelOptions(dtype="float32", device="cpu")
options = SuiteOptions(suite=job["suite"], max_gen_toks=6, max_length=128, batch_size=8)
for name, vllm in (("hf", None), ("vllm", "enforce_eager=True,max_num_seqs=8")):
    out = job["out"] + name
    found = evaluate(job["adapters"][0], job["adapters"][1:], options, model=model, vllm=vllm, output=out)
    print(found.text())

from spectral_surgery.evaluating import serving
honest = serving.ServedModel.serving
serving.ServedModel.serving = lambda lm, request: honest(lm, None)  # an engine that never applies an adapter
try:
    evaluate(job["adapters"][0], (), options, model=model, vllm="enforce_eager=True,max_num_seqs=8")
except RunError as error:
    json.dump(str(error), open(job["out"] + "refused", "w"))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the scores of both engines lie, as the beginning of a path."""
    folder = tmp_path_factory.mktemp("served")
    different = {
        "adapter": {"alpha_pattern": {"v_proj": 3}},
        "other": {"r": 2, "target_modules": ["k_proj", "up_proj"]},
    }
    for seed, (name, changes) in enumerate(different.items()):
        base = tiny.llama(head_dim=32)  # vLLM's attention on a CPU knows no narrower heads
        base.save_pretrained(folder / "base")
        base.config.name_or_path = base.name_or_path = str(folder / "base")
        tiny.lora(base, seed=seed, **changes).save_pretrained(folder / name)
    tiny.tokenizer().save_pretrained(folder / "base")
    pick = [{"question": f"which {i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(6)]
    for name, rows in (("rows", tiny.rows()), ("pick", pick)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "adapters": [str(folder / name) for name in different],
        "suite": f"{folder / 'rows.jsonl'},{folder / 'pick.jsonl'}",
        "out": f"{folder}/scores-",
    }
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | settings
    done = subprocess.run([PYTHON, "-c", SCORE, json.dumps(job)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return job["out"]


def scored(path: str) -> dict[tuple[str, str, str, int], Record]:
    return {(r.variant, r.task, r.doc_hash, r.part): r for r in read_records(Path(path) / "records.jsonl")}


def test_both_engines_score_every_variant_alike(out: str) -> None:
    ours, theirs = scored(out + "hf"), scored(out + "vllm")
    assert {key[0] for key in theirs} == {"base", "adapter", "other"}
    assert {key: record.value for key, record in ours.items()} == {key: record.value for key, record in theirs.items()}
    assert {key: record.prompt_hash for key, record in ours.items()} == {
        key: record.prompt_hash for key, record in theirs.items()
    }


def test_both_engines_cut_the_same_answers(out: str) -> None:
    ours, theirs = scored(out + "hf"), scored(out + "vllm")
    cut = {key for key, record in ours.items() if record.truncated}
    assert cut == {key for key, record in theirs.items() if record.truncated}
    assert 0 < len(cut) < sum(key[1] == "rows" for key in ours)


def test_an_engine_that_computes_something_else_is_refused(out: str) -> None:
    said = json.loads(Path(out + "refused").read_text())
    assert "vLLM computes something else than Transformers as adapter" in said
    assert "the nearest variant of Transformers is base" in said
