"""The page's charts as Plotly figures. Colours follow the page's theme in the browser."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_COLOURS = {"warmup": "#8b5cf6", "astro": "#2f7de1", "direct": "#e08a1e"}
_OTHER = "#6b7a90"
_PARTS = {
    "generate": "#2f7de1", "prepare": "#9aa7b8", "logprobs": "#14a098", "train": "#e08a1e", "push": "#8b5cf6",
    "validate": "#c94f7c",
}  # fmt: skip
"""The parts of an RL step in the order in which they follow each other, as `NAME_seconds` in metrics.jsonl."""
_SMOOTH = 20

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A figure and what surrounds it.

    Attributes:
        id: unique on the page.
        title: says what is shown.
        note: one sentence on how to read it.
        figure: Plotly's JSON form.
    """

    id: str
    title: str
    note: str
    figure: dict[str, Any]


def result_chart(results: Sequence[Mapping[str, Any]], benchmark: str) -> Chart:
    """Accuracy of each model with its interval, beside first attempts, pass@k and chance."""
    import plotly.graph_objects as go

    rows = [row for row in results if row["benchmark"] == benchmark][::-1]
    names = [row["model"] for row in rows]
    value = [100 * row["pass_at_1"] for row in rows]
    figure = go.Figure()
    figure.add_scatter(
        x=[100 * row["pass_at_k"] for row in rows], y=names, name="pass@k (an oracle picks)", mode="markers",
        marker={"symbol": "diamond-open", "size": 9, "color": _OTHER},
        customdata=[row["k"] for row in rows], hovertemplate="%{y}: pass@%{customdata} %{x:.1f} %<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[100 * row["first_attempt"] for row in rows], y=names, name="first attempt", mode="markers",
        marker={"symbol": "circle-open", "size": 10, "color": _COLOURS["direct"], "line": {"width": 2}},
        hovertemplate="%{y}: first attempt %{x:.1f} %<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=value, y=names, name="pass@1, 95 % interval", mode="markers",
        marker={"size": 11, "color": _COLOURS["astro"]},
        error_x={
            "type": "data", "symmetric": False, "thickness": 2, "width": 5,
            "array": [100 * row["pass_at_1_interval"][1] - v for row, v in zip(rows, value, strict=True)],
            "arrayminus": [v - 100 * row["pass_at_1_interval"][0] for row, v in zip(rows, value, strict=True)],
        },
        hovertemplate="%{y}: pass@1 %{x:.1f} %<extra></extra>",
    )  # fmt: skip
    chance = next((row["chance"] for row in rows if row["chance"] is not None), None)
    if chance is not None:
        figure.add_vline(x=100 * chance, line={"dash": "dot", "width": 1.5, "color": _OTHER})
        figure.add_annotation(
            x=100 * chance, y=0, yref="paper", text="chance", showarrow=False, xanchor="left", yanchor="bottom"
        )
    figure.update_xaxes(title="right, % of problems", range=[-2, 102])
    figure.update_layout(height=150 + 44 * len(rows), margin={"l": 84})
    return Chart(f"result-{benchmark}", f"Accuracy on {benchmark}", "", _themed(figure))


def training_charts(series: Mapping[str, Rows]) -> list[Chart]:
    """Curves of the training stages that have any.

    Args:
        series: metrics.jsonl by stage label (`warmup`, `sft/ARM`, `rl/ARM`).
    """
    supervised = {label: rows for label, rows in series.items() if label == "warmup" or label.startswith("sft/")}
    rl = {label: rows for label, rows in series.items() if label.startswith("rl/")}
    charts = [
        _lines(f"loss-{label.replace('/', '-')}", f"{_stage_title(label)}: loss", "nats a token", "optimizer step",
               {"loss": (label, rows, "loss", "solid")} | _held_out(label, rows), smooth=True)
        for label, rows in supervised.items()
    ]  # fmt: skip
    charts += [
        _rl_chart(rl, "mean-reward", "RL: mean reward of the rollouts", "reward", {"": ("reward", "solid")}, ""),
        _rl_chart(rl, "reward", "RL: pass rate of the rollouts", "share",
                  {"right": ("pass_rate", "solid"), "prompts with signal": ("groups_with_signal", "dot")},
                  "A prompt gives signal when its group has both right and wrong responses."),
        _rl_chart(rl, "validation", "RL: held-out problems", "share right",
                  {"": ("validation_pass_rate", "solid")}, "Answered now and then; the best model so far is kept."),
        _rl_chart(rl, "length", "RL: response length", "tokens a response",
                  {"right": ("response_tokens_right", "solid"), "wrong": ("response_tokens_wrong", "dot")},
                  "Right and wrong apart: a mean over both hides wrong answers that only grow longer."),
        _rl_chart(rl, "backtracks", "RL: backtracks", "backtracks a response", {"": ("backtracks", "solid")}, ""),
        _rl_chart(rl, "mismatch", "RL: engine against trainer", "mean |Δ log p|, nats",
                  {"": ("mismatch_mean_abs", "solid")},
                  "Log-probabilities of the same tokens under the same weights, by vLLM and by Megatron; "
                  "importance sampling corrects for it."),
        _rl_chart(rl, "entropy", "RL: entropy", "nats a token", {"": ("entropy", "solid")},
                  "Mean surprise of the sampled tokens; a policy that collapses falls to 0."),
        _rl_chart(rl, "kl", "RL: divergences", "KL, nats a token",
                  {"engine from trainer": ("mismatch_kl", "solid"), "policy from reference": ("reference_kl", "dot")},
                  ""),
        _rl_chart(rl, "idle", "RL: idle shares", "share of the step",
                  {"engine": ("engine_idle_share", "solid"), "trainer": ("trainer_idle_share", "dot")},
                  "In turns (sync) the two add up to about 1; side by side (async) both can be low."),
        *(_step_times(label, rows) for label, rows in rl.items()),
    ]  # fmt: skip
    return [chart for chart in charts if chart.figure["data"]]


