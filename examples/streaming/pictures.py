"""What the examples share: the option `--plot`, and axes on white, which a dark page shows too."""

import argparse

OURS, PEER, SECOND, THIRD = "#c0392b", "#2471a3", "#6c7a89", "#b7950b"


def plot_option(text):
    """The file of `--plot`, or None."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE", help="draw a picture")
    return parser.parse_args().plot


def draw(file, rows, x_label, y_labels, logarithmic=()):
    """Writes a picture of `rows`, dicts of a name to (x, y, color), one pair of axes each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, axes = pyplot.subplots(len(rows), figsize=(7, 1 + 2.2 * len(rows)), squeeze=False,
                                   layout="constrained")  # fmt: skip
    for k, (axis, lines) in enumerate(zip(axes[:, 0], rows, strict=True)):
        for name, (x, y, color) in lines.items():
            wide = color == PEER  # so that it shows beneath a line that agrees with it
            axis.plot(
                x, y, color=color, label=name, lw=3 if wide else 1.2, alpha=0.5 if wide else 1
            )
        axis.set(ylabel=y_labels[k], yscale="log" if k in logarithmic else "linear")
        axis.margins(x=0.01)
        axis.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(x_label)
    figure.savefig(file, dpi=90, format="png")
    pyplot.close(figure)
    with Image.open(file) as picture:
        few = picture.convert("RGB").quantize(64)  # colours, for a file a third of the size
    few.save(file, "PNG", optimize=True)
