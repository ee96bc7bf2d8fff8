"""A search tree with the walk of a trace through it, as SVG that needs no script."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_MAX_NODES = 60
_ROW, _WIDE_ROW, _MARGIN = 34, 46, 30
_MIN_COLUMN, _MAX_COLUMN, _CHAR_WIDTH = 70, 190, 5.9
_LABEL_CHARS = 28
_FEW_LEAVES = 10


@dataclass(frozen=True)
class _Place:
    x: float
    y: float


def tree_svg(nodes: Sequence[Mapping[str, Any]], path: Sequence[int]) -> str:
    """Draw a tree from left to right.

    Nodes are coloured by outcome and edges are as wide as their child was visited; the walk of the trace is
    highlighted, each going back as a dashed arc with its number. Big trees show the walk and the most visited nodes.

    Args:
        nodes: of `Tree.to_json`.
        path: node ids in the order of a trace, from the root.
    """
    shown = _shown(nodes, set(path))
    children = {i: [c for c in nodes[i]["children"] if c in shown] for i in shown}
    labels = {i: _label(nodes[i]["step"]) for i in shown}
    longest = max((len(labels[i]) for i in shown if children[i]), default=0)
    column = min(_MAX_COLUMN, max(_MIN_COLUMN, longest * _CHAR_WIDTH + 14))
    places = _layout(children, nodes, column)
    width = max(place.x + (11 + len(labels[i]) * _CHAR_WIDTH) * (not children[i]) for i, place in places.items()) + 8
    height = max(place.y for place in places.values()) + _MARGIN
    parts = [
        f'<svg class="tree" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="Search tree of {len(nodes)} nodes, {len(shown)} shown">',
        '<defs><marker id="back" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" class="arrow"/></marker></defs>',
    ]
    walked = {(a, b) for a, b in itertools.pairwise(path) if nodes[b]["parent"] == a}
    most = max((nodes[i]["visits"] for i in shown), default=1) or 1
    for edge in sorted(((a, b) for a in shown for b in children[a]), key=lambda edge: edge in walked):
        parts.append(_edge(places, edge, edge in walked, nodes[edge[1]]["visits"] / most))
    backs = [(a, b) for a, b in itertools.pairwise(path) if nodes[b]["parent"] != a]
    for number, (a, b) in enumerate(backs, 1):
        parts.append(_back(places[a], places[b], number))
    for i in sorted(shown):
        hidden = len(nodes[i]["children"]) - len(children[i])
        parts.append(_node(places[i], nodes[i], labels[i], i in path, not children[i], hidden))
    return "".join([*parts, "</svg>"])


def _shown(nodes: Sequence[Mapping[str, Any]], on_path: set[int]) -> set[int]:
    """The walk's nodes, then the most visited ones whose parent is shown, up to the limit."""
    shown = set(on_path) | {0}
    frontier: list[tuple[int, int]] = []

    def offer(parent: int) -> None:
        for child in nodes[parent]["children"]:
            if child not in shown:
                heapq.heappush(frontier, (-nodes[child]["visits"], child))

    for i in sorted(shown):
        offer(i)
    while frontier and len(shown) < _MAX_NODES:
        _, child = heapq.heappop(frontier)
        if child not in shown:
            shown.add(child)
            offer(child)
    return shown


def _layout(
    children: Mapping[int, Sequence[int]], nodes: Sequence[Mapping[str, Any]], column: float
) -> dict[int, _Place]:
    """Leaves one row each in depth-first order, inner nodes in the middle of their children."""
    places: dict[int, _Place] = {}
    height = _WIDE_ROW if sum(not below for below in children.values()) <= _FEW_LEAVES else _ROW
    row = 0
    stack = [(0, False)]
    while stack:
        node, expanded = stack.pop()
        x = _MARGIN / 2 + nodes[node]["depth"] * column
        if not children[node]:
            places[node] = _Place(x, _MARGIN + row * height)
            row += 1
        elif expanded:
            ys = [places[child].y for child in children[node]]
            places[node] = _Place(x, (min(ys) + max(ys)) / 2)
        else:
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(children[node]))
    return places


def _edge(places: Mapping[int, _Place], edge: tuple[int, int], walked: bool, visits: float) -> str:
    a, b = places[edge[0]], places[edge[1]]
    bend = a.x + (b.x - a.x) * 0.35
    return (
        f'<path class="edge{" walked" if walked else ""}" stroke-width="{(2 if walked else 1) + 4 * visits**0.5:.1f}" '
        f'd="M{a.x:.0f},{a.y:.1f} C{bend:.0f},{a.y:.1f} {bend:.0f},{b.y:.1f} {b.x:.0f},{b.y:.1f}"/>'
    )


def _back(start: _Place, end: _Place, number: int) -> str:
    """An arc from where an attempt failed to the place gone back to."""
    below = end.y >= start.y
    bulge = (12 + 5 * number) * (1 if below else -1)
    tip_y = end.y + (-9 if below else 9) * (0 if start.y == end.y else 1)
    x1, x2 = start.x * 0.7 + end.x * 0.3, start.x * 0.25 + end.x * 0.75
    return (
        f'<path class="back" marker-end="url(#back)" d="M{start.x - 7:.0f},{start.y + (4 if below else -4):.1f} '
        f'C{x1:.0f},{start.y + bulge:.1f} {x2:.0f},{end.y - bulge:.1f} {end.x + 5:.0f},{tip_y:.1f}"/>'
        f'<text class="number" x="{start.x - 14:.0f}" y="{start.y + 4:.1f}">{number}</text>'
    )


def _node(place: _Place, node: Mapping[str, Any], label: str, on_path: bool, leaf: bool, hidden: int) -> str:
    kind = node["outcome"] or ("root" if node["parent"] is None else "inner")
    title = node["step"].strip() or ("the problem" if node["parent"] is None else "nothing written")
    title += f"\nQ {node['q']:.2f}, visits {node['visits']}, from {node['origin']}"
    if node["outcome"]:
        title += f"\n{node['outcome']}"
    radius = 6 if node["outcome"] else 4.5
    more = f" +{hidden}" if hidden else ""
    # beside a leaf, above an inner node: its edges leave to the right
    x, y = (place.x + 11, place.y + 4) if leaf else (place.x, place.y - 10)
    text = f'<text class="{"beside" if leaf else "above"}" x="{x:.0f}" y="{y:.1f}">{escape(label + more)}</text>'
    return (
        f'<g class="node {escape(kind)}{" walked" if on_path else ""}" data-node="{int(node["id"])}">'
        f'<title>{escape(title)}</title><circle cx="{place.x:.0f}" cy="{place.y:.1f}" r="{radius}"/>{text}</g>'
    )


def _label(step: str) -> str:
    headline = (step.strip().splitlines() or [""])[0]
    return headline if len(headline) <= _LABEL_CHARS else headline[: _LABEL_CHARS - 1] + "…"