def plotly_script() -> str:
    """Plotly's own bundle, for a page that needs no network."""
    import plotly.offline

    return plotly.offline.get_plotlyjs()


def _held_out(label: str, rows: Rows) -> dict[str, tuple[str, Rows, str, str]]:
    """The line of the loss on held-out problems, where there is one."""
    line = (label, rows, "validation_loss", "dot")
    return {"held-out problems": line} if any("validation_loss" in row for row in rows) else {}


def _step_times(label: str, rows: Rows) -> Chart:
    """Where an RL step's seconds go, one on the other."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, colour in _PARTS.items():
        seconds = [row.get(f"{part}_seconds") for row in rows]
        values = [value if isinstance(value, int | float) and math.isfinite(value) else 0.0 for value in seconds]
        if any(values):
            figure.add_scatter(
                x=[row["step"] for row in rows], y=values, name=part, mode="lines", stackgroup="seconds",
                line={"color": colour, "width": 1}, hovertemplate="step %{x}: %{y:.1f} s<extra>" + part + "</extra>",
            )  # fmt: skip
    figure.update_xaxes(title="RL step")
    figure.update_yaxes(title="seconds a step", rangemode="tozero")
    figure.update_layout(height=300)
    arm = label.removeprefix("rl/")
    return Chart(f"rl-times-{arm}", f"RL ({arm}): where a step's time goes", "", _themed(figure))


def _rl_chart(
    rl: Mapping[str, Rows], name: str, title: str, unit: str, lines: Mapping[str, tuple[str, str]], note: str
) -> Chart:
    named = {}
    for label, rows in rl.items():
        arm = label.removeprefix("rl/")
        for line, (key, dash) in lines.items():
            parts = [arm] * (len(rl) > 1 or not line) + [line] * bool(line)
            named[", ".join(parts)] = (label, rows, key, dash)
    return _lines(f"rl-{name}", title, unit, "RL step", named, note)


def _lines(
    chart_id: str,
    title: str,
    unit: str,
    x_title: str,
    lines: Mapping[str, tuple[str, Rows, str, str]],
    note: str = "",
    smooth: bool = False,
) -> Chart:
    """A line a name: (stage label, rows, key of the metric, dash)."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (label, rows, key, dash) in lines.items():
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if key.startswith("response_tokens_"):
            points = [(step, tokens) for step, tokens in points if tokens > 0]  # 0: the step had no such response
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        colour = _COLOURS.get(label.split("/")[-1], _OTHER)
        smoothed = smooth and len(values) >= 2 * _SMOOTH
        figure.add_scatter(
            x=steps, y=values, name="each step" if smoothed else name,
            mode="lines" if len(values) > 40 else "lines+markers",
            opacity=0.3 if smoothed else 1, line={"color": colour, "dash": dash, "width": 1 if smoothed else 2},
            hovertemplate="step %{x}: %{y:.4g}<extra>" + name + "</extra>",
        )  # fmt: skip
        if smoothed:
            figure.add_scatter(
                x=steps, y=_running_mean(values), name=f"mean of {_SMOOTH}", mode="lines",
                line={"color": colour, "width": 2.5}, hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
            )  # fmt: skip
    last = max((max(trace.x) for trace in figure.data), default=0)
    figure.update_xaxes(title=x_title, range=[0.5, last + 0.5], dtick=1 if last <= 12 else None)
    figure.update_yaxes(title=unit, rangemode="tozero")
    figure.update_layout(height=300, showlegend=len(lines) > 1)
    if smooth and len(figure.data) > 1:
        note = f"Bold: mean of the last {_SMOOTH} steps."
    return Chart(chart_id, title, note, _themed(figure))


def _themed(figure: Any) -> dict[str, Any]:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
    )
    figure.update_layout(margin={"t": 12 if figure.layout.showlegend is False else 40, "r": 16, "b": 48})
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    return json.loads(figure.to_json())


def _running_mean(values: Sequence[float]) -> list[float]:
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - _SMOOTH] if i >= _SMOOTH else 0.0)
        means.append(total / min(i + 1, _SMOOTH))
    return means


def _stage_title(label: str) -> str:
    if label == "warmup":
        return "Warm-up"
    stage, _, arm = label.partition("/")
    return f"{stage.upper()} ({arm})"
