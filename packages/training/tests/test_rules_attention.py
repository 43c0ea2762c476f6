"""``nn.MultiheadAttention`` and the encoder layers built on it, untouched, against one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_models import assert_exact

from dpfa_training import clipped_gradients

WIDTH, LENGTH = 8, 5


def squares(module, batch):
    out = module(*batch).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).square().sum(1)


class Attend(nn.Module):
    """Attention between x and y, samples first whatever `batch_first` says inside."""

    def __init__(self, *, cross=False, need_weights=False, causal=False, **options):
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.cross, self.need_weights, self.causal = cross, need_weights, causal

    def forward(self, x, y, padding):
        turn = (lambda z: z) if self.attention.batch_first else (lambda z: z.transpose(0, 1))
        keys = (turn(y), turn(y.cos())) if self.cross else (turn(x),) * 2
        if self.attention.kdim != WIDTH:
            keys = (turn(y)[..., :4], turn(y)[..., :6])
        query, mask = turn(x), None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
        out, _ = self.attention(
            query,
            *(keys if self.cross or self.attention.kdim != WIDTH else (query, query)),
            key_padding_mask=padding,
            need_weights=self.need_weights,
            attn_mask=mask,
            is_causal=self.causal,
        )
        return turn(out)


OPTIONS = {
    "self": {},
    "with weights": {"need_weights": True},
    "cross": {"cross": True},
    "causal": {"causal": True},
    "other widths": {"kdim": 4, "vdim": 6},
    "without bias": {"bias": False},
    "bias for keys": {"add_bias_kv": True},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rows", [3, LENGTH])
def test_multihead_attention(option, batch_first, rows, caplog):
    torch.manual_seed(0)
    module = Attend(batch_first=batch_first, **OPTIONS[option])
    padding = torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (rows, 1))
    x, y = torch.randn(2, rows, LENGTH, WIDTH)
    assert_exact(module, squares, (x, y, padding))
    assert "once for each sample" not in caplog.text


class Encoder(nn.Module):
    def __init__(self, batch_first, norm_first):
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, x):
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("rows", [1, LENGTH])
def test_transformer_encoder(batch_first, norm_first, rows, caplog):
    torch.manual_seed(0)
    assert_exact(Encoder(batch_first, norm_first), squares, (torch.randn(rows, LENGTH, WIDTH),))
    assert "once for each sample" not in caplog.text


def test_a_decoder_with_cross_attention(caplog):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)

        def forward(self, x, y):
            return self.layer(x, y)

    torch.manual_seed(0)
    assert_exact(Decoder(), squares, (torch.randn(4, LENGTH, WIDTH), torch.randn(4, 3, WIDTH)))
    assert "once for each sample" not in caplog.text


def test_attention_runs_on_torchs_kernel_with_plain_tensors(monkeypatch):
    seen = []
    kernel = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.extend(type(item) for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    batch = (torch.randn(3, LENGTH, WIDTH), torch.randn(3, LENGTH, WIDTH), torch.zeros(3, LENGTH).bool())
    clipped_gradients(Attend(batch_first=True), squares, batch, max_grad_norm=1)
    assert set(seen) == {torch.Tensor}
