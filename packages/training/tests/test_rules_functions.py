"""Each torch function with a rule, in modules that a user might write, against one sample at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_models import assert_exact

from dpfa_core.errors import NotPrivateError
from dpfa_training import clipped_gradients


def squares(module, x):
    """A loss with a different weight for every output."""
    out = module(x).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).square().sum(1)


class Module(nn.Module):
    """`forward` is the given function of (self, x); `parameters` are registered by name."""

    def __init__(self, function, **parameters):
        super().__init__()
        torch.manual_seed(3)
        self.function = function
        for name, item in parameters.items():
            if isinstance(item, nn.Module):
                setattr(self, name, item)
            else:
                setattr(self, name, nn.Parameter(torch.randn(item)))

    def forward(self, x):
        return self.function(self, x)


def rms(m, x):
    return m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def table(m, x):
    ids = torch.arange(x.shape[1])
    return torch.tanh(x + m.positions(ids) + m.positions(ids[None])) @ m.w


def classes(m, x):
    tokens = torch.cat([m.cls.expand(len(x), -1, -1), m.register.repeat(len(x), 2, 1), x], 1)
    return torch.tanh(tokens) + m.positions


def in_place(m, x):
    y = x.clone()
    y += m.b
    y.mul_(m.w)
    return y


def learned_queries(m, x):
    return F.scaled_dot_product_attention(m.q, x[:, None], x[:, None], attn_mask=m.bias)


WIDTH = 6
CASES = {
    "linear without bias": Module(lambda m, x: F.linear(x, m.w), w=(4, WIDTH)),
    "matmul": Module(lambda m, x: x @ m.w + m.b, w=(WIDTH, 4), b=(4,)),
    "matmul with the transpose": Module(lambda m, x: x @ m.w.T, w=(4, WIDTH)),
    "matmul from the left": Module(lambda m, x: torch.matmul(m.w, x.mT), w=(4, WIDTH)),
    "matmul with a vector": Module(lambda m, x: (x @ m.v)[..., None], v=(WIDTH,)),
    "addmm on flattened rows": Module(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, WIDTH), m.w).view(*x.shape[:-1], 4), w=(WIDTH, 4), b=(4,)
    ),
    "rows flattened with the sequence first": Module(
        lambda m, x: (
            F.linear(x.transpose(0, 1).reshape(-1, WIDTH), m.w, m.b).view(x.shape[1], len(x), 4).mT.mT.transpose(0, 1)
        ),
        w=(4, WIDTH),
        b=(4,),
    ),
    "part of a weight": Module(
        lambda m, x: F.linear(x, m.w[:4], m.b[:4]) * F.linear(x.cos(), m.w[4:], m.b[4:]), w=(8, WIDTH), b=(8,)
    ),
    "weights in chunks": Module(lambda m, x: sum(x.sin() @ w.T for w in m.w.chunk(2)), w=(8, WIDTH)),
    "weight of two factors": Module(
        lambda m, x: F.linear(x, m.frozen.data + m.b @ m.a), a=(2, WIDTH), b=(4, 2), frozen=(4, WIDTH)
    ),
    "hand-written root mean square norm": Module(rms, w=(WIDTH,)),
    "one plus a scale": Module(lambda m, x: (1.0 + m.w.float()) * x, w=(WIDTH,)),
    "scalar parameter": Module(lambda m, x: x.sin() * m.t.exp() + m.t, t=()),
    "division and power": Module(lambda m, x: (x / m.w) + x.abs() ** m.p.sigmoid(), w=(WIDTH,), p=(WIDTH,)),
    "where": Module(lambda m, x: torch.where(x > 0, x, m.w * x), w=(WIDTH,)),
    "in place": Module(in_place, w=(WIDTH,), b=(WIDTH,)),
    "positions looked up once": Module(table, positions=nn.Embedding(9, WIDTH), w=(WIDTH, 3)),
    "class and register tokens": Module(classes, cls=(1, 1, WIDTH), register=(1, 1, WIDTH), positions=(1, 10, WIDTH)),
    "learned queries and attention bias": Module(learned_queries, q=(1, 1, 3, WIDTH), bias=(3, 7)),
    "einsum": Module(lambda m, x: torch.einsum("btd,dhk->bhtk", x, m.w), w=(WIDTH, 2, 3)),
    "layer norm": Module(lambda m, x: m.norm(x), norm=nn.LayerNorm(WIDTH)),
    "layer norm over two dimensions": Module(lambda m, x: m.norm(x), norm=nn.LayerNorm((7, WIDTH))),
    "layer norm without bias": Module(lambda m, x: m.norm(x), norm=nn.LayerNorm(WIDTH, bias=False)),
    "rms norm": Module(lambda m, x: m.norm(x), norm=nn.RMSNorm(WIDTH)),
    "group norm": Module(lambda m, x: m.norm(x.mT), norm=nn.GroupNorm(2, WIDTH)),
    "convolution": Module(lambda m, x: m.conv(x[:, None]), conv=nn.Conv2d(1, 3, 3, stride=2, padding=1)),
    "convolution in one dimension": Module(lambda m, x: m.conv(x.mT), conv=nn.Conv1d(WIDTH, 3, 3, dilation=2)),
    "convolution in groups": Module(
        lambda m, x: m.conv(x.mT[..., None]), conv=nn.Conv2d(WIDTH, 12, 3, padding=1, groups=3)
    ),
    "depthwise convolution": Module(lambda m, x: m.conv(x.mT), conv=nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)),
    "repeated for each sample and head": Module(
        lambda m, x: (x.repeat_interleave(2, 0) @ m.p.tanh().repeat(len(x), 1, 1).mT).view(len(x), -1), p=(2, 5, WIDTH)
    ),
    "one table for words and positions": Module(
        lambda m, x: m.t(x[..., 0].abs().long().clamp(max=8)) * m.t(torch.arange(x.shape[1])), t=nn.Embedding(9, WIDTH)
    ),
    "patches": Module(lambda m, x: m.conv(x[:, None]), conv=nn.Conv2d(1, 3, 2, 2, bias=False)),
    "weight norm": Module(lambda m, x: m.linear(x), linear=nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 4))),
    "a block used twice": Module(lambda m, x: m.linear(torch.tanh(m.linear(x))), linear=nn.Linear(WIDTH, WIDTH)),
    "out of order": Module(lambda m, x: m.a(torch.tanh(m.b(x))), a=nn.Linear(WIDTH, 4), b=nn.Linear(WIDTH, WIDTH)),
    "detached": Module(lambda m, x: x * m.w.detach() + m.w, w=(WIDTH,)),
    "of norm one": Module(lambda m, x: F.linear(x, F.normalize(m.w)), w=(4, WIDTH)),
}
CASES["weight of two factors"].frozen.requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 2, 7, 9])
def test_function(case, rows, caplog):
    torch.manual_seed(0)
    assert_exact(CASES[case], squares, torch.randn(rows, 7, WIDTH), shares=(0.5,) if rows == 7 else ())
    assert "once for each sample" not in caplog.text


class LowRank(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.base = nn.Linear(WIDTH, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_parameters_under_dropout_are_followed_in_train_mode():
    module = Module(lambda m, x: m.drop(m.drop(m.p).tanh()) + x, p=(1, 7, WIDTH), drop=nn.Dropout(0.5)).train()
    x = torch.randn(4, 7, WIDTH)
    sums, norms = clipped_gradients(module, squares, x, max_grad_norm=math.inf)
    assert norms.isfinite().all()
    assert 0 < int((sums["p"] == 0).sum()) < sums["p"].numel()


def test_low_rank_adaptation_by_hand():
    assert_exact(nn.Sequential(LowRank(), nn.Tanh()), squares, torch.randn(5, 7, WIDTH))


def test_low_rank_adaptation_by_peft():
    peft = pytest.importorskip("peft")
    module = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh())
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    assert_exact(peft.get_peft_model(module, config), squares, torch.randn(5, 7, WIDTH))


@pytest.mark.parametrize("shape", [(5, WIDTH), (5, 1, WIDTH), (5, 2, 3, WIDTH)])
def test_rows_of_any_rank(shape):
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    assert_exact(module, squares, torch.randn(shape))


def test_frozen_parts_get_no_gradient():
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    module[1].requires_grad_(False)
    assert_exact(module, squares, torch.randn(5, 3, WIDTH))


class Words(nn.Module):
    """A table with padding that is looked up, multiplied with, and looked up again."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, WIDTH, padding_idx=0)

    def forward(self, ids):
        x = torch.tanh(self.words(ids))
        return F.linear(x, self.words.weight) + F.embedding(ids, self.words.weight).sum(-1, keepdim=True)


def test_table_tied_by_use_with_padding():
    torch.manual_seed(0)
    module = Words()
    with torch.no_grad():
        module.words.weight[0] = 1.0
    assert_exact(module, squares, torch.randint(0, 9, (5, 6)))


def test_embeddings_that_couple_samples_are_refused():
    module = nn.Sequential(nn.Embedding(9, WIDTH, scale_grad_by_freq=True))
    with pytest.raises(NotPrivateError, match="scale_grad_by_freq"):
        assert_exact(module, squares, torch.randint(0, 9, (5, 6)), shares=(math.inf,))
