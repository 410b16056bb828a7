"""What follows a training with ``--then refine``: measured and refined, then benchmarked beside base and unedited.

Refining measures, so nothing is measured twice; it leaves the sensitivities beside its verdict and report. What is
scored afterwards are rows that no edit was chosen on, or a suite.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery.cli.evaluate import Evaluate
from spectral_surgery.cli.refine import Refine
from spectral_surgery.errors import InputError, OutputError

if TYPE_CHECKING:
    from spectral_surgery.formats import Example

TEST_ROWS = "test-rows.jsonl"
"""In the folder of the refinement: the rows that the verdict was made on."""


def evaluation_folder(folder: Path) -> Path:
    """Returns where the benchmark of a trained adapter goes: beside it."""
    return folder.parent / f"{folder.name}-evaluation"


def check_following(refines: Sequence[Refine], tokenizer: Any, suite: str | None, *, unsafe: bool) -> None:
    """Checks, before anything is trained, what can be known of refining and scoring.

    Args:
        refines: The commands that refine, of each adapter that will be trained.
        tokenizer: The base model's.
        suite: What is scored, where it is not the rows of the verdict.
        unsafe: Whether the user agreed to run code that the model writes.

    Raises:
        InputError: If options or rows are wrong, a package is missing or the suite cannot be scored.
        OutputError: If a folder to be written is there already.
    """
    from spectral_surgery.refining.job import read

    first = refines[0]
    first.options.check()
    read(first.data, first.train_data, first.task_data, first.options, first.rows, tokenizer, first.batching)
    unseen = first.data
    if (unseen or suite) and importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--then refine scores with lm-evaluation-harness. Install it with: "
            "pip install 'spectral-surgery[train,evaluate]'."
        )
    for refine in refines:
        if (there := evaluation_folder(Path(refine.adapter))).exists():
            raise OutputError(f"{there} exists, where the scores would go. Move it away, or choose another --output.")
    if suite:
        from spectral_surgery.evaluating.suite import SuiteOptions, prepare_suite

        prepare_suite(SuiteOptions(suite=suite, confirm_run_unsafe_code=unsafe), tokenizer)


def refine_and_evaluate(refine: Refine, suite: str | None, *, unsafe: bool = False) -> None:
    """Refines an adapter, then scores base, unedited and (where it won) refined.

    Args:
        refine: The command, with the adapter and the folder to write to.
        suite: What is scored; without it the rows that the verdict was made on.
        unsafe: Whether the user agreed to run code that the model writes.
    """
    print(f"\nRefining {refine.adapter}; verdict and report go to {refine.output}.")
    refine.run()
    assert refine.output is not None
    if suite is None and refine.data is None:
        print("Not scored: there are no rows that it did not learn from. Pass --refine-data or --evaluate-suite.")
        return
    scored = suite or str(_test_rows(refine, refine.output / TEST_ROWS))
    refined = refine.output / "adapter"
    names = [str(refined), "--against", refine.adapter] if refined.exists() else [refine.adapter]
    command = ["spectral-surgery", "evaluate", *names, "--suite", scored]
    command += ["--output", str(evaluation_folder(Path(refine.adapter))), *_loading(refine)]
    command += ["--confirm-run-unsafe-code"] * unsafe
    print(f"\n{shlex.join(command)}")
    _parsed(command).run()


def _loading(refine: Refine) -> list[str]:
    model = refine.model
    named = {"--base-model": model.base_model, "--device": model.device if model.device != "auto" else None}
    switched = {"--load-in-4bit": model.load_in_4bit, "--trust-remote-code": model.trust_remote_code}
    given = [word for option, value in named.items() if value for word in (option, value)]
    return given + [option for option, on in switched.items() if on]


def _parsed(command: list[str]) -> Evaluate:
    from spectral_surgery.cli import parse

    found = parse(command[1:])
    assert isinstance(found, Evaluate)
    return found


def _test_rows(refine: Refine, path: Path) -> Path:
    """Writes the rows that the verdict was made on as a file of prompts and answers, and returns it."""
    from spectral_surgery.reading import read_rows
    from spectral_surgery.refining.job import prepare

    job = prepare(
        refine.load(),
        refine.data,
        train_data=refine.train_data,
        options=refine.options,
        rows=refine.rows,
        selection=refine.selection,
        model=refine.model,
        batching=refine.batching,
    )
    examples = [*job.task.test.examples, *(job.task.validation.examples if job.task.swapped else ())]
    rows = read_rows(str(refine.data), refine.rows) if any(each.templated for each in examples) else []
    lines = [json.dumps(_row(each, rows), ensure_ascii=False) + "\n" for each in examples]
    path.write_text("".join(lines), encoding="utf-8")
    also = " on half of which it was chosen, each half by the other" if job.task.swapped else ""
    print(f"\nScored: the {len(examples)} rows that the verdict was made on{also}, which are in {path}.")
    return path


def _row(example: Example, rows: Sequence[Any]) -> dict[str, Any]:
    """Returns prompt and answer; a conversation as it was, so that the chat template is put on once."""
    if example.templated:
        return dict(rows[example.row])
    return {"prompt": example.prompt, "answer": example.answer}
