"""One picture of everything that was measured: for each value, the share of measurements that did not exceed it."""

from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tests.bench.table import Panel

COLUMNS = 3
PANEL_INCHES = (5.0, 3.4)
LOGARITHMIC_FROM = 20  # times the smallest value


def draw(panels: list[Panel], file: Path) -> None:
    """Write the panels into one SVG file."""
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows), layout="constrained")
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        for name, values in panel.series.items():
            if values:
                axes.ecdf(values, label=name)
        if panel.limit is not None:
            axes.axvline(panel.limit, color="black", linestyle=":", label="goal")
        axes.set(title=panel.title, xlabel=panel.unit, ylabel="share of measurements")
        every = [value for values in panel.series.values() for value in values]
        if every and max(every) > LOGARITHMIC_FROM * min(every) > 0:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    FigureCanvasSVG(figure).print_svg(file)
