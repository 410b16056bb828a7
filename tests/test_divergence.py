"""KL from a reference model per example, against the whole vocabulary in float64 and finite differences."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery.calibration import Batch, Tokenized, TokenizedExample, batches
from spectral_surgery.divergence import Agreement, Divergence, Reference, reference
from spectral_surgery.errors import DataError, RunError
from spectral_surgery.live import Live
from spectral_surgery.measuring import measure_live
from spectral_surgery.options import BatchOptions


def tokenized(count: int = 5, answer: int = 3) -> Tokenized:
    """Random token rows of different lengths, with answers of different lengths."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (8 + 2 * i,), generator=generator).tolist()
        rows.append(TokenizedExample(tuple(ids), len(ids) - answer - i % 2, f"row {i}"))
    return Tokenized(rows, 0)


def adapted() -> Live:
    return Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64))


def of_base(live: Live, rows: Tokenized, k: int = 256) -> Reference:
    with live.base():
        return reference(live, rows, k=k)


@torch.no_grad()
def answer_log_probs(model: torch.nn.Module, row: TokenizedExample) -> torch.Tensor:
    """(answer positions, vocabulary) of one example alone, from all logits."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    return logits[row.answer_start - 1 : -1].log_softmax(-1)


def dense(live: Live, row: TokenizedExample, k: int) -> float:
    """The mean divergence of adapter from base with everything below the k-th token merged."""
    ours = answer_log_probs(live.model, row).exp()
    with live.base():
        theirs = answer_log_probs(live.model, row).exp()
    order = theirs.argsort(dim=1, descending=True)
    p, q = (
        torch.cat([sorted_[:, :k], sorted_[:, k:].sum(1, keepdim=True)], 1)
        for sorted_ in (theirs.gather(1, order), ours.gather(1, order))
    )
    terms = torch.where(p > 0, p * (p.log() - q.log()), 0.0)
    return terms.sum(1).mean().item()


def values(score: Divergence | Agreement, model: torch.nn.Module, rows: Tokenized) -> np.ndarray:
    """Scores in the order of the rows."""
    found = np.full(len(rows.examples), np.nan)
    for batch in batches(rows, batch_size=2):
        found[list(batch.indices)] = score(model, batch).detach().numpy()
    return found


@pytest.mark.parametrize("k", [1, 4, tiny.VOCABULARY - 1, tiny.VOCABULARY, 256])
def test_it_is_the_divergence_over_the_vocabulary_with_the_tail_merged(k: int) -> None:
    live, rows = adapted(), tokenized()
    found = values(Divergence(of_base(live, rows, k), rows), live.model, rows)
    np.testing.assert_allclose(found, [dense(live, row, k) for row in rows.examples], rtol=1e-6)
    assert (found > 1e-3).all()


def test_only_the_likeliest_tokens_are_kept_and_one_bucket_for_the_others() -> None:
    live, rows = adapted(), tokenized()
    kept = of_base(live, rows, k=4).predicted["row 1"]
    with live.base():
        whole = answer_log_probs(live.model, rows.examples[1])
    assert kept.ids.shape == (4, 4)
    assert kept.ids.tolist() == whole.topk(4).indices.tolist()
    torch.testing.assert_close(kept.log_probs.exp().sum(1), torch.ones(4, dtype=torch.float64))
    assert of_base(live, rows).predicted["row 1"].log_probs.shape == (4, tiny.VOCABULARY)


def test_a_model_does_not_diverge_from_itself_and_agrees_with_itself() -> None:
    model, rows = tiny.llama(), tokenized()
    same = reference(model, rows, BatchOptions(batch_size=1), k=8)
    assert np.abs(values(Divergence(same, rows), model, rows)).max() < 2e-6
    assert (values(Agreement(same, rows), model, rows) == 1).all()


def test_a_small_tail_is_not_lost() -> None:
    logits = torch.tensor([[40.0, 39.0, 0.0, -1.0]])
    model = Fixed(logits)
    rows = Tokenized([TokenizedExample((1, 2), 1, "a")], 0)
    kept = reference(model, rows, k=2).predicted["a"]
    wanted = logits.double().log_softmax(-1)[0, 2:].logsumexp(0)
    torch.testing.assert_close(kept.log_probs[0, 2].double(), wanted, rtol=1e-6, atol=0)


def test_tokens_that_cannot_be_said_count_for_nothing() -> None:
    rows = Tokenized([TokenizedExample((1, 2), 1, "a")], 0)
    kept = reference(Fixed(torch.tensor([[1.0, 2.0, 0.0, -torch.inf]])), rows, k=2)
    found = Divergence(kept, rows)(Fixed(torch.tensor([[1.0, 2.0, -torch.inf, 0.0]])), batches(rows)[0])
    torch.testing.assert_close(found, torch.zeros(1))


class Fixed(torch.nn.Module):
    """A model that gives the same logits at every position."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Embedding(4, 1)

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        shape = (*input_ids.shape, self.logits.shape[-1])
        return type("Out", (), {"logits": self.logits.expand(shape)})


