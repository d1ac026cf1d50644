"""Losses as TensorBoard recorded them, and two pictures of them: for the terminal and as a PNG.

Tool of `make demo`. NeMo's logger writes an event file a run; a resumed training has several in one folder.
Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["Curve", "event_files", "read_scalars", "save_picture", "terminal_plot"]

Curve = list[tuple[int, float]]  # (step, value), steps rising

_STEP = "global_step"
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a braille cell


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files anywhere below `folder`."""
    return sorted(folder.rglob("events.out.tfevents.*"))


def read_scalars(files: Iterable[Path]) -> dict[str, Curve]:
    """Every scalar of these event files: tag -> curve. Of a step logged twice, the later one counts.

    Steps count from 1: a loss at step 1 is that of the first batch. A file's own x axis is Lightning's count
    of batches, which falls one behind on every resume from a checkpoint that was saved at a validation;
    NeMo's `global_step`, logged beside each loss, does not. Points without one (hp_metric) are left out.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: dict[str, dict[int, tuple[float, float]]] = {}
    for path in files:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: keep all
        events.Reload()
        tags = events.Tags()["scalars"]
        steps = {event.step: round(event.value) + 1 for event in events.Scalars(_STEP)} if _STEP in tags else {}
        for tag in tags:
            points = seen.setdefault(tag, {})
            for event in events.Scalars(tag):
                step = steps.get(event.step)
                if step is not None and (step not in points or points[step][0] <= event.wall_time):
                    points[step] = (event.wall_time, event.value)
    return {tag: [(step, points[step][1]) for step in sorted(points)] for tag, points in seen.items()}


def _dense(curve: Curve, columns: int, first: int, last: int) -> list[float | None]:
    """The curve's value in each of `columns` equal slices of first..last, by straight lines between points."""
    values: list[float | None] = []
    for column in range(columns):
        x = first + (last - first) * column / max(columns - 1, 1)
        before = [point for point in curve if point[0] <= x]
        after = [point for point in curve if point[0] >= x]
        if not before or not after:
            values.append(None)
            continue
        (x0, y0), (x1, y1) = before[-1], after[0]
        values.append(y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return values


def _draw(values: Sequence[float | None], low: float, high: float, rows: int) -> list[list[int]]:
    """Dots of one curve: [row][column] bits of a braille cell; two columns and four rows of dots a cell."""
    cells = [[0] * (len(values) // 2) for _ in range(rows)]
    previous: int | None = None
    for x, value in enumerate(values):
        if value is None:
            previous = None
            continue
        y = round((high - value) / (high - low) * (rows * 4 - 1))
        # A vertical stroke joins this dot to the last one, so that a steep fall stays one line.
        start = y if previous is None or abs(previous - y) <= 1 else previous + (1 if y > previous else -1)
        for dot in range(min(start, y), max(start, y) + 1):
            cells[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        previous = y
    return cells


def terminal_plot(
    curves: Mapping[str, Curve], *, width: int = 72, rows: int = 12, mark: int | None = None
) -> list[str]:
    """Curves as lines of rich markup, in braille dots; `mark` is a step that gets a vertical line.

    curves  name -> curve; a name's colour is its place in the mapping: cyan, yellow, magenta, green
    width   columns of the whole picture, axis included
    returns rows lines of plot, one line of step numbers, one line naming the colours
    Raises ValueError if no curve has a point.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("nothing to plot: no curve has a point")
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    high += (high == low) * 1.0
    columns = max(width - 9, 8)
    colours = ("cyan", "yellow", "magenta", "green")
    layers = [
        (colour, _draw(_dense(curve, 2 * columns, first, last), low, high, rows))
        for colour, curve in zip(colours, curves.values(), strict=False)
    ]
    marked = None if mark is None or last == first else round((mark - first) / (last - first) * (columns - 1))
    lines = []
    for row in range(rows):
        label = f"{high - (high - low) * row / max(rows - 1, 1):7.2f} " if row % 3 == 0 or row == rows - 1 else " " * 8
        body = ""
        for column in range(columns):
            inked = [(colour, layer[row][column]) for colour, layer in layers if layer[row][column]]
            if inked:  # dots of all curves share the cell; the last curve gives the colour
                bits = 0
                for _, dots in inked:
                    bits |= dots
                body += f"[{inked[-1][0]}]{chr(_BRAILLE | bits)}[/]"
            else:
                body += "[dim]┊[/]" if column == marked else " "
        lines.append(f"{label}│{body}")
    steps = f"{first}".ljust(columns)
    if marked is not None:
        steps = steps[:marked] + f"{mark}" + steps[marked + len(f"{mark}") :]
    lines.append(" " * 9 + steps[: columns - len(f"{last}")] + f"{last}")
    names = "   ".join(f"[{colour}]━━[/] {name}" for colour, name in zip(colours, curves, strict=False))
    lines.append(" " * 9 + names + ("   [dim]┊[/] resumed" if marked is not None else ""))
    return lines


def save_picture(curves: Mapping[str, Curve], path: Path, *, title: str, mark: int | None = None) -> None:
    """Write the curves as a PNG (7 x 4 inches); `mark` is the step where training was resumed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    for (name, curve), style in zip(curves.items(), ("-", "o-", "s-", "^-"), strict=False):
        axes.plot([x for x, _ in curve], [y for _, y in curve], style, label=name, linewidth=1.4, markersize=4)
    if mark is not None:
        axes.axvline(mark, color="grey", linestyle=":", label=f"resumed at step {mark}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
