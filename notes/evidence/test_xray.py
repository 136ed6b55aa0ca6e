"""The page of notes/xray.py: it holds the numbers of the run, shows them, and no reply breaks it.

The first tests read the page as text and run everywhere. The others open it in a browser without a
window. They are skipped where no Chromium or Chrome is installed.
"""
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from helpers import ONE_THREAD
from test_ppo_rlhf import HERE

sys.path.insert(0, str(HERE / "notes"))
import xray

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")

# Texts that a model might write, and that a careless page would take for HTML or for a script.
HOSTILE = [
    "</script><script>document.title = 'broken'</script>", "<!--", "-->", "]]>", "<script",
    "<img src=x onerror=\"document.title='broken'\">", "\" onclick=\"document.title='broken'",
    "'", "\"", "`${document.title = 'broken'}`", "&lt;b&gt;", "<b>bold</b>", "\\", "\\u003c", "$&",
    xray.PLACE, "__proto__", "\u2028", "\u2029", "\u202e", "\x00", "\ufeff", "\ud83d", "\ufffd",
    "你好", "مرحبا", "👩‍🚀"]
WHITE = {"\n": "↵", "\t": "⇥", " ": "␣", "": "␣", "\u2028": "␣", "\u2029": "␣", "\ufeff": "␣",
         " a": " a"}  # token -> what the page shows


# ---- Tools ---------------------------------------------------------------------------------------
def make_page(run):
    """The program itself, in a process of its own -> what it prints, and its exit code."""
    done = subprocess.run([sys.executable, HERE / "notes/xray.py", run], capture_output=True,
                          encoding="utf-8", env=ONE_THREAD)
    return done.stdout, done.stderr, done.returncode


def recorded(run):
    """The lines of xray.jsonl as dicts."""
    return [json.loads(line) for line in (run / "xray.jsonl").read_text().splitlines()]


def made_up(cycle, tokens, from_batch=False, **changes):
    """A line of xray.jsonl. The numbers of each column differ."""
    line = {"cycle": cycle, "from_batch": from_batch, "prompt": "".join(tokens),
            "reply": "".join(tokens), "finished": True, "score": 0.5, "tokens": tokens}
    names = xray.PER_TOKEN + (xray.PER_TOKEN_OF_THE_BATCH if from_batch else [])
    for place, name in enumerate(names):
        line[name] = [round(place - 0.1 * t, 4) for t in range(len(tokens))]
    return {**line, **changes}


@pytest.fixture
def copied(run, tmp_path):
    """The files of a real run that the page needs, in a folder that may be changed."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ["config.json", "metrics.csv", "report.json", "xray.jsonl"]:
        shutil.copy(run / name, folder)
    return folder


def rewrite(folder, *lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "xray.jsonl").write_text(text, encoding="utf-8")


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes, text), in their order. The text has inner texts."""

    EMPTY = {"meta", "input", "br"}

    def __init__(self, page):
        super().__init__()
        self.all, self.open = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.all.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def with_class(self, name):
        return [element for element in self.all if name in element[1].get("class", "").split()]

    def text(self, id):
        [found] = [element[2] for element in self.all if element[1].get("id") == id]
        return found


def open_page(folder, address, script=""):
    """The page in a browser, after the script has used it -> its elements. No error may occur.

    The script can tell the test something: tell(anything).
    """
    assert make_page(folder)[2] == 0
    page = (folder / "xray.html").read_text(encoding="utf-8")
    watch = """<script>
        const noted = document.documentElement.dataset;
        onerror = (text) => { noted.error = text; };
        const tell = (what) => { noted.told = JSON.stringify(what); };
        </script><title>"""
    page = page.replace("<title>", watch, 1)
    page = page.replace("</body>", f"<script>{script}</script></body>")
    path = folder / "opened.html"
    path.write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}",
               f"{path.as_uri()}#{address}"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    elements = Elements(done.stdout.decode("utf-8"))
    assert "data-error" not in elements.all[0][1], elements.all[0]
    return elements


