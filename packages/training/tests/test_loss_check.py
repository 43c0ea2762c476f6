"""Losses that the user's own loop computes: those that keep rows apart pass, the others are refused with the fix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dpfa_core.errors import NotPrivateError
from dpfa_training import engine_of, make_private

ROWS, TOKENS, WORDS = 24, 6, 7
Loss = Callable[[Tensor, Tensor], Tensor]


class Tagger(nn.Module):
    """Ids (B, T) to logits (B, T, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)))


def labels(padded: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, WORDS, (ROWS, TOKENS), generator=generator)
    if padded:
        lengths = torch.randint(2, TOKENS, (ROWS, 1), generator=generator)
        y[torch.arange(TOKENS)[None] >= lengths] = -100
    return y


def attached(y: Tensor, module: nn.Module | None = None, **options: object) -> tuple:
    torch.manual_seed(0)
    module = Tagger() if module is None else module
    data = TensorDataset(torch.randint(0, 12, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)), y)
    settings = {"noise_multiplier": 0.5, "max_grad_norm": 1.0, "seed": 4} | options
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return make_private(module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=8), **settings)


def train(loss: Loss, y: Tensor, **options: object) -> None:
    module, optimizer, loader = attached(y, **options)
    for a, b in loader.draws(4):
        loss(module(a), b).backward()
        optimizer.step()


def seen(y: Tensor) -> Tensor:
    return (y != -100).float()


def flat(out: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), **options)


def tokens(out: Tensor, y: Tensor) -> Tensor:
    """(B, T) losses, 0 where nothing is said."""
    return F.cross_entropy(out.mT, y, reduction="none")


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y.clamp(min=0), WORDS).float()


APART: dict[str, tuple[bool, Loss]] = {
    "cross_entropy of the first token": (False, lambda out, y: F.cross_entropy(out[:, 0], y[:, 0])),
    "cross_entropy of all tokens, of which every row has as many": (False, flat),
    "cross_entropy with classes in the middle": (False, lambda out, y: F.cross_entropy(out.mT, y)),
    "shifted by a token": (False, lambda out, y: flat(out[:, :-1].contiguous(), y[:, 1:])),
    "tokens first": (False, lambda out, y: F.cross_entropy(out.transpose(0, 1).reshape(-1, WORDS), y.T.reshape(-1))),
    "label smoothing": (False, lambda out, y: flat(out, y, label_smoothing=0.1)),
    "soft targets": (False, lambda out, y: F.cross_entropy(out[:, 0], one_hot(y[:, 0]))),
    "mean of each row's own tokens": (
        True,
        lambda out, y: ((tokens(out, y) * seen(y)).sum(1) / seen(y).sum(1)).mean(),
    ),
    "sum over tokens by a constant": (True, lambda out, y: flat(out, y, reduction="sum") / (TOKENS * len(y))),
    "chosen tokens, summed": (True, lambda out, y: F.cross_entropy(out[y >= 0], y[y >= 0], reduction="sum") / len(y)),
    "mse": (False, lambda out, y: F.mse_loss(out.softmax(-1), one_hot(y))),
    "l1, huber": (False, lambda out, y: F.l1_loss(out, one_hot(y)) + 0.5 * F.huber_loss(out, one_hot(y))),
    "bce": (False, lambda out, y: F.binary_cross_entropy_with_logits(out, one_hot(y))),
    "kl, batchmean": (False, lambda out, y: F.kl_div(out.log_softmax(-1), one_hot(y), reduction="batchmean")),
    "margin": (False, lambda out, y: F.multi_margin_loss(out[:, 1], y[:, 1])),
    "row by row in a loop": (
        False,
        lambda out, y: sum(F.cross_entropy(one, own) for one, own in zip(out, y, strict=True)) / len(y),
    ),
    "rows stacked": (
        False,
        lambda out, y: torch.stack([F.cross_entropy(a, b) for a, b in zip(out, y, strict=True)]).mean(),
    ),
    "last token by index": (
        False,
        lambda out, y: F.cross_entropy(out[torch.arange(len(out)), y[:, 0] % TOKENS], y[:, 1]),
    ),
    "gathered": (False, lambda out, y: -out.log_softmax(-1).gather(2, y[..., None]).squeeze(2).sum(1).mean()),
    "triplet of own tokens": (False, lambda out, y: F.triplet_margin_loss(out[:, 0], out[:, 1], out[:, 2])),
    "two terms, scaled": (False, lambda out, y: 0.3 * (flat(out, y) + 0.01 * out.square().mean()) / 2),
    "one tensor of losses with its gradient": (False, lambda out, y: tokens(out, y).mean(1)),
}


