"""Records: their file, how two variants' are paired, and what is said of the difference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from spectral_surgery.errors import DataError
from spectral_surgery.evaluating.records import Record, mcnemar, paired, read_records, write_records
from spectral_surgery.evaluating.samples import from_samples
from spectral_surgery.evaluating.standings import as_markdown, as_text, standings
from spectral_surgery.statistics import paired_proportions


def record(variant: str, doc: int, value: float, **changes: Any) -> Record:
    settings = {"task": "t", "metric": "acc", "doc_hash": f"d{doc}", "prompt_hash": f"p{doc}", **changes}
    return Record(variant=variant, value=value, **settings)


def records(variant: str, values: list[float], **changes: Any) -> list[Record]:
    return [record(variant, doc, float(value), **changes) for doc, value in enumerate(values)]


def test_a_file_of_records_reads_back_as_it_was(tmp_path: Path) -> None:
    wanted = [*records("a", [0, 1]), record("b", 3, 0.25, part=2, cluster="é", truncated=True, filter="strict")]
    write_records(tmp_path / "r.jsonl", wanted)
    assert read_records(tmp_path / "r.jsonl") == wanted


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 is not a scored example"),
        ('{"variant": "a"}', "line 2 is not a scored example"),
        ('{"foreign": 1}', "line 2 is not a scored example"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, records("a", [1]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_a_value_that_is_not_finite_or_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, records("a", [1]))
    row = json.loads(path.read_text())
    for value in ("NaN", '"one"'):
        path.write_text(json.dumps(row).replace('"value": 1.0', f'"value": {value}'))
        with pytest.raises(DataError, match="not a scored example"):
            read_records(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_right_and_wrong_are_compared_by_tango_and_mcnemar() -> None:
    a, b = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1, 0, 1]
    (found,) = paired(records("a", a), records("b", b))
    assert (found.wins, found.losses) == (3, 1)
    assert found.difference() == paired_proportions(3, 1, 8)
    assert found.p_value() == binomtest(3, 4, 0.5).pvalue


def test_pairs_are_joined_by_document_whatever_the_order() -> None:
    a, b = records("a", [1, 0, 0, 1]), records("b", [0, 0, 1, 1])
    (found,) = paired(a, b[::-1])
    assert found.a.tolist() == [1, 0, 0, 1]
    assert found.b.tolist() == [0, 0, 1, 1]


def test_no_difference_has_p_one_and_limits_of_some_width() -> None:
    assert mcnemar(0, 0) == 1.0
    for cluster in ("", "all"):
        same = records("a", [1, 0, 1, 1], cluster=cluster)
        (found,) = paired(same, records("b", [1, 0, 1, 1], cluster=cluster))
        gap = found.difference()
        assert found.p_value() == 1.0
        assert gap.low < 0 == gap.estimate < gap.high


def test_losses_are_compared_by_bootstrap_and_sign_flips() -> None:
    random = np.random.default_rng(0)
    a = random.normal(2.0, 1.0, 60)
    b = a + random.normal(0.15, 0.4, 60)
    (found,) = paired(records("a", a.tolist()), records("b", b.tolist()))
    gap, test = found.difference(), ttest_rel(b, a)
    low, high = test.confidence_interval()
    assert gap.estimate == pytest.approx((b - a).mean())
    assert (gap.low, gap.high) == pytest.approx((low, high), abs=0.03)
    assert found.p_value() == pytest.approx(test.pvalue, abs=0.02)


def test_records_of_one_cluster_count_as_one_piece_of_evidence() -> None:
    """Twelve prompts of three instructions each: the p value is that of twelve signs, not of thirty-six."""
    a = [record("a", i // 3, 0.0, part=i % 3, cluster=f"c{i // 3}") for i in range(36)]
    b = [record("b", i // 3, float(i // 3 < 6), part=i % 3, cluster=f"c{i // 3}") for i in range(36)]
    (found,) = paired(a, b)
    assert found.clustered
    assert found.p_value() == pytest.approx(2 * 0.5**6)
    assert mcnemar(18, 0) < 1e-4
    gap = found.difference()
    assert gap.high - gap.low > paired_proportions(18, 0, 36).high - paired_proportions(18, 0, 36).low


def test_one_group_of_losses_has_no_limits() -> None:
    (found,) = paired(records("a", [1.5]), records("b", [1.25]))
    assert (found.difference().low, found.difference().high) == (-math.inf, math.inf)
    assert found.p_value() == 1.0


def test_every_reason_why_two_cannot_be_compared_is_named() -> None:
    a = [*records("a", [1, 0]), *records("a", [1, 0], metric="f1"), *records("a", [1], task="other")]
    changed = records("b", [1, 0], prompt_hash="another")
    b = [*changed, *records("b", [1, 0, 1], metric="f1")]
    with pytest.raises(DataError) as refused:
        paired(a, b)
    said = str(refused.value)
    assert "t acc: 2 of 2 documents had different prompts" in said
    assert "t f1: 2 documents are in both, 1 in one only" in said
    assert "other acc: only one of the two has it" in said


def test_a_document_that_stands_twice_is_refused() -> None:
    with pytest.raises(DataError, match="scored 2 times by one variant"):
        paired([*records("a", [1]), *records("a", [0])], records("b", [1]))
    with pytest.raises(DataError, match="no records"):
        paired([], [])


def sample(doc: str, **metrics: Any) -> dict[str, Any]:
    return {
        "doc_id": 0,
        "doc_hash": doc,
        "prompt_hash": f"p{doc}",
        "metrics": list(metrics),
        "filter": "none",
        **metrics,
    }


def test_samples_become_a_record_for_every_metric_and_entry() -> None:
    found = from_samples([sample("x", acc=True, inst=[True, False], perplexity=(1.5, 3))], variant="v", task="t")
    assert [(one.metric, one.part, one.value, one.cluster) for one in found] == [
        ("acc", 0, 1.0, ""),
        ("inst", 0, 1.0, "x"),
        ("inst", 1, 0.0, "x"),
    ]


def test_equal_documents_are_told_apart_in_their_order() -> None:
    found = from_samples([sample("x", acc=1.0), sample("x", acc=0.0)], variant="v", task="t")
    assert [(one.doc_hash, one.value) for one in found] == [("x", 1.0), ("x#2", 0.0)]


def test_samples_of_releases_that_list_no_metrics_are_read() -> None:
    old = {"doc_id": 1, "doc": {}, "target": 3, "doc_hash": "x", "prompt_hash": "p", "acc": 1.0, "acc_norm": 0.0}
    assert [one.metric for one in from_samples([old], variant="v", task="t")] == ["acc", "acc_norm"]


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"doc_id": 0, "acc": 1.0}, "no doc_hash and no prompt_hash"),
        (sample("x", acc=math.nan), "has the value nan"),
        (sample("x", text="yes"), "no sample has a metric that is a number"),
    ],
)
def test_samples_that_cannot_be_compared_say_why(faulty: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_samples([faulty], variant="v", task="t")


def test_standings_hold_every_variant_against_the_reference() -> None:
    rows = [
        *records("base", [0, 0, 0, 1]),
        *records("mine", [1, 1, 0, 1]),
        *records("other", [1, 1, 1, 0], truncated=True),
    ]
    found = standings(rows, "mine")
    assert [(one.variant, one.value, one.higher, one.lower, one.truncated) for one in found] == [
        ("base", 0.25, 0, 2, 0),
        ("mine", 0.75, 0, 0, 0),
        ("other", 0.75, 1, 1, 4),
    ]
    assert found[1].difference is None
    text, page = as_text(found, "mine"), as_markdown(found, "mine")
    assert "against mine" in text
    assert text.count("t acc") == 1
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1
