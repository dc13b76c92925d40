"""The report: one HTML file with everything in it, for a browser without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CHART_WIDTH, CHART_HEIGHT = 320, 150
# Room for the axis labels, in the chart's own pixels.
MARGIN_LEFT, MARGIN_BOTTOM, MARGIN_TOP = 38, 20, 8
# More points than pixels add bytes and no information.
MAX_POINTS = 300


def encode_png(picture: Tensor) -> bytes:
    """PNG bytes of one picture [1 or 3, H, W] in [-1, 1]. Needs Pillow."""
    from PIL import Image

    pixels = ((picture.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the value of an ``src`` attribute."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last ``window`` values, as many as given: nothing ahead of a point enters it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def line_chart(values: Sequence[float]) -> str:
    """An inline SVG of one value a step: raw in the background, its running mean in front, three labels an axis.

    Colours are the page's (CSS classes ``axis``, ``raw``, ``mean``), so the chart follows its dark and light themes.
    """
    if not values:
        return ""
    mean = smooth(values, max(1, len(values) // 25))
    stride = max(1, -(-len(values) // MAX_POINTS))
    # The axis follows the mean and the middle of the raw values: a single spike must not flatten the curve.
    ordered = sorted(values)
    low = min(*mean, ordered[len(ordered) // 100], mean[-1])
    high = max(*mean, ordered[-1 - len(ordered) // 100], mean[-1])
    span = (high - low) or 1.0
    inner_width, inner_height = CHART_WIDTH - MARGIN_LEFT - 6, CHART_HEIGHT - MARGIN_BOTTOM - MARGIN_TOP

    def path(series: Sequence[float]) -> str:
        kept = list(range(0, len(series), stride))
        if kept[-1] != len(series) - 1:
            kept.append(len(series) - 1)
        points = []
        for index in kept:
            x = MARGIN_LEFT + inner_width * index / max(1, len(series) - 1)
            share = min(1.0, max(0.0, (series[index] - low) / span))
            points.append(f"{x:.1f},{MARGIN_TOP + inner_height * (1 - share):.1f}")
        return " ".join(points)

    marks = []
    for share in (0.0, 0.5, 1.0):
        y = MARGIN_TOP + inner_height * (1 - share)
        marks.append(f'<line class="axis" x1="{MARGIN_LEFT}" x2="{CHART_WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{MARGIN_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{low + share * span:.2f}</text>')
    bottom = CHART_HEIGHT - 4
    marks.append(f'<text x="{MARGIN_LEFT}" y="{bottom}">step 1</text>')
    marks.append(f'<text x="{CHART_WIDTH - 6}" y="{bottom}" text-anchor="end">{len(values)}</text>')
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img">{"".join(marks)}'
        f'<polyline class="raw" points="{path(values)}"/><polyline class="mean" points="{path(mean)}"/></svg>'
    )


def render_report(context: Mapping[str, Any]) -> str:
    """The page. ``context`` is what templates/report.html names at its top. Needs jinja2; a missing name raises."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ms": _ms, "spread": _spread, "error": _error, "percent": _percent}
    source = resources.files("fastgan.profile").joinpath("templates/report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(**context)


def write_report(file: BinaryIO, context: Mapping[str, Any]) -> None:
    """Render and write the page."""
    file.write(render_report(context).encode("utf-8"))


def write_pictures(folder: Path, pictures: Mapping[str, Tensor]) -> list[Path]:
    """Write ``name -> [C, H, W] in [-1, 1]`` as PNG files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        path.write_bytes(encode_png(picture))
        paths.append(path)
    return paths


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.0995 else f"{seconds * 1e3:.1f}"


def _spread(timing: Any) -> str:
    return f"{_ms(timing.p20)} – {_ms(timing.p80)}"


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"