def test_its_derivative_by_gates_is_that_of_finite_differences() -> None:
    live, rows = adapted(), tokenized(3)
    score = Divergence(of_base(live, rows, k=4), rows)
    measured = measure_live(live, batches(rows, batch_size=2), loss=score)
    path, step = live.paths[3], 1e-4
    for component in (0, 3):
        gates = np.ones((2, 4))
        gates[:, component] += [step, -step]
        at = []
        for alpha in gates:
            with live.gated({path: alpha}):
                at.append(values(score, live.model, rows))
        numerical = (at[0] - at[1]) / (2 * step)
        np.testing.assert_allclose(measured.modules[path].gate_gradient[:, component], numerical, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(measured.losses, values(score, live.model, rows), rtol=1e-9)


def test_measuring_in_halves_keeps_each_example_with_its_own_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    live, rows = adapted(), tokenized()
    score = Divergence(of_base(live, rows), rows)
    whole = measure_live(live, batches(rows), loss=score)

    def no_more_than_two(model: object, batch: Batch) -> torch.Tensor:
        if len(batch.indices) > 2:
            raise torch.OutOfMemoryError
        return score(model, batch)

    halved = measure_live(live, batches(rows), loss=no_more_than_two)
    np.testing.assert_allclose(halved.losses, whole.losses, rtol=1e-9)
    assert len(set(whole.losses)) == 5


def test_a_reference_made_in_halves_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny.llama(), tokenized()
    whole = reference(model, rows)
    forward = model.forward

    def small(input_ids: torch.Tensor, **kwargs: object) -> object:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **kwargs)

    model.forward = small
    found = reference(model, rows)
    for digest, kept in whole.predicted.items():
        torch.testing.assert_close(found.predicted[digest].log_probs, kept.log_probs)
    assert "going on with half of them" in caplog.text


def test_one_example_too_large_for_memory_is_said() -> None:
    model = tiny.llama()

    def never(**kwargs: object) -> object:
        raise torch.OutOfMemoryError

    model.forward = never
    with pytest.raises(RunError, match="One example alone needs more memory"):
        reference(model, tokenized())


def test_agreement_is_the_share_of_positions_with_the_same_likeliest_token() -> None:
    live, rows = adapted(), tokenized(6)
    found = values(Agreement(of_base(live, rows, k=2), rows), live.model, rows)
    wanted = []
    for row in rows.examples:
        ours = answer_log_probs(live.model, row).argmax(1)
        with live.base():
            wanted.append((ours == answer_log_probs(live.model, row).argmax(1)).double().mean().item())
    np.testing.assert_allclose(found, wanted)
    assert 0 < found.mean() < 1


def test_reading_a_reference_leaves_dropout_and_flags_as_they_were() -> None:
    model, rows = tiny.lora(tiny.llama()), tokenized()
    still = reference(model, rows)
    model.train()
    before = [module.training for module in model.modules()]
    found = reference(model, rows)
    assert [module.training for module in model.modules()] == before
    torch.testing.assert_close(found.predicted["row 0"].log_probs, still.predicted["row 0"].log_probs)


def test_progress_counts_examples_and_memory_is_known() -> None:
    seen: list[tuple[int, int]] = []
    found = reference(tiny.llama(), tokenized(5), BatchOptions(batch_size=2), 8, lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    positions = sum(len(kept.ids) for kept in found.predicted.values())
    assert found.nbytes == positions * (8 * 4 + 9 * 4)


def test_a_reference_of_other_examples_is_refused() -> None:
    rows = tokenized()
    kept = reference(tiny.llama(), rows)
    cut = Tokenized([TokenizedExample(rows.examples[0].input_ids[:-1], rows.examples[0].answer_start, "row 0")], 0)
    with pytest.raises(DataError, match=r"example 0 has 2 answer tokens, but the reference holds 3 positions"):
        Divergence(kept, cut)
    with pytest.raises(DataError, match="holds nothing"):
        Agreement(Reference({}), rows)


def test_predictions_that_are_not_finite_are_refused() -> None:
    model = copy.deepcopy(tiny.llama())
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        reference(model, tokenized())
