"""Codebooks in training: moving averages, dead rows and straight-through gradients."""

import torch
from helpers import seeded
from torch import Tensor

from mimo_fast.kernels.rvq import rvq_encode
from training.rvq import Quantizer


def test_codebooks_follow_what_chose_them(codec_training):
    config, rng = codec_training.config, seeded(0)
    trained = codec_training.tensors.items()
    books = {name: tensor.clone() for name, tensor in trained if name.endswith("_codebook.embed")}
    quantizer = Quantizer(config, books)
    centres = torch.randn(40, config.dim, generator=rng) * 3

    def batch() -> Tensor:
        chosen = torch.randint(len(centres), (600,), generator=rng)
        return centres[chosen] + torch.randn(600, config.dim, generator=rng) * 0.01

    for _ in range(300):
        x = batch()
        quantizer.update(x, rvq_encode(x, quantizer.books), rng)
    quantized = quantizer(x := batch())
    nearest = torch.cdist(x, quantizer.books[0]).amin(1)
    assert nearest.max() < 0.05 * x.norm(dim=1).mean(), "a centre has no row of the first codebook"
    assert (quantized.rows - x).norm() < 0.01 * x.norm()


def test_an_unused_row_is_replaced_and_a_used_one_moves(codec_training):
    config = codec_training.config
    count = len(config.codebook_sizes)
    names = [f"encoder.quantizer.vq.layers.{i}._codebook.embed" for i in range(count)]
    shapes = zip(names, config.codebook_sizes, strict=True)
    tensors = {name: torch.zeros(size, config.dim) for name, size in shapes}
    quantizer = Quantizer(config, tensors)
    first = names[0].removesuffix(".embed")
    for name in names:
        tensors[name.replace(".embed", ".inited")].fill_(1)
        tensors[name.replace(".embed", ".cluster_size")].fill_(1)
    tensors[f"{first}.cluster_size"][7] = 0
    x = torch.ones(50, config.dim)
    replaced = quantizer.update(x, torch.zeros(len(names), 50, dtype=torch.int64), seeded(0))
    assert replaced == 1
    assert torch.equal(tensors[names[0]][7], x[0])
    # 1% of the way from one position at zero to fifty at one.
    expected = 0.01 * 50 / (0.99 + 0.01 * 50)
    assert torch.allclose(tensors[names[0]][0], torch.full((config.dim,), expected), atol=1e-4)


def test_straight_through_passes_the_gradient_on(codec_training):
    x = torch.randn(5, codec_training.config.dim, requires_grad=True)
    quantized = codec_training.quantizer(x, torch.tensor([1, 2, 3, 8, 8]))
    (gradient,) = torch.autograd.grad(quantized.rows.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    books = codec_training.quantizer.books
    assert torch.allclose(quantized.rows[0], books[0][quantized.codes[0, 0]], atol=1e-5)
