"""The loss of large vocabularies in pieces, against torch's own, in value, gradient and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_surgery import Live, objective
from spectral_surgery.calibration import Batch
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import answer_loss, token_losses


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def by_logits(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and their gradient weighted unevenly."""
    leaf = logits.clone().requires_grad_()
    losses = loss(leaf, labels)
    losses.backward(torch.linspace(0.1, 2.0, len(labels), dtype=losses.dtype))
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 3 * 50, 2**24])
def test_losses_in_pieces_and_their_gradients_are_those_of_the_whole(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 50, generator=generator)).to(dtype)
    labels = torch.randint(0, 50, (7,), generator=generator)
    found, wanted = by_logits(token_losses, logits, labels), by_logits(plain, logits, labels)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_backward_keeps_the_logits_and_nothing_else_of_their_size() -> None:
    logits = torch.randn(64, 500).bfloat16().requires_grad_()
    labels = torch.zeros(64, dtype=torch.int64)

    def saved(loss: Callable[[Tensor, Tensor], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(logits, labels)
        return sum(sizes.values())

    assert saved(token_losses) == logits.nbytes + labels.nbytes
    assert saved(plain) >= 2 * logits.nbytes


def as_batch(rows: dict[str, Tensor]) -> Batch:
    return Batch(rows["input_ids"], rows["attention_mask"], rows["labels"], tuple(range(len(rows["labels"]))))


@pytest.mark.parametrize("targets", [tiny.TARGETS, [*tiny.TARGETS, "lm_head"]])
def test_sensitivities_are_those_from_all_logits_also_where_the_head_is_adapted(targets: list[str]) -> None:
    live = Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64, target_modules=targets))
    rows = tiny.batch(rows=4)
    found = measure_live(live, [as_batch(rows)])
    wanted = measure_live(live, [rows], loss=tiny.loss)
    for path, module in wanted.modules.items():
        torch.testing.assert_close(found.modules[path].gate_gradient, module.gate_gradient, rtol=1e-9, atol=1e-13)


def test_a_model_that_changes_its_logits_after_the_head_keeps_doing_so() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5)
    model, rows = Gemma2ForCausalLM(config).eval(), tiny.batch()
    torch.testing.assert_close(answer_loss(model, as_batch(rows)), tiny.loss(model, rows))
    assert not model.lm_head._forward_pre_hooks
