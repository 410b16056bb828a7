"""The portable export in a real server: vLLM generates what PEFT generates.

vLLM needs an environment of its own. Name its python in SPECTRAL_SURGERY_VLLM_PYTHON; without it this file is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spectral_surgery import Adapter, export

PYTHON = os.environ.get("SPECTRAL_SURGERY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SPECTRAL_SURGERY_VLLM_PYTHON names no python with vLLM"),
]

SOURCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 1, "layers.0.mlp.down_proj": 20}},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "all": {"use_rslora": True, "rank_pattern": {"o_proj": 1}, "alpha_pattern": {"q_proj": 2}},
}
PROMPTS = [[1, 7, 9, 23, 41], [1, 30, 31], [1, 5, 58, 17, 44, 12, 12, 8]]
TOKENS = 24
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
job = json.loads(sys.argv[1])
engine = LLM(model=job["base"], dtype="float32", enable_lora=True, max_lora_rank=8, max_model_len=128,
             enforce_eager=True, skip_tokenizer_init=True)
settings = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
found = {}
for number, (name, folder) in enumerate(job["adapters"].items(), start=1):
    request = LoRARequest(name, number, folder) if folder else None
    out = engine.generate(prompts, settings, lora_request=request, use_tqdm=False)
    found[name] = [list(one.outputs[0].token_ids) for one in out]
json.dump(found, open(job["out"], "w"))
"""


def served(base: Path, adapters: dict[str, str], out: Path) -> dict[str, list[list[int]]]:
    """What vLLM generates for every prompt with every adapter; an empty folder stands for none."""
    job = {"base": str(base), "adapters": adapters, "prompts": PROMPTS, "tokens": TOKENS, "out": str(out)}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | settings
    done = subprocess.run(
        [PYTHON, "-c", SERVE, json.dumps(job)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def generated(base: Path, adapter: Path | None) -> list[list[int]]:
    """What transformers and PEFT generate greedily."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def test_vllm_generates_with_a_portable_export_what_peft_generates_with_its_source(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    base = tiny.llama(**sizes, eos_token_id=None, initializer_range=0.1)
    base.generation_config.eos_token_id = None
    base.save_pretrained(tmp_path / "base")
    adapters = {"none": ""}
    for name, changes in SOURCES.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        tiny.lora(model, **changes).save_pretrained(tmp_path / name)
        export(Adapter.load(tmp_path / name), "portable", tmp_path / f"portable {name}")
        adapters[name] = str(tmp_path / f"portable {name}")
    found = served(tmp_path / "base", adapters, tmp_path / "out.json")
    expected = {name: generated(tmp_path / "base", tmp_path / name) for name in SOURCES}
    assert found == {"none": generated(tmp_path / "base", None), **expected}
    assert len({json.dumps(tokens) for tokens in found.values()}) == len(found), "the adapters say different things"
