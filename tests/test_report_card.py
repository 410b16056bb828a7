"""Model card and publishable verdict: the measured effect, and nothing private."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import verdicts
from huggingface_hub import ModelCard

from spectral_surgery import report

SOURCE = """---
license: llama3.1
license_name: llama3.1
base_model: some-org/base-model
tags:
- code
language: en
datasets:
- some-org/rows
- /home/zoe/rows.jsonl
widget:
- text: a private prompt
model-index:
- name: before
---
# My adapter
private prose
"""


@pytest.fixture
def private() -> dict[str, Any]:
    """Returns a verdict with a secret in every place that may hold a path or the user's text."""
    verdict = copy.deepcopy(verdicts.refined())
    verdict["command"] = "spectral-surgery refine /home/zoe/secret-lora --data ../secret/unseen.jsonl"
    verdict["adapter"] |= {"name": "/home/zoe/secret-lora", "base_model": "models/secret/base"}
    verdict["adapter"]["serving_note"] = "Measured on /mnt/secret/base in 4 bit, served in 16."
    verdict["rows"] |= {
        "source": "secret unseen.jsonl",
        "keep_source": "~/secret/keep.txt",
        "first": "secret row [[x]]",
    }
    verdict["sentence"] += " Made from /home/zoe/secret-lora with secret unseen.jsonl."
    verdict["notes"] = ["secret note"]
    verdict["options"] |= {"system": "a secret prompt", "data": "secret.jsonl", "batch": 8}
    verdict["environment"] |= {"cache": "/home/zoe/secret/cache"}
    for one in verdict["categories"]:
        one["name"] = f"secret {one['name']}"
    for one in verdict["examples"]:
        one |= {"prompt": f"{one['prompt']} secret", "base": "a secret answer"}
    for one in verdict["candidates"]:
        if one["family"] == "checkpoint":
            one["name"] = "secret-runs/checkpoint-100"
            one |= {"what": "from C:\\zoe\\secret\\runs", "stage": "rival", "test": one["validation"]}
    verdict["claims"].append(
        {"against": "secret-runs/checkpoint-100", "passed": False,
         "sentence": "Not shown against secret-runs/checkpoint-100; run: x --also ./secret/runs."}
    )  # fmt: skip
    verdict["measures"]["task"]["name"] = "/home/zoe/secret/score.py:score"
    return verdict


def test_what_is_published_holds_no_path_and_no_text_of_the_user(private: dict[str, Any]) -> None:
    public = json.dumps(report.publishable(private))
    for word in ("secret", "zoe", "/home", "lantern", "1060?"):
        assert word not in public
    assert "secret" in json.dumps(private)


def test_what_is_published_keeps_the_figures(private: dict[str, Any]) -> None:
    public = report.publishable(private)
    for key in ("chain", "question_zero", "rule", "gates", "edit", "error_rate"):
        assert public[key] == private[key]
    assert [c["test"] for c in public["candidates"]] == [c["test"] for c in private["candidates"]]
    assert public["rows"]["test"] == 800
    assert public["options"] == {"rows.seed": 0, "batch": 8}
    assert public["adapter"]["digest"] == private["adapter"]["digest"]
    assert "checkpoint 1" in [c["name"] for c in public["candidates"]]
    assert "cache" not in public["environment"]


def test_shared_prompts_keep_their_category_names_and_hub_ids_stay() -> None:
    verdict = verdicts.refined()
    verdict["adapter"]["name"] = "zoe/my-lora"
    public = report.publishable(verdict)
    assert [one["name"] for one in public["categories"]] == list(verdicts.CATEGORIES)
    assert (public["adapter"]["name"], public["adapter"]["base_model"]) == ("zoe/my-lora", "some-org/base-model")
    assert public["sentence"] == verdict["sentence"]


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("outputs/my-lora")
    verdict = verdicts.refined()
    verdict["adapter"]["name"] = "outputs/my-lora"
    assert report.publishable(verdict)["adapter"]["name"] is None


def test_the_card_keeps_the_source_s_licence_and_adds_what_it_is() -> None:
    card = ModelCard(report.card(verdicts.refined(), SOURCE))
    assert card.data.to_dict() == {
        "license": "llama3.1",
        "license_name": "llama3.1",
        "base_model": "some-org/base-model",
        "base_model_relation": "adapter",
        "tags": ["code", "lora", "spectral-surgery"],
        "language": "en",
        "datasets": ["some-org/rows"],
        "library_name": "peft",
    }
    assert "private" not in card.content


def test_the_card_tells_the_measured_effect_and_what_was_not_shown() -> None:
    verdict = verdicts.refined()
    text = ModelCard(report.card(verdict)).text
    winner = next(c["test"]["skills"]["mean"] for c in verdict["candidates"] if c["stage"] == "winner")
    row = next(line for line in text.splitlines() if line.startswith("| **this adapter**"))
    assert f"{100 * winner:.1f} [" in row
    assert "| base model, no adapter |" in text
    limits = text.partition("## Limits")[2]
    assert "Not shown to differ from continued training" in limits
    assert "had been seen in training" in report.card(verdicts.seen_rows())


def test_the_card_holds_nothing_private(private: dict[str, Any]) -> None:
    card = report.card(private, SOURCE)
    for word in ("secret", "/home", "zoe", "lantern", "private"):
        assert word not in card
    assert ModelCard(card).data.to_dict()["base_model"] == "some-org/base-model"


@pytest.mark.parametrize("source", ["", "no front matter", "---\nlicense: [a\n---\nx", "---\n- a\n---\nx"])
def test_a_source_card_that_cannot_be_read_is_as_none(source: str) -> None:
    assert report.card(verdicts.refined(), source) == report.card(verdicts.refined())


def test_only_a_refined_adapter_has_a_card() -> None:
    with pytest.raises(ValueError, match="none was written"):
        report.card(verdicts.leave_alone())
