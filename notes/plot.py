"""Learning curves of one run or several, as one picture.

    python notes/plot.py runs/first runs/second --out curves.png
    python notes/plot.py runs/first --healthy --out notes/figures/healthy_run.png    # with what a healthy run does

Needs matplotlib, which nothing else here does.
"""
import argparse
import csv
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("error: notes/plot.py needs matplotlib: pip install matplotlib")
matplotlib.use("Agg")  # no window: a file
import matplotlib.pyplot as plt

# Column of metrics.csv -> title, what it does in a healthy run, and the band it stays in, if there is one.
PANELS = {
    "reward": ("reward", "rises quickly, then flattens", None),
    "human": ("human: points, 4 at best", "follows the reward; if it falls\nwhile the reward rises: hacking", None),
    "kl": ("kl to the SFT model, nats per reply", "0 at first, then a few nats, then flat", None),
    "objective": ("objective = reward - beta * kl", "rises; validation (dots) follows", None),
    "entropy": ("entropy, nats per token", "falls, but not to 0", None),
    "clip_fraction": ("clip_fraction", "at most 0.2; fades as lr falls", (0, 0.2)),
    "approx_kl": ("approx_kl to the old policy, per token", "well below 0.1", (0, 0.1)),
    "first_log_ratio": ("first_log_ratio", "rounding only: below 1e-5", (0, 1e-5)),
    "policy_loss": ("policy_loss", "no trend: jitters around 0, less and less", None),
    "value_loss": ("value_loss", "falls (may rise first, with the rewards)", None),
    "explained_variance": ("explained_variance (cut at -1)", "above 0 while replies differ in quality;\nunsteady when nearly all are good", None),
    "reply_length": ("reply_length, tokens", "finds its level; not up to the limit", None),
}
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito: for all eyes
DASHES = "-", "--", "-.", ":"


def read(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """metrics.csv -> for each column the cycles that have a number there, and the numbers."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: tuple(zip(*((float(row["cycle"]), float(row[name])) for row in rows if row[name]))) or ((), ())
            for name in rows[0]}


def draw(runs: list[Path], healthy: bool):
    """A panel per column; `healthy` writes below each title what it should do, and shades the band it stays in."""
    figure, axes = plt.subplots(3, 4, figsize=(15, 9.4 if healthy else 8.4), sharex=True, layout="constrained")
    for ax, (column, (title, note, band)) in zip(axes.flat, PANELS.items()):
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=32 if healthy else 6)
        ax.grid(alpha=0.3)
        ax.yaxis.set_major_formatter("{x:.3g}")  # no factor such as 1e-5 above the axis, where the note stands
        ax.spines[["top", "right"]].set_visible(False)
        if healthy:
            ax.annotate(note, (0, 1), (0, 29), "axes fraction", "offset points", fontsize=10, color="#444444", va="top")
            if band:
                ax.axhspan(*band, color="#009E73", alpha=0.12, lw=0)
    for i, run in enumerate(runs):
        curves, look = read(run), {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % 4]}
        for ax, column in zip(axes.flat, PANELS):
            ax.plot(*curves[column], lw=1.6, label=str(run), **look)
            if column == "objective":
                ax.plot(*curves["validation"], "o", ms=5, color=look["color"])
    axes.flat[list(PANELS).index("explained_variance")].set_ylim(-1.05, 1.05)
    for ax in axes[-1]:
        ax.set_xlabel("cycle")
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", default="curves.png", help="the picture, PNG")
    parser.add_argument("--healthy", action="store_true", help="add what each curve does in a healthy run")
    options = parser.parse_args()
    for run in options.run:
        if not (run / "metrics.csv").is_file():
            sys.exit(f"error: {run} has no metrics.csv; name the folder of a run that has begun PPO")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    draw(options.run, options.healthy).savefig(options.out, dpi=80)
    print(options.out)


if __name__ == "__main__":
    main()
