"""Learning curves of one run or several, as one picture.

    python notes/plot.py runs/first runs/second --out curves.png
    python notes/plot.py runs/first --healthy --out notes/figures/healthy_run.png

--healthy writes above each curve what it does in a healthy run. The script needs matplotlib, which
nothing else here needs.
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

# Column of metrics.csv -> title, what it does in a healthy run, and the band it stays in, if any.
PANELS = {
    "reward": ("reward", "rises quickly, then flattens", None),
    "human": ("human: points, 4 at best",
              "follows the reward; if it falls\nwhile the reward rises: hacking", None),
    "kl": ("kl to the SFT model, nats per reply", "0 at first, then a few nats, then flat", None),
    "objective": ("objective = reward - beta * kl", "rises; validation (dots) follows", None),
    "entropy": ("entropy, nats per token", "falls, but not to 0", None),
    "clip_fraction": ("clip_fraction", "at most 0.2; fades as lr falls", (0, 0.2)),
    "approx_kl": ("approx_kl to the old policy, per token", "well below 0.1", (0, 0.1)),
    "first_log_ratio": ("first_log_ratio", "rounding only: below 1e-5", (0, 1e-5)),
    "policy_loss": ("policy_loss", "no trend: jitters around 0, less and less", None),
    "value_loss": ("value_loss", "falls (may rise first, with the rewards)", None),
    "explained_variance": ("explained_variance (cut at -1)",
                           "above 0 while replies differ in quality;\n"
                           "unsteady when nearly all are good", None),
    "reply_length": ("reply_length, tokens", "finds its level; not up to the limit", None),
}
# The colours of Okabe and Ito, which colour-blind people can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", ":"]


def read(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """metrics.csv -> for each column the cycles that have a number there, and the numbers."""
    curves = {}
    with open(run / "metrics.csv", newline="") as file:
        for line in csv.DictReader(file):
            for name, number in line.items():
                cycles, numbers = curves.setdefault(name, ([], []))
                if number:
                    cycles.append(float(line["cycle"]))
                    numbers.append(float(number))
    return curves


def make_panels(healthy: bool):
    """The empty picture, with a panel for each column -> figure, panels by column."""
    height = 9.4 if healthy else 8.4
    figure, axes = plt.subplots(3, 4, figsize=(15, height), sharex=True, layout="constrained")
    panels = dict(zip(PANELS, axes.flat))
    for column, ax in panels.items():
        title, note, band = PANELS[column]
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=32 if healthy else 6)
        ax.grid(alpha=0.3)
        ax.yaxis.set_major_formatter("{x:.3g}")  # a factor above the axis would cover the note
        ax.spines[["top", "right"]].set_visible(False)
        if healthy:
            ax.annotate(note, (0, 1), (0, 29), "axes fraction", "offset points", fontsize=10,
                        color="#444444", va="top")
        if healthy and band:
            ax.axhspan(*band, color="#009E73", alpha=0.12, lw=0)
    for ax in axes[-1]:
        ax.set_xlabel("cycle")
    return figure, panels


def draw(runs: list[Path], healthy: bool):
    """A panel for each column, with a curve for each run."""
    figure, panels = make_panels(healthy)
    for i, run in enumerate(runs):
        curves = read(run)
        color = COLORS[i % len(COLORS)]
        dashes = DASHES[i // len(COLORS) % len(DASHES)]
        for column, ax in panels.items():
            ax.plot(*curves[column], lw=1.6, label=str(run), color=color, linestyle=dashes)
        panels["objective"].plot(*curves["validation"], "o", ms=5, color=color)
    panels["explained_variance"].set_ylim(-1.05, 1.05)
    if len(runs) > 1:
        handles, labels = panels["reward"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", default="curves.png", help="the picture, PNG")
    parser.add_argument("--healthy", action="store_true",
                        help="add what each curve does in a healthy run")
    options = parser.parse_args()
    for run in options.run:
        if not (run / "metrics.csv").is_file():
            sys.exit(f"error: {run} has no metrics.csv; "
                     "name the folder of a run that has begun PPO")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    draw(options.run, options.healthy).savefig(options.out, dpi=80)
    print(options.out)


if __name__ == "__main__":
    main()
