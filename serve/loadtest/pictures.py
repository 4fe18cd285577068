"""Pictures of results, as PNG bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from serve.loadtest.results import LoadTestResult, RunResult, SavedResult
from serve.loadtest.stats import split_cold, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei"]
_DPI = 110
_WIDTH = {1: 6.2, 2: 6.2, 3: 4.6}  # inches of a panel
_MOST_BARS = 40
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2f6fb3", "#e0812b", "#3a9a5b", "#c43c3c", "#8a8a8a"
_AXES = {
    "adapters": "adapters asked",
    "rate": "requests per second offered",
    "concurrency": "requests in flight",
}


def pictures_of(result: LoadTestResult) -> dict[str, bytes]:
    """File name -> PNG of everything that this result can show."""
    made: dict[str, bytes] = {}
    if result.sweep and len(result.runs) > 1:
        name = {"adapters": "throughput_against_adapters", "rate": "latency_against_rate"}.get(
            result.sweep, f"latency_against_{result.sweep}"
        )
        made[f"{name}.png"] = _draw(1, 2, lambda axes: _sweep(result, axes))
    if result.runs:
        run = result.runs[-1]
        made["ttft.png"] = _draw(1, 1, lambda axes: _ttft(result, axes[0]))
        made["popularity.png"] = _draw(1, 1, lambda axes: _popularity(run, axes[0]))
        made["timeline.png"] = _draw(1, 1, lambda axes: _timeline(run, axes[0]))
    if result.victim is not None:
        made["victim.png"] = _draw(1, 1, lambda axes: _victim(result, axes[0]))
    return made


def comparison_picture(first: SavedResult, second: SavedResult) -> bytes:
    """Throughput, TTFT and wrong answers of two results, run by run."""
    checked = all(run.check is not None for result in (first, second) for run in result.runs)
    return _draw(1, 3 if checked else 2, lambda axes: _compare((first, second), axes))


def _draw(rows: int, columns: int, fill: Callable[[list[Axes]], None]) -> bytes:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    known = set(font_manager.fontManager.get_font_names())
    fonts = [name for name in _FONTS if name in known] or ["sans-serif"]
    settings: Any = {"font.family": fonts, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    settings["text.parse_math"] = False  # a name may hold a dollar
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # a name in a script that no font here has is drawn as boxes, which is no news to anybody
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure: Figure = Figure(figsize=(_WIDTH[columns] * columns, 4.2 * rows), layout="constrained")
        fill(list(figure.subplots(rows, columns, squeeze=False).flat))
        body = io.BytesIO()
        figure.savefig(body, format="png", dpi=_DPI, metadata={"Software": None})
    return body.getvalue()


def _sweep(result: LoadTestResult, axes: list[Axes]) -> None:
    what = str(result.sweep)
    runs = sorted(result.runs, key=lambda run: run.level or 0.0)
    levels = [run.level or 0.0 for run in runs]
    throughput, latency = axes if what != "rate" else reversed(axes)
    throughput.plot(levels, [run.figures.whole.output_tokens_per_s for run in runs], "o-", color=_BLUE)
    throughput.set(title="throughput", ylabel="output tokens per second")
    throughput.set_ylim(bottom=0)
    for metric, color in (("ttft", _BLUE), ("e2el", _ORANGE)):
        for share, style in (("p50", "o-"), ("p99", "s--")):
            values = [getattr(getattr(run.figures.whole, metric), f"{share}_ms", math.nan) for run in runs]
            latency.plot(levels, values, style, color=color, label=f"{metric.upper()} {share}")
    latency.set(title="latency", ylabel="milliseconds")
    if any(run.figures.whole.e2el for run in runs):
        latency.set_yscale("log")
        _plain_numbers(latency.yaxis)
    latency.legend()
    for panel in axes:
        panel.set(xlabel=_AXES.get(what, what), xscale="log")
        panel.set_xticks(levels, [f"{level:.3g}" for level in levels])
        panel.xaxis.minorticks_off()
        point = result.saturation
        if point is not None and point.breaks is not None:
            panel.axvspan(point.holds or point.breaks, point.breaks, color=_RED, alpha=0.12)
            panel.text(
                point.breaks,
                0.02,
                "saturated ",
                color=_RED,
                ha="right",
                transform=panel.get_xaxis_transform(),
            )


def _ttft(result: LoadTestResult, axes: Axes) -> None:
    base, slots = result.server["base_model"], result.server["adapter_slots"]
    records = [record for run in result.runs for record in (*run.warmup, *run.run.records)]
    cold, warm = split_cold(records, base, slots)
    of_base = [record for record in records if record.model == base]
    for name, some, color in (("cold", cold, _ORANGE), ("warm", warm, _BLUE), ("base model", of_base, _GREY)):
        values = sorted(1e3 * value for value in values_of(some, "ttft"))
        if values:
            shares = [(place + 1) / len(values) for place in range(len(values))]
            axes.step(values, shares, where="post", color=color, label=f"{name} ({len(values)})")
    axes.set(title="time to first token: adapter to be fetched (cold) or there (warm)")
    axes.set(xlabel="milliseconds", ylabel="share of requests", ylim=(0, 1.02))
    if axes.lines:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.tick_params(axis="x", which="both", rotation=30)
        axes.legend()


def _popularity(run: RunResult, axes: Axes) -> None:
    asked = sorted(run.shares.items(), key=lambda item: -item[1])[:_MOST_BARS]
    total = max(1, run.figures.whole.requests)
    measured = {item.name: 100 * item.requests / total for item in run.figures.models}
    places = range(len(asked))
    axes.bar(places, [measured.get(name, 0.0) for name, _ in asked], color=_BLUE, label="sent")
    axes.plot(
        places, [100 * share for _, share in asked], "o", color=_ORANGE, markersize=4, label="asked for"
    )
    axes.set_xticks(places, [name for name, _ in asked], rotation=90 if len(asked) > 6 else 0, fontsize=8)
    axes.set(title="popularity", ylabel="percent of the requests")
    axes.legend()


def _timeline(run: RunResult, axes: Axes) -> None:
    good = [record for record in run.run.records if record.error is None]
    bad = [record for record in run.run.records if record.error is not None]
    sent = [record.sent_s for record in good]
    axes.plot(sent, [1e3 * record.e2el_s for record in good], ".", color=_ORANGE, label="E2EL")
    axes.plot(sent, [1e3 * (record.ttft_s or 0.0) for record in good], ".", color=_BLUE, label="TTFT")
    for record in bad:
        axes.axvline(record.sent_s, color=_RED, alpha=0.4, linewidth=1)
    title = f"requests over time ({run.label})" + (f", {len(bad)} failed (red)" if bad else "")
    axes.set(title=title, xlabel="sent, seconds after the start", ylabel="milliseconds")
    if good:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.legend()


def _victim(result: LoadTestResult, axes: Axes) -> None:
    report = result.victim
    assert report is not None
    for disturbed, color, name in ((False, _BLUE, "quiet"), (True, _ORANGE, "disturbed")):
        chosen = [place for place, window in enumerate(report.windows) if window.disturbed == disturbed]
        axes.bar(chosen, [report.window_p99_ms[place] for place in chosen], color=color, label=name)
    axes.set(
        title=f"{report.victim}: p99 between tokens, window by window", xlabel="window", ylabel="milliseconds"
    )
    axes.legend()


def _compare(results: tuple[SavedResult, SavedResult], axes: list[Axes]) -> None:
    levels = {run.label: run.level or 0.0 for result in results for run in result.runs}
    place_of = {label: place for place, label in enumerate(sorted(levels, key=lambda label: levels[label]))}
    for result, color, shift in zip(results, (_BLUE, _ORANGE), (-0.2, 0.2), strict=True):
        runs = sorted(result.runs, key=lambda run: levels[run.label])
        places = [place_of[run.label] for run in runs]
        shifted = [place + shift for place in places]
        rates = [run.figures["whole"]["output_tokens_per_s"] for run in runs]
        axes[0].bar(shifted, rates, 0.4, color=color, label=result.name)
        for share, style in (("p50", "o-"), ("p99", "s--")):
            values = [(run.figures["whole"]["ttft"] or {}).get(f"{share}_ms", math.nan) for run in runs]
            axes[1].plot(places, values, style, color=color, label=f"{result.name} {share}")
        if len(axes) > 2:
            wrong, changed = (list(_answer_shares(runs, kind)) for kind in ("wrong", "changed"))
            axes[2].bar(shifted, wrong, 0.4, color=color, label=f"{result.name}: another identity")
            name = f"{result.name}: changed"
            axes[2].bar(shifted, changed, 0.4, bottom=wrong, color=color, alpha=0.35, label=name)
    axes[0].set(title="throughput", ylabel="output tokens per second")
    axes[1].set(title="time to first token", ylabel="milliseconds", yscale="log")
    _plain_numbers(axes[1].yaxis)
    if len(axes) > 2:
        axes[2].set(title="answers that are not the model's own", ylabel="percent of the answers")
        axes[2].set_ylim(0, max(10.0, 1.3 * axes[2].get_ylim()[1]))
    for panel in axes:
        panel.set_xticks(list(place_of.values()), [_short_label(label, levels) for label in place_of])
        panel.set_xlabel(_AXES.get(results[0].sweep or "", ""))
        panel.legend(fontsize=8)


def _short_label(label: str, levels: dict[str, float]) -> str:
    return f"{levels[label]:g}" if levels[label] else label


def _plain_numbers(axis: Axis) -> None:
    """200 in place of 2 x 10^2, on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def _answer_shares(runs: Sequence[Any], kind: str) -> Iterator[float]:
    for run in runs:
        yield 100 * len(run.check[kind]) / max(1, run.check["compared"])
