"""The X-ray of a run as a page: the same prompts, cycle after cycle, token by token.

    python notes/xray.py RUN        # RUN is the folder of the run; writes RUN/xray.html

The page is one file. It needs no network: open it in a browser, send it, or put it on a server. It
shows what xray.jsonl holds: the replies of the recorded cycles, coloured by advantage, KL, reward
and so on. Choose a token, and the page shows the six steps with the numbers of this token. The
curves come from metrics.csv, J* comes from report.json. A run that is not finished has a page too.

The address of the page holds what you see. So this is a link to one token, in Chinese:
    xray.html#cycle=5&colour=KL&reply=1&token=3&language=zh

Look, text and behaviour of the page are in notes/xray_page.html. This program only puts the numbers
of a run into it.
"""
import csv
import json
import math
import sys
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parent / "xray_page.html"
PLACE = "THE NUMBERS OF THE RUN"  # the template has these words where the numbers go
CURVES = ["reward", "human", "kl", "objective", "validation"]
SETTINGS = {"cycles": "cycles", "kl_coef": "beta", "gamma": "gamma", "lam": "lambda",
            "clip_eps": "epsilon"}  # name in config.json -> name on the page
ONCE = {"prompt": str, "reply": str, "finished": bool, "score": (int, float, type(None))}
PER_TOKEN = ["log pi", "log ref", "KL", "r_t", "V(s_t)", "delta_t", "A_t", "return"]
PER_TOKEN_OF_THE_BATCH = ["rho", "A used"]


class UserError(Exception):
    """Something is wrong with what the user gave. The message is all that the user sees."""


def check(fine, message: str):
    if not fine:
        raise UserError(message)


# ---- Read the files of a run ---------------------------------------------------------------------
def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}")


def parse(text: str, where: str):
    """JSON -> what it says. NaN and infinity become None, for JSON.parse does not know them."""
    try:
        return json.loads(text, parse_constant=lambda name: None,
                          parse_float=lambda digits: finite(float(digits)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}")


def finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def read_settings(run: Path) -> dict[str, float]:
    """The numbers of config.json that the formulas need."""
    path = run / "config.json"
    config = parse(read_text(path), str(path))
    check(isinstance(config, dict), f"{path} is damaged: it holds no settings")
    for name in SETTINGS:
        check(is_number(config.get(name)), f"{path} is damaged: it has no number for {name}")
    return {ours: config[name] for name, ours in SETTINGS.items()}


def read_reply(text: str, where: str) -> dict:
    """One line of xray.jsonl, checked: the page relies on these fields."""
    line = parse(text, where)
    check(isinstance(line, dict), f"{where} is damaged: it holds no reply")
    check(type(line.get("cycle")) is int, f"{where} is damaged: cycle is missing")
    for name, kind in ONCE.items():
        value = line.get(name)
        check(name in line and isinstance(value, kind), f"{where} is damaged: {name} is missing")
    tokens = line.get("tokens")
    check(tokens and isinstance(tokens, list) and all(isinstance(x, str) for x in tokens),
          f"{where} is damaged: tokens is missing")
    columns = PER_TOKEN + (PER_TOKEN_OF_THE_BATCH if line.get("from_batch") else [])
    for name in columns:
        numbers = line.get(name)
        check(isinstance(numbers, list) and len(numbers) == len(tokens),
              f"{where} is damaged: {name} has not one number for each token")
        check(all(x is None or is_number(x) for x in numbers),
              f"{where} is damaged: {name} has something that is not a number")
    names = [*ONCE, "tokens", *columns]
    return {"cycle": line["cycle"], "from_batch": bool(line.get("from_batch")),
            **{name: line[name] for name in names}}


def read_cycles(run: Path) -> list[dict]:
    """xray.jsonl -> the recorded cycles in their order, each with its replies."""
    path = run / "xray.jsonl"
    check(path.is_file(), f"{run} has no xray.jsonl; name the folder of a run that has begun PPO")
    cycles = {}
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        if text.strip():
            reply = read_reply(text, f"line {number} of {path}")
            cycles.setdefault(reply.pop("cycle"), []).append(reply)
    check(cycles, f"{path} is empty")
    return [{"cycle": cycle, "replies": cycles[cycle]} for cycle in sorted(cycles)]


def read_curves(run: Path) -> dict[str, list]:
    """metrics.csv -> for each curve a list of [cycle, number].

    A column without numbers is left out. A run that has not finished its first cycle has no
    metrics.csv and no curves.
    """
    path = run / "metrics.csv"
    if not path.exists():
        return {}
    curves = {}
    try:
        for line in csv.DictReader(read_text(path).splitlines()):
            cycle = int(line["cycle"])
            for name in CURVES:
                number = finite(float(line.get(name) or "nan"))  # an empty cell: not measured
                if number is not None:
                    curves.setdefault(name, []).append([cycle, number])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error!r}")
    return curves


def read_optimum(run: Path) -> float | None:
    """J* of report.json, which a run writes at its very end."""
    path = run / "report.json"
    if not path.exists():
        return None
    report = parse(read_text(path), str(path))
    try:
        objective = report["optimum"]["objective"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is damaged: it has no optimum")
    return finite(objective) if is_number(objective) else None


# ---- Make the page -------------------------------------------------------------------------------
def page_data(run: Path) -> dict:
    """All that the page shows of this run."""
    check(run.is_dir(), f"there is no folder {run}")
    return {"run": run.resolve().name, "cycles": read_cycles(run), "settings": read_settings(run),
            "curves": read_curves(run), "optimum": read_optimum(run)}


def make_page(data: dict) -> str:
    """The template with the numbers in it.

    A reply may contain anything, even "</script>". As \\u003c, the sign < is still the same to the
    page's JSON.parse, and the browser's HTML parser sees no tag. All other characters outside ASCII
    are escaped by json.dumps. The page puts texts on the screen as text, never as HTML.
    """
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, numbers, 1)


def main():
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return
    check(len(words) == 1 and words[0], "name the folder of a run: python notes/xray.py RUN")
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    run = Path(words[0])
    page = make_page(page_data(run))
    path = run / "xray.html"
    path.write_text(page, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # an OSError: a file cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
