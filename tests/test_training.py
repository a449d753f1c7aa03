"""How a schedule trains: rates, clipping, decay and dropout."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparse_attn.finetuning import finetune_question_answering
from tests.helpers import weights
from tests.test_finetuning import marked_windows, tiny_model


@pytest.fixture
def steps():
    """The rate, the norm of the gradients and the parameters by weight decay of each step that an optimizer takes."""
    seen = []

    def look(optimizer, *_):
        groups = optimizer.param_groups
        gradients = [each.grad.flatten() for group in groups for each in group["params"] if each.grad is not None]
        decayed = {group["weight_decay"]: [each.ndim for each in group["params"]] for group in groups}
        seen.append((groups[0]["lr"], torch.cat(gradients).norm().item(), decayed))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def test_the_rate_rises_and_falls_and_gradients_are_clipped(steps):
    model = tiny_model()
    model.qa_outputs.weight.data.mul_(100)  # gradients of large norm
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup_share": 0.4, "progress": False}
    finetune_question_answering(model, marked_windows(40), 0, **settings)
    rates, norms, _ = zip(*steps)
    shares = (0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
    assert rates == pytest.approx([1e-3 * share for share in shares])
    assert max(norms) == pytest.approx(1, rel=1e-3)


def test_biases_and_norms_do_not_decay(steps):
    finetune_question_answering(tiny_model(), marked_windows(4), 0, epochs=1, weight_decay=0.3, progress=False)
    ((*_, decayed),) = steps
    assert decayed.keys() == {0.3, 0.0} and set(decayed[0.3]) == {2} and set(decayed[0.0]) == {1}


def test_a_head_may_have_a_rate_of_its_own():
    model = tiny_model()
    head, encoder = weights(model.qa_outputs), weights(model.bert)
    finetune_question_answering(model, marked_windows(32), 0, epochs=1, head_learning_rate=0.0, progress=False)
    assert torch.equal(weights(model.qa_outputs), head) and not torch.equal(weights(model.bert), encoder)


@pytest.mark.parametrize(("dropout", "used"), [(0.3, 0.3), (0.0, 0.0), (None, 0.1)])
def test_dropout_is_set_for_the_training_alone(dropout, used):
    model, seen = tiny_model(), set()

    def shares() -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    model.register_forward_hook(lambda *_: seen.update(shares()))
    finetune_question_answering(model, marked_windows(4), 0, epochs=1, dropout=dropout, progress=False)
    assert seen == {used} and shares() == {0.1}