def told(elements):
    """What the script told: it stands at the first element, <html>."""
    return json.loads(elements.all[0][1]["data-told"])


def numbers_of(elements):
    """The numbers of the chosen token, as the page shows them."""
    cells = [element for element in elements.all if "data-name" in element[1]]
    return {attributes["data-name"]: text.replace("−", "-") for _, attributes, text in cells}


def numbers_in(line, t):
    """The same of a line of xray.jsonl."""
    names = xray.PER_TOKEN + (xray.PER_TOKEN_OF_THE_BATCH if line["from_batch"] else [])
    return {name: f"{line[name][t] + 0.0:.4f}".replace("-0.0000", "0.0000") for name in names}


# ---- The page as text ----------------------------------------------------------------------------
def test_the_page_holds_all_numbers_of_the_run(copied):
    printed, errors, code = make_page(copied)
    assert code == 0 and errors == "" and printed.strip() == str(copied / "xray.html")
    page = Elements((copied / "xray.html").read_text(encoding="utf-8"))
    data = json.loads(page.text("data"))
    lines = [{"cycle": cycle["cycle"], **reply}
             for cycle in data["cycles"] for reply in cycle["replies"]]
    assert lines == recorded(copied) and len(lines) > 10
    with open(copied / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ["reward", "human", "kl", "objective"]:
        assert data["curves"][name] == [[int(row["cycle"]), float(row[name])] for row in rows]
    measured = [row for row in rows if row["validation"]]
    assert len(data["curves"]["validation"]) == len(measured) < len(rows)
    report = json.loads((copied / "report.json").read_text())
    assert data["optimum"] == report["optimum"]["objective"]


def test_the_formulas_of_the_page_give_the_numbers_of_the_file(copied):
    """Else the page would show sums that are wrong: with the settings that it shows."""
    settings = xray.page_data(copied)["settings"]
    beta, gamma, lam = settings["beta"], settings["gamma"], settings["lambda"]
    for line in recorded(copied):
        score = [0.0] * (len(line["tokens"]) - 1) + [line["score"]]
        value_after = line["V(s_t)"][1:] + [0.0]
        advantage_after = line["A_t"][1:] + [0.0]
        for t, _ in enumerate(line["tokens"]):
            x = {name: line[name][t] for name in xray.PER_TOKEN}
            delta = x["r_t"] + gamma * value_after[t] - x["V(s_t)"]
            close = {"abs": 3e-4}  # four numbers that are rounded to 4 decimals
            assert x["KL"] == pytest.approx(x["log pi"] - x["log ref"], **close)
            assert x["r_t"] == pytest.approx(-beta * x["KL"] + score[t], **close)
            assert x["delta_t"] == pytest.approx(delta, **close)
            assert x["A_t"] == pytest.approx(x["delta_t"] + gamma * lam * advantage_after[t],
                                             **close)
            assert x["return"] == pytest.approx(x["A_t"] + x["V(s_t)"], **close)


def test_nothing_in_a_reply_becomes_markup(copied):
    """The elements of the page are those of the template, and the texts arrive unchanged."""
    lines = [made_up(1, HOSTILE), made_up(1, HOSTILE, from_batch=True)]
    rewrite(copied, *lines)
    assert make_page(copied)[2] == 0
    page = Elements((copied / "xray.html").read_text(encoding="utf-8"))
    template = Elements(xray.TEMPLATE.read_text(encoding="utf-8"))
    assert [element[:2] for element in page.all] == [element[:2] for element in template.all]
    [cycle] = json.loads(page.text("data"))["cycles"]
    assert [reply["tokens"] for reply in cycle["replies"]] == [HOSTILE] * 2
    texts = [element[2] for element in page.all if element[0] == "script"][1:]
    assert texts == [element[2] for element in template.all if element[0] == "script"][1:]


def test_the_page_loads_nothing():
    template = xray.TEMPLATE.read_text(encoding="utf-8")
    elements = Elements(template)
    for tag, attributes, _ in elements.all:
        assert tag not in ["link", "img", "iframe", "object", "embed", "base"]
        assert not {"src", "href"} & {*attributes}
    [rules] = [attributes["content"] for _, attributes, _ in elements.all
               if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert rules.startswith("default-src 'none';")
    addresses = set(re.findall(r"\w+://[^\"\s]*", template))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language, never opened
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|url\(|@import",
                         template)
    assert template.count(xray.PLACE) == 1


def test_the_page_of_the_default_run_is_small():
    """12 recorded cycles, 6 replies of 20 tokens: the replies of the world are shorter."""
    words = [f" word{t}" for t in range(20)]
    cycles = [{"cycle": n, "replies": [made_up(n, words, from_batch=True)] * 6} for n in range(12)]
    page = xray.make_page({"cycles": cycles})
    assert len(page.encode()) < 500_000


@pytest.mark.parametrize("missing", ["report.json", "metrics.csv"])
def test_a_run_that_is_not_finished_has_a_page(copied, missing):
    (copied / missing).unlink()
    assert make_page(copied)[2] == 0
    data = xray.page_data(copied)
    if missing == "report.json":
        assert data["optimum"] is None and data["curves"]["reward"]
    else:
        assert data["curves"] == {}


def test_numbers_that_are_none_become_null(copied):
    odd = made_up(1, ["a", "b"], score=math.nan, KL=[math.inf, 1.0])
    rewrite(copied, odd)
    [cycle] = xray.page_data(copied)["cycles"]
    assert cycle["replies"][0]["score"] is None and cycle["replies"][0]["KL"] == [None, 1.0]
    assert make_page(copied)[2] == 0


GOOD = made_up(1, ["a", "b"], from_batch=True)
DAMAGE = {
    "half a line": ("xray.jsonl", json.dumps(GOOD)[:-20]),
    "no object": ("xray.jsonl", "[1]"),
    "nothing": ("xray.jsonl", "\n"),
    "too deep": ("xray.jsonl", "[" * 100_000),
    "not UTF-8": ("xray.jsonl", b"\xff\xfe"),
    "no reply": ("xray.jsonl", json.dumps({"cycle": 1})),
    "no cycle": ("xray.jsonl", json.dumps({**GOOD, "cycle": "1"})),
    "no tokens": ("xray.jsonl", json.dumps({**GOOD, "tokens": []})),
    "tokens are numbers": ("xray.jsonl", json.dumps({**GOOD, "tokens": [1, 2]})),
    "too few numbers": ("xray.jsonl", json.dumps({**GOOD, "A_t": [1.0]})),
    "a word among numbers": ("xray.jsonl", json.dumps({**GOOD, "KL": [1.0, "2"]})),
    "no rho": ("xray.jsonl", json.dumps({**GOOD, "rho": None})),
    "no number in the table": ("metrics.csv", "cycle,reward\n1,high\n"),
    "no cycle in the table": ("metrics.csv", "reward\n1\n"),
    "no number of a cycle": ("metrics.csv", "cycle,reward\nnan,1\n"),
    "no settings": ("config.json", "{}"),
    "settings are a list": ("config.json", "[]"),
    "no optimum": ("report.json", "{}"),
    "half a report": ("report.json", "{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_of_one_line(copied, damage):
    rewrite(copied, GOOD)
    assert make_page(copied)[2] == 0
    (copied / "xray.html").unlink()
    name, content = DAMAGE[damage]
    (copied / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    printed, errors, code = make_page(copied)
    assert code == 2 and printed == "" and errors.count("\n") == 1
    assert errors.startswith("error: ") and name in errors
    assert not (copied / "xray.html").exists()


@pytest.mark.parametrize("words, says", [
    ([], "name the folder"), (["a", "b"], "name the folder"), ([""], "name the folder"),
    (["no_such_folder"], "no folder"), (["--help_me"], "no folder"), (["."], "no xray.jsonl"),
    (["x" * 5000], "x")])
def test_a_wrong_call_is_an_error_of_one_line(words, says, tmp_path):
    done = subprocess.run([sys.executable, HERE / "notes/xray.py", *words], cwd=tmp_path,
                          capture_output=True, encoding="utf-8", env=ONE_THREAD)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and says in done.stderr


# ---- The page in a browser -----------------------------------------------------------------------
@browser
@pytest.mark.parametrize("cycle, reply, token", [(0, 1, 1), (2, 2, 3), (3, 6, 99)])
def test_the_page_shows_the_numbers_of_the_token_in_its_address(copied, cycle, reply, token):
    """A token behind the end is the last one, which gets the score. From the 5th on: the batch."""
    line = [line for line in recorded(copied) if line["cycle"] == cycle][reply - 1]
    t = min(token, len(line["tokens"])) - 1
    script = """tell([...document.querySelectorAll("#detail tr")].map((row) =>
        [...row.cells].map((cell) => cell.textContent)));"""
    page = open_page(copied, f"cycle={cycle}&reply={reply}&token={token}&language=en", script)
    assert numbers_of(page) == numbers_in(line, t)
    assert line["from_batch"] == ("rho" in numbers_of(page)) == ("Case " in page.text("detail"))
    assert page.text("cycle") == (f"cycle {cycle} of 3" if cycle else "cycle 0: before PPO")
    sums = 0
    for _, formula, number in told(page):  # r_t is -beta * KL: "−β · KL = −0.1 · 0.0310", "−0.0031"
        number, *sides = [text.replace("−", "-").replace("·", "*") for text in
                          [number, *formula.split("=")]]
        if len(sides) == 2:
            assert eval(sides[1]) == pytest.approx(float(number), abs=3e-4)
            sums += 1
    assert sums == 5  # KL, r_t, delta_t, A_t, return


@browser
def test_slider_click_keys_and_colours_change_what_is_shown(copied):
    lines = [line for line in recorded(copied) if line["cycle"] == 2]
    script = """
        const slider = document.getElementById("slider");
        slider.value = 2;
        slider.dispatchEvent(new Event("input"));
        document.querySelectorAll(".reply")[1].querySelectorAll(".token")[1].click();
        const press = (key) => document.activeElement.dispatchEvent(
            new KeyboardEvent("keydown", { key, bubbles: true }));
        document.querySelector("#replies .token[tabindex='0']").focus();
        press("ArrowRight");
        press("ArrowDown");
        document.querySelector("[data-colour=KL]").click();
        setTimeout(() => tell(location.hash), 1000);"""
    page = open_page(copied, "cycle=0&language=zh", script)
    assert numbers_of(page) == numbers_in(lines[2], 2)
    assert page.text("cycle") == "第 2 轮，共 3 轮"
    [chosen] = [element for element in page.with_class("token")
                if element[1].get("aria-pressed") == "true"]
    assert chosen[1]["title"].replace("−", "-") == f"KL = {numbers_in(lines[2], 2)['KL']}"
    assert told(page) == "#cycle=2&colour=KL&reply=3&token=3&language=zh"


@browser
def test_the_colour_of_a_token_tells_its_sign(copied):
    tiny = [-0.0001, -0.0, 0.0, 0.0, 0.0]
    rewrite(copied, made_up(1, list("abcde"), A_t=[-2.0, -0.5, 0.0, 0.5, 2.0], KL=tiny))
    page = open_page(copied, "colour=A&language=en")
    styles = [attributes["style"] for _, attributes, _ in page.with_class("token")
              if "style" in attributes]
    hues = [re.search(r"--(more|less)\) / ([\d.]+)", style).groups() for style in styles]
    assert [hue for hue, _ in hues] == ["less", "less", "less", "more", "more"]
    strengths = [float(strength) for _, strength in hues]
    assert strengths == [0.75, 0.375, 0.0, 0.375, 0.75]  # a quarter of the number: half the colour
    assert "KL 0.00" in page.text("replies")  # and not "−0.00"


@browser
def test_the_page_shows_hostile_texts_as_text(copied):
    # The browser's --dump-dom prints nothing if half a character pair is on the page.
    tokens = [token for token in HOSTILE if token != "\ud83d"] + list(WHITE)
    rewrite(copied, made_up(1, tokens), made_up(1, tokens, from_batch=True))
    template = {element[0] for element in Elements(xray.TEMPLATE.read_text(encoding="utf-8")).all}
    made = {"article", "td", "th", "tr", "thead", "tbody", "table", "sub", "b", "br", "h2", "h3",
            "svg", "path"}
    for address in ["cycle=<b>&colour=__proto__&reply=-1&token=1e9&language=<script>",
                    "reply=2&token=6&colour=ratio", "reply=2&token=99&colour=KL"]:
        page = open_page(copied, address, "tell([document.title, [...document.querySelectorAll("
                         "'#replies .token')].map((token) => token.textContent)]);")
        title, shown = told(page)
        assert "broken" not in title
        assert shown == [WHITE.get(token, token) for token in tokens] * 2
        assert {element[0] for element in page.all} <= template | made


@browser
def test_the_curves_show_the_cycle_and_own_data_have_no_human(copied):
    with open(copied / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = open_page(copied, "cycle=3&language=en")
    optimum = json.loads((copied / "report.json").read_text())["optimum"]["objective"]
    curves = page.text("curves").replace("−", "-")
    for name in ["reward", "human", "kl", "objective"]:
        assert f"{float(rows[2][name]):.3f}" in curves
    assert "human" in curves and f"J* {optimum:.3f}" in curves
    assert len(page.with_class("now")) == 4 and len(page.with_class("optimum")) == 1
    for row in rows:
        row["human"] = ""
    with open(copied / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (copied / "report.json").unlink()
    page = open_page(copied, "cycle=3&language=en")
    assert "human" not in page.text("curves") and "J*" not in page.text("curves")
    assert len(page.with_class("now")) == 3 and not page.with_class("optimum")


@browser
def test_every_text_of_the_page_is_there_in_both_languages(copied):
    """All colours, both kinds of replies and all cases, in each language: no error, no gap."""
    script = """
        const wrong = Object.entries(TEXTS).filter(([, texts]) => texts.length !== 2 ||
            texts.join().match(/\\[\\w+\\]/g)?.length % 2);
        const shown = [];
        for (const language of LANGUAGES) {
            for (const colour of Object.keys(COLOURS)) {
                for (const reply of [0, 5]) {
                    change({ language, colour, reply, token: 0, position: 2 });
                    shown.push(document.body.innerText);
                }
            }
            for (const [rho, A] of [[1, 0], [1, 1], [1.3, 1], [1, -1], [0.7, -1]]) {
                shown.push(words("case_" + caseOf(rho, A)));
            }
        }
        const cases = [[1, 0], [0.7, 1], [1.3, 1], [1.3, -1], [0.7, -1]].map((x) => caseOf(...x));
        tell([wrong, cases, shown.length, shown.join().includes("undefined")]);"""
    assert told(open_page(copied, "", script)) == [[], [0, 1, 2, 3, 4], 38, False]


@browser
def test_play_goes_through_the_cycles_and_stops(copied):
    script = """
        const said = [];
        const look = () => said.push(find("cycle").textContent, find("play").textContent);
        find("play").click();
        look();
        setTimeout(look, 2000);
        setTimeout(() => { look(); tell(said); }, 4000);"""
    page = open_page(copied, "cycle=2&language=en", script)
    assert told(page) == ["cycle 2 of 3", "❚❚", "cycle 3 of 3", "❚❚", "cycle 3 of 3", "▶"]