@pytest.mark.parametrize("name", APART)
def test_losses_that_keep_rows_apart_pass(name: str) -> None:
    padded, loss = APART[name]

    module, optimizer, loader = attached(labels(padded))
    for a, b in loader.draws(4):
        found = loss(module(a), b)
        found.backward(torch.full_like(found, 1 / len(found)) if found.dim() else None)
        optimizer.step()
    assert engine_of(module).steps == 4


COUPLED: dict[str, tuple[bool, Loss, str]] = {
    "ignored tokens": (True, flat, r"mean over tokens, \d+ of which are left out \(ignore_index\)"),
    "class weights": (False, lambda out, y: flat(out, y, weight=torch.arange(1.0, 1 + WORDS)), "class weights"),
    "label smoothing and ignored tokens": (True, lambda out, y: flat(out, y, label_smoothing=0.1), "ignore_index"),
    "sum by the tokens' number": (
        True,
        lambda out, y: (tokens(out, y) * seen(y)).sum() / int((y >= 0).sum()),
        r"a mean over the \d+ tokens of all rows",
    ),
    "sum by the tokens' number, a tensor": (
        True,
        lambda out, y: (tokens(out, y) * seen(y)).sum() / seen(y).sum(),
        "a tensor of one number .* by which the terms are divided",
    ),
    "each token by the tokens' number": (
        True,
        lambda out, y: (tokens(out, y) / int((y >= 0).sum())).sum(),
        r"a mean over the \d+ tokens of all rows",
    ),
    "weights that add up to one": (
        True,
        lambda out, y: (tokens(out, y) * (seen(y) / seen(y).sum())).sum(),
        "weights of terms that add up to 1 over all rows",
    ),
    "chosen tokens": (True, lambda out, y: F.cross_entropy(out[y >= 0], y[y >= 0]), "some rows have more than others"),
    "chosen tokens by their number": (
        True,
        lambda out, y: tokens(out, y).masked_select(y >= 0).mean(),
        "some rows have more than others",
    ),
    "contrastive": (
        False,
        lambda out, y: F.cross_entropy(out[:, 0] @ out[:, 1].T, torch.arange(len(out))),
        "terms of different rows|rows in dimension 1",
    ),
    "softmax over the batch": (
        False,
        lambda out, y: out.softmax(0).square().mean(),
        "rows that move the terms of other",
    ),
    "outputs normalised over the batch": (
        False,
        lambda out, y: flat((out - out.mean(0)) / out.std(0), y),
        "Std over the rows|terms of different rows|of a sum over rows",
    ),
    "batch_norm": (False, lambda out, y: flat(F.batch_norm(out.mT, None, None, training=True).mT, y), "rows that move"),
    "pairs of neighbours": (False, lambda out, y: (out - out.roll(1, 0)).square().mean(), "rows that move the terms"),
    "pairs by an index": (
        False,
        lambda out, y: (out - out[torch.arange(len(out)).flip(0)]).square().mean(),
        "Pow of a sum over rows",
    ),
    "two halves": (
        False,
        lambda out, y: (out[: len(out) // 2] * out[len(out) - len(out) // 2 :]).mean(),
        "Mul of the terms of different rows",
    ),
    "everyone against everyone by broadcasting": (
        False,
        lambda out, y: (out[:, 0, 0] - y[:, :1].float()).square().mean(),
        "every row meets every other",
    ),
    "root of the mean": (False, lambda out, y: F.mse_loss(out, one_hot(y)).sqrt(), "Sqrt of a sum over rows"),
    "the worst row": (False, lambda out, y: tokens(out, y).mean(1).max(), "Max"),
    "a norm of everything": (False, lambda out, y: out.norm(), "Norm"),
    "sorted": (False, lambda out, y: out.sort(0).values.mul(2).square().mean(), "rows that move the terms"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_are_refused_with_the_fix(name: str) -> None:
    padded, loss, reason = COUPLED[name]
    with pytest.raises(NotPrivateError, match=rf"(?s)({reason}).*compute one loss for each row"):
        train(loss, labels(padded))


def test_fault_3_a_mean_over_tokens_outside_the_module_is_refused_before_anything_is_released() -> None:
    module, optimizer, loader = attached(labels(padded=True))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    a, b = next(iter(loader))
    with pytest.raises(NotPrivateError, match=r"reduction=\"none\", then a mean over the row's own tokens"):
        flat(module(a), b).backward()
    with pytest.raises(NotPrivateError, match="a step needs a batch that went through forward and backward"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not list(engine_of(module).ledger.events())


def test_ignored_tokens_are_found_in_whichever_step_they_come() -> None:
    y = labels(padded=False)
    module, optimizer, loader = attached(y)
    batches = iter(loader.draws(6))
    for _ in range(4):
        a, b = next(batches)
        flat(module(a), b).backward()
        optimizer.step()
    a, b = next(batches)
    b = b.clone()
    b[0, 3:] = -100
    with pytest.raises(NotPrivateError, match="ignore_index"):
        flat(module(a), b).backward()
    assert engine_of(module).steps == 4


@pytest.mark.parametrize(
    ("reduction", "loss"),
    [
        ("mean", lambda out, y: tokens(out, y).mean(1).sum()),
        ("sum", lambda out, y: tokens(out, y).mean(1).mean()),
        ("mean", lambda out, y: tokens(out, y).sum() / (3 + float(y.float().mean()))),
    ],
)
def test_a_factor_that_changes_from_step_to_step_is_refused(reduction: str, loss: Loss) -> None:
    with pytest.raises(NotPrivateError, match=f'counted .* at the first step under reduction="{reduction}"'):
        train(loss, labels(padded=False), reduction=reduction)


def test_parts_of_any_size_count_the_same() -> None:
    own = APART["mean of each row's own tokens"][1]
    for size in (1, 3):
        for reduction, loss in (("mean", flat), ("sum", lambda out, y: flat(out, y, reduction="sum")), ("mean", own)):
            train(loss, labels(padded=loss is own), reduction=reduction, max_physical_batch_size=size)


@pytest.mark.parametrize("name", ["ignored tokens", "class weights", "chosen tokens", "root of the mean"])
def test_rows_one_by_one_are_looked_at_like_others(name: str) -> None:
    padded, loss, reason = COUPLED[name]
    with pytest.raises(NotPrivateError, match=rf"(?s)({reason}|counted .* at the first step).*one loss for each row"):
        train(loss, labels(padded), max_physical_batch_size=1)


def test_a_loss_scaler_is_refused_by_name() -> None:
    module, _, loader = attached(labels(padded=False))
    scaler = torch.amp.GradScaler("cpu")
    a, b = next(iter(loader))
    with pytest.raises(NotPrivateError, match=r"65536 times that, as a GradScaler makes it.*bfloat16"):
        scaler.scale(flat(module(a), b)).backward()


def test_a_function_of_the_users_own_is_believed_where_it_keeps_rows_and_refused_where_it_joins_them() -> None:
    class PerRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.flatten(1).sum(1)

        @staticmethod
        def backward(ctx, grad):
            return grad.view(-1, 1, 1).expand(ctx.shape)

    class Whole(PerRow):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(ctx.shape)

    train(lambda out, y: PerRow.apply(out).mean(), labels(padded=False))
    with pytest.raises(NotPrivateError, match="WholeBackward with a result of shape"):
        train(lambda out, y: Whole.apply(out), labels(padded=False))


def test_a_backward_that_goes_around_the_check_is_refused() -> None:
    from dpfa_training import loss_check

    module, optimizer, loader = attached(labels(padded=False))
    a, b = next(iter(loader))
    with pytest.raises(NotPrivateError, match=r"call loss\.backward\(\)"):
        loss_check._torch_backward(flat(module(a), b))
    with pytest.raises(NotPrivateError, match="a step needs"):
        optimizer.step()


class OwnLoss(Tagger):
    """A module in the style of transformers: logits, and a loss where labels are given."""

    def __init__(self, per_row: bool) -> None:
        super().__init__()
        self.per_row = per_row

    def forward(self, ids: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = super().forward(ids)
        own = (tokens(out, y) * seen(y)).sum(1) / seen(y).sum(1)
        return {"loss": own.mean() if self.per_row else flat(out, y), "logits": out}


def test_fault_3_a_mean_over_tokens_inside_the_module_is_refused_also_after_the_first_batch() -> None:
    for per_row in (True, False):
        module, optimizer, loader = attached(labels(padded=False), OwnLoss(per_row))
        with contextlib.nullcontext() if per_row else pytest.raises(NotPrivateError, match="ignore_index"):
            for step, (a, b) in enumerate(loader.draws(4)):
                b = b.clone()
                if step == 2:
                    b[0, 3:] = -100
                module(a, b)["loss"].backward()
                optimizer.step()


class OnlyLoss(Tagger):
    """Returns the mean of its rows' losses, and what its row dimension is not the first of."""

    def forward(self, ids: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = super().forward(ids)
        return {"loss": tokens(out, y).mean(1).mean(), "tokens first": out.sin().transpose(0, 1)}


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (lambda found: found["loss"] / 2, None),
        (lambda found: found["loss"].exp(), "Exp of a sum over rows"),
        (lambda found: found["loss"].square() / 2, "Pow of a sum over rows"),
        (lambda found: found["loss"] * found["loss"].detach(), "a tensor of one number"),
        (lambda found: found["tokens first"].square().mean(), "does not have one row per sample"),
        (lambda found: found["loss"] + found["tokens first"].mean(), "does not have one row per sample"),
    ],
)
def test_what_the_loop_makes_of_a_modules_own_loss_must_stay_linear(of, reason) -> None:
    module, optimizer, loader = attached(labels(padded=False), OnlyLoss())
    with contextlib.nullcontext() if reason is None else pytest.raises(NotPrivateError, match=reason):
        for a, b in loader.draws(3):
            of(module(a, b)).backward()
            optimizer.step()


def test_outputs_that_the_loss_leads_past_get_no_gradient_of_the_look() -> None:
    class Hidden(Tagger):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.words(ids))
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: seen.append(1))
            return {"logits": self.head(hidden), "hidden": hidden}

    seen: list[int] = []
    module, optimizer, loader = attached(labels(padded=False), Hidden())
    for step, (a, b) in enumerate(loader.draws(3)):
        logits = module(a)["logits"]
        before = len(seen)  # a self-check's among them
        flat(logits, b).backward()
        optimizer.step()
        assert len(seen) == before + 1, step


def test_a_validation_between_forward_and_backward_does_not_open_the_check() -> None:
    module, _, loader = attached(labels(padded=True))
    a, b = next(iter(loader))
    out = module(a)
    module.eval()
    with torch.no_grad():
        module(a[:1])
    module.train()
    with pytest.raises(NotPrivateError, match="compute one loss for each row"):
        flat(out, b).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_of_the_model_is_part_of_the_outer_backward(reentrant: bool) -> None:
    class Checkpointed(Tagger):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.words(ids).requires_grad_()
            return checkpoint(lambda x: self.head(torch.tanh(x)), hidden, use_reentrant=reentrant)

    module, optimizer, loader = attached(labels(padded=False), Checkpointed())
    for a, b in loader.draws(3):
        flat(module(a), b).backward()
        optimizer.step()
    assert engine_of(module).steps == 3


def test_other_backward_passes_are_left_alone() -> None:
    module, optimizer, loader = attached(labels(padded=False))
    for a, b in loader.draws(2):
        loss = flat(module(a), b)
        w = torch.ones(3, requires_grad=True)
        w.square().sum().backward()
        assert torch.equal(w.grad, torch.full((3,), 2.0))
        loss.backward()
        optimizer.step()
    assert engine_of(module).steps == 2


def test_the_look_at_the_loss_changes_no_gradient() -> None:
    found: list[list[Tensor]] = []
    for _ in range(2):
        module, optimizer, loader = attached(labels(padded=False), noise_multiplier=0.0)
        if found:
            engine_of(module)._loss._probe = lambda *args: None
        for a, b in loader.draws(2):
            flat(module(a), b).backward()
            optimizer.step()
        found.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
