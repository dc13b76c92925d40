"""PatchGAN: a critic that judges overlapping patches, on fused layers."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.models._layers import ConvAct, activation, conv_norm_act, initialise, initialise_norm, make_norm
from fastgan.nn import SpectralNormConv2d


class PatchGAN(nn.Module):
    """A critic of patches: ``layers`` 4×4 convolutions of stride 2 and two of stride 1; one logit per patch.

    Convolution i (0 … layers + 1) has width·min(2^i, 8) channels, the last one 1; leaky ReLU 0.2 after all but the
    last, normalisation after all but the first and the last. With 3 layers a logit sees 70×70 pixels. Output and state
    dict are those of the ``NLayerDiscriminator`` that the public Pix2Pix and CycleGAN code trains: keys ``model.0``,
    ``.2``, ``.3``, … also without normalisation, where the numbers of the norms are left out.

    Convolution, bias and activation are one call where no normalisation stands between them, normalisation and
    activation are one call elsewhere.

    Args:
        in_channels: channels of the image, or of condition and image together.
        width: channels after the first convolution.
        layers: convolutions of stride 2, from 1 on.
        norm: "instance" or "none" (all convolutions have a bias), "batch" (only the first and the last have).
        spectral: whether every convolution is divided by its spectral norm (then its keys are those of torch's
            parametrisation, ``model.0.parametrizations.weight.original``).

    Raises:
        ValueError: fewer than one layer or channel, an unknown norm; in ``forward``, an image of the wrong shape.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 6.1.2;
    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018.
    """

    def __init__(
        self, in_channels: int, width: int = 64, layers: int = 3, norm: str = "instance", spectral: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("width", width), ("layers", layers)):
            if value < 1:
                raise ValueError(f"PatchGAN: {name} must be at least 1, got {value}")
        if norm not in ("instance", "batch", "none"):
            raise ValueError(f"PatchGAN: norm must be one of instance, batch, none, got {norm!r}")
        self.in_channels, self.layers = in_channels, layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        act = "lrelu" if norm == "none" else "linear"
        self.model = nn.ModuleDict({"0": _conv(spectral, in_channels, width, 2, act="lrelu")})
        self._stages: list[tuple[str, str | None]] = [("0", None)]
        for i in range(1, layers + 1):
            conv, following = str(3 * i - 1), str(3 * i)
            stride = 2 if i < layers else 1
            self.model[conv] = _conv(spectral, widths[i - 1], widths[i], stride, bias=norm != "batch", act=act)
            if norm != "none":
                self.model[following] = make_norm(norm, widths[i])
            self._stages.append((conv, None if norm == "none" else following))
        last = str(3 * layers + 2)
        self.model[last] = _conv(spectral, widths[-1], 1, 1, act="linear")
        self._stages.append((last, None))
        for module in self.model.values():
            initialise_norm(module)

    def forward(self, x: Tensor, *, features: bool = False) -> Tensor | list[Tensor]:
        """Judge images.

        Args:
            x: [N, in_channels, H, W], floating point; H and W at least 3·2^layers.
            features: whether the maps on the way are wanted too, for feature matching.

        Returns:
            Logits [N, 1, h, w] with h = H // 2^layers − 2 and w likewise; or, with ``features``, a list of each
            activated map in order and the logits last.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"PatchGAN: x must be [N, {self.in_channels}, H, W], got {list(x.shape)}")
        least = 3 * 2**self.layers
        if min(x.shape[2:]) < least:
            raise ValueError(f"PatchGAN: x must have H and W of at least {least}, got {list(x.shape)}")
        maps: list[Tensor] = []
        for conv, norm in self._stages:
            layer, following = self.model[conv], None if norm is None else self.model[norm]
            x = layer(x) if following is None else conv_norm_act(layer, following, x, "lrelu")
            if features:
                maps.append(x)
        return maps if features else x


def _conv(
    spectral: bool, in_channels: int, out_channels: int, stride: int, *, bias: bool = True, act: str
) -> nn.Module:
    if not spectral:
        conv = ConvAct(in_channels, out_channels, 4, stride, 1, bias=bias, act=act)
        initialise(conv.weight, conv.bias)
        return conv
    conv = SpectralNormConv2d(in_channels, out_channels, 4, stride, 1, bias=bias, **activation(act))
    initialise(conv.weight_original, conv.bias)
    conv.reset_vectors()
    return conv
