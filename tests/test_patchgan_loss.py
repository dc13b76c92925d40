"""nn.PatchGANLoss: what it takes from a critic, and its defaults."""

from __future__ import annotations

import pytest
import torch

from fastgan import ops
from fastgan.nn import PatchGANLoss


def make_scales(seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, c, s, s, generator=generator) for c, s in ((8, 9), (4, 7), (1, 6))] for _ in range(2)]


@pytest.mark.parametrize("mode", ["vanilla", "lsgan", "wgan", "hinge"])
@pytest.mark.parametrize("side", ["critic", "generator"])
def test_takes_the_last_map_of_every_scale(mode, side):
    real, fake = make_scales(0), make_scales(1)
    loss = PatchGANLoss(mode)
    over_maps = "mean" if mode == "hinge" else "sum"
    expected = ops.patch_loss([x[-1] for x in real], [x[-1] for x in fake], mode=mode, side=side, over_maps=over_maps)
    assert torch.equal(loss(real, fake, side=side).loss, expected.loss)
    assert torch.equal(loss([x[-1] for x in real], [x[-1] for x in fake], side=side).loss, expected.loss)


def test_a_single_map_and_one_side():
    x = torch.randn(2, 1, 4, 4)
    loss = PatchGANLoss("hinge", over_maps="sum")
    torch.testing.assert_close(loss(x, None).loss, torch.relu(1 - x).mean(), rtol=1e-6, atol=0)
    assert loss(None, x, side="generator").real_accuracy is None


def test_options_reach_the_op():
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    weight = torch.tensor([1.0, 0.0])
    loss = PatchGANLoss("lsgan", real_target=0.9, fake_target=0.1, map_weight=[2.0], backend="reference")
    expected = (real[0] - 0.9).square().sum() / 32 + (fake[0] - 0.1).square().sum() / 32
    torch.testing.assert_close(loss(real, fake, sample_weight=weight).loss, 2 * expected)
    pairs = PatchGANLoss(paired=True)(real, fake).loss
    torch.testing.assert_close(pairs, torch.nn.functional.softplus(fake - real).mean())
    assert not PatchGANLoss().state_dict()
    assert "mode='lsgan'" in repr(loss)


def test_messages():
    with pytest.raises(ValueError, match=r"PatchGANLoss: mode must be one of vanilla, lsgan, wgan, hinge, got 'bce'"):
        PatchGANLoss("bce")
    with pytest.raises(ValueError, match=r"PatchGANLoss: over_maps must be mean, sum or None, got 'max'"):
        PatchGANLoss(over_maps="max")
