"""Numbers and their sources: check_numbers.py finds what is wrong, and all pages are right."""
import re
import shutil
import subprocess
import sys

import pytest

import check_numbers
import record
from test_ppo_rlhf import HERE, slow

PROGRAM = '''"""A program."""
import argparse

def measure():
    """What it measures."""
    return 0.9912  # of the way

parser = argparse.ArgumentParser()
parser.add_argument("--fast", help="nothing is slower")
print("fraction", measure(), "human 3.948, 12.5s, 2,312 pairs")
'''
PRINTED = "fraction 0.9912 human 3.948, 12.5s, 2,312 pairs\n"


@pytest.fixture
def root(tmp_path):
    """A small repository with a program and its record, `first`."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "ppo_rlhf.py").write_text(PROGRAM)
    (tmp_path / "test_tiny.py").write_text("def test_half():\n    assert 1 / 2 == 0.5\n")
    record.write("first", ["python", "ppo_rlhf.py"], [], None, tmp_path)
    return tmp_path


def check(root, capsys, page):
    """A page -> the exit code and the lines about what is wrong."""
    (root / "README.md").write_text(page, encoding="utf-8")
    capsys.readouterr()
    code = check_numbers.main([], root)
    lines = capsys.readouterr().out.splitlines()
    first = [line for line in lines if line.startswith("1 pages, ")]
    return code, lines[:lines.index(first[0])]


# ==================================================================================================
# Pages
# ==================================================================================================
@pytest.mark.parametrize("source, text", [
    ("first", "It went 0.99, 0.991 or 99.1% of the way; the human gave 3.95, in 12.5 s."),
    ("first", "2,312 or 2312 pairs, in 13 seconds"),
    ("first +- 0.01", "about 98.5% and 0.985 of the way"),
    ("first +- 10%", "11.5 s"),
    ("first; arithmetic 0.0088", "0.9912, so 0.0088 are left"),
    ("first; arithmetic (a sum)", "0.9912, so 0.0088 are left"),
    ("run: python ppo_rlhf.py", "0.991"),
    ("page notes/other.md", "0.25, as said elsewhere"),
    ("tests test_half", "0.5"),
    ("no record, 2026-11-22, an old version", "On November 22 it was 0.7."),
    ("no record, 2026-11-22, an old version", "11 月 22 日测得 0.7。"),
    ("first", "```text\n0.9912\n```\n```python\nx = 0.123\n```\n\n    python x.py --lr 0.123\n"),
    ("first", "`--lr 0.123`, $x = 0.123$, torch 2.13.0, Python 3.10, TRL 1.12, seed 42, "
              "November 25\n> quoted: 0.123\n\n[exercise 12](a0.123.md), section 4.12, GPT-2, trl #491"),
    ("first", "| | share |\n|---|---|\n| SFT | 0.99 |"),
])
def test_a_number_with_its_source_passes(source, text, root, capsys):
    (root / "notes/other.md").write_text("# Other\n<!-- numbers: arithmetic -->\n0.25\n")
    page = f"# Title\n<!-- numbers: {source} -->\n{text}\n"
    (root / "README.md").write_text(page, encoding="utf-8")
    code = check_numbers.main([str(root / "README.md")], root)
    assert code == 0, capsys.readouterr().out


PARTS = """print('''Trial 1
| a | 0.25 |

Trial 2
| b | 0.75 |
X-RAY 9
0.5

rest
0.125''')
"""


@pytest.mark.parametrize("part, number, problem", [
    ("Trial 1", "0.25", ""), ("Trial 2", "0.75", ""), ("Trial 2", "0.5", ""), ("rest", "0.125", ""),
    ("Trial 1", "0.75", "0.75: not found in: parts/Trial 1"),
    ("Trial 2", "0.25", "0.25: not found in: parts/Trial 2"),
    ("Trial 2", "0.125", "0.125: not found in: parts/Trial 2"),
    ("Trial 3", "0.25", "record parts has no part Trial 3"),
])
def test_a_source_can_name_a_part_of_a_record(part, number, problem, root, capsys):
    (root / "parts.py").write_text(PARTS)
    record.write("parts", ["python", "parts.py"], [], None, root)
    page = f"# Title\n<!-- numbers: parts/{part} -->\nIt was {number}.\n"
    code, lines = check(root, capsys, page)
    assert code == bool(problem), lines
    assert problem in "\n".join(lines)


@pytest.mark.parametrize("source, text, says", [
    ("first", "It went 0.98 of the way.", "0.98: not found in: first"),
    ("first", "It went 98.1% of the way.", "98.1%: not found in: first"),
    ("first", "```text\n0.9913\n```", "0.9913: not found"),
    ("first", "| | share |\n|---|---|\n| SFT | 0.97 |", "0.97: not found"),
    ("first", "-0.9912", "-0.9912: not found"),
    ("first", "64 replies", "64: not found"),
    ("first +- 0.001", "0.98", "0.98: not found"),
    ("first; arithmetic 0.5", "0.5 and 0.6", "0.6: not found"),
    ("first; arithmetic 0.5", "0.99", "0.5: in the comment, but not in the text"),
    ("second", "0.5", "there is no record second"),
    ("tests test_third", "0.5", "there is no test test_third"),
    ("page notes/other.md", "0.5", "there is no page notes/other.md"),
    ("run: python nothing.py", "0.5", "`python nothing.py` ended with"),
    ("run: python ppo_rlhf.py", "0.5", "0.5: not found in: run: python ppo_rlhf.py"),
    ("no record, 2026-11-22, old", "0.5", "does not say that numbers are of November 22"),
    ("no record, 2026-11-02, old", "November 22: 0.5", "that numbers are of November 2"),
    ("no record", "0.5", "no such source: no record"),
    ("arithmetic and so on", "0.5", "no such source: arithmetic and so on"),
])
def test_a_wrong_number_or_source_is_one_line(source, text, says, root, capsys):
    page = f"# Title\n## A section\n<!-- numbers: {source} -->\n{text}\n"
    code, lines = check(root, capsys, page)
    assert code == 1 and any(says in line for line in lines), lines
    assert all(line.startswith(('README.md, "A section": ', "there is no ", "`python "))
               for line in lines)


@pytest.mark.parametrize("text, seen", [
    ("It went 0.99 of the way.", "0.99"), ("99% of the way", "99%"), ("It took 41 s.", "41 s"),
    ("15 minutes", "15 minutes"), ("跑了 15 分钟", "15 分钟"), ("| a | −0.5 |", "-0.5"),
    ("It has 60 cycles, 2 models and 14 prompts.", ""), ("two minutes, 28 prompts", "")])
def test_a_number_that_looks_measured_needs_a_source(text, seen, root, capsys):
    code, lines = check(root, capsys, f"# Title\n\n## Other\n{text}\n")
    if seen:
        [line] = lines
        assert code == 1 and f'README.md, "Other": {seen}: a number without a source' in line
    else:
        assert code == 0 and not lines


@pytest.mark.parametrize("source, inherited", [
    ("first", True), ("no record, 2026-11-22, old", True), ("tests test_half", True),
    ("arithmetic", False), ("arithmetic (settings)", False), ("tests test_half 0.5", False)])
def test_a_comment_holds_for_the_sections_below_unless_it_is_arithmetic(
        source, inherited, root, capsys):
    page = (f"# Title\n<!-- numbers: {source}; arithmetic -->\nOf November 22. 0.5, 0.991\n"
            f"## Below\n0.9912\n")
    _, lines = check(root, capsys, page)
    below = [line for line in lines if '"Below"' in line]
    assert bool(below) != inherited, lines


def test_a_section_can_add_to_the_comment_above_it(root, capsys):
    page = ("<!-- numbers: first -->\n# Title\n## One\n<!-- numbers: above; arithmetic 0.1 -->\n"
            "0.1 0.9912 0.3\n## Two\n0.1\n")
    code, lines = check(root, capsys, page)
    assert lines == ['README.md, "One": 0.3: not found in: first; arithmetic 0.1',
                     'README.md, "Two": 0.1: not found in: first']
    code, lines = check(root, capsys, "# Title\n<!-- numbers: above; arithmetic 0.1 -->\n0.1\n")
    assert code == 1 and "there is no record above" in lines[0]


def test_a_comment_ends_at_the_next_one_and_at_a_heading_of_its_rank(root, capsys):
    page = ("# Title\n## One\n<!-- numbers: arithmetic -->\n0.1\n\n<!-- numbers: first -->\n0.2\n"
            "## Two\n0.3\n")
    code, lines = check(root, capsys, page)
    assert [re.search(r'"(\w+)": (\S+):', line).groups() for line in lines] == [
        ("One", "0.2"), ("Two", "0.3")]


@pytest.mark.parametrize("number, printed, same", [
    ("0.99", "0.9912", True), ("0.99", "0.985", True), ("0.99", "0.9849", False),
    ("99.1%", "0.991", True), ("99.1%", "0.9912", True), ("99.1%", "99.1%", True),
    ("99.1%", "99.14", True), ("99.1%", "0.992", False), ("0.99", "99.1%", True),
    ("99", "0.991", False), ("1.00", "0.995", True), ("-0.5", "0.5", False),
    ("3e-7", "3.2e-7", True), ("3e-7", "3.8e-7", False), ("0.0000", "0.00004", True),
    ("1,700", "1700", True), ("41", "40.6", True), ("41", "41.6", False)])
def test_a_number_agrees_within_its_rounding(number, printed, same):
    assert check_numbers.agrees(number, printed) == same


# ==================================================================================================
# Records
# ==================================================================================================
@pytest.mark.parametrize("old, new, becomes_old", [
    ("  # of the way", "  # and no more", False),
    ("What it measures.", "Something else.", False),
    ('"""A program."""\n', "", False),
    ("nothing is slower", "everything is", False),
    ("\n\ndef", "\n\n\n\ndef", False),
    ("0.9912", "0.9913", True),
    ("--fast", "--slow", True),
    ("measure(), ", "int(measure()), ", True)])
def test_a_record_becomes_old_when_the_code_computes_something_else(
        old, new, becomes_old, root, capsys):
    (root / "ppo_rlhf.py").write_text(PROGRAM.replace(old, new))
    code, lines = check(root, capsys, "# Title\n<!-- numbers: first -->\n0.9912\n")
    assert code == becomes_old
    if becomes_old:
        assert lines == ["record first: ppo_rlhf.py has changed since. Make it anew: "
                         "python notes/evidence/check_numbers.py --record first "
                         "--depends ppo_rlhf.py -- python ppo_rlhf.py"]


def test_any_other_file_makes_a_record_old_with_every_byte(root, capsys):
    (root / "data.txt").write_text("1\n")
    command = ["--record", "data", "--depends", "data.txt", "--", "python", "ppo_rlhf.py"]
    assert check_numbers.main(command, root) == 0
    page = "# Title\n<!-- numbers: data -->\n0.9912\n"
    assert check(root, capsys, page)[0] == 0
    (root / "data.txt").write_text("1 \n")
    assert check(root, capsys, page)[0] == 1


FAKE = """import pathlib

def main(words):
    out = pathlib.Path(words[-1])
    out.mkdir()
    (out / "metrics.csv").write_text(f"human,seconds\\n{NUMBER},{id(out)}\\n")
    (out / "report.json").write_text('{"seconds": %d}' % id(out))
    (out / "policy").write_bytes(bytes([len(words)]))
"""
FAKE_RUNGS = """RUNGS = "ab"
def train(run, key, number, seed, cycles):
    return {"number": NUMBER, "seconds": id(run)}
"""


def commit_of(root, script, rungs):
    """Write both programs and commit all -> the commit."""
    (root / "ppo_rlhf.py").write_text(script)
    (root / "notes/staircase.py").write_text(rungs)
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in [["init", "-q"], ["add", "-A"], [*name, "commit", "-qm", "a"]]:
        subprocess.run(["git", *words], cwd=root, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("script, rungs, different", [
    ("NUMBER", "NUMBER", []),
    ("7 / 2", "NUMBER", ["default: metrics.csv", "own data: metrics.csv"]),
    ("NUMBER", "7 / 2", ["rung 0", "rung 1"])])
def test_a_record_stays_valid_if_a_new_version_does_the_same(script, rungs, different, tmp_path):
    (tmp_path / "notes/evidence").mkdir(parents=True)
    for name in ["same.py", "record.py"]:
        shutil.copy(HERE / "notes/evidence" / name, tmp_path / "notes/evidence")
    before = "NUMBER = 3\n" + FAKE, "NUMBER = 3\n" + FAKE_RUNGS
    old = commit_of(tmp_path, *before)
    record.write("both", ["true", "notes/staircase.py"], [], None, tmp_path)
    record.write("other", ["true"], ["ppo_rlhf.py", "notes/evidence/record.py"], None, tmp_path)
    commit_of(tmp_path, *("x = 1\n" + text for text in before))  # an older version, and its record
    record.write("older", ["true"], [], None, tmp_path)
    commit_of(tmp_path, "NUMBER = 4 - 1\n" + FAKE.replace("NUMBER", script),
              "NUMBER = 2 + 1\n" + FAKE_RUNGS.replace("NUMBER", rungs))
    texts = {path: path.read_text() for path in (tmp_path / record.FOLDER).iterdir()}
    done = subprocess.run([sys.executable, tmp_path / "notes/evidence/same.py", old],
                          capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("DIFFERENT")]
    assert done.returncode == bool(different), done.stderr
    assert all(any(name in line for line in lines) for name in different)
    assert bool(lines) == bool(different)
    if different:
        assert texts == {path: path.read_text() for path in texts}
    for name in ["both", "other"]:
        assert bool(record.read(name, tmp_path)[1]) == bool(different)
    assert record.read("older", tmp_path)[1]  # it did not hold for the old version
    (tmp_path / "ppo_rlhf.py").write_text("NUMBER = 5\n" + FAKE)
    assert record.read("both", tmp_path)[1]  # one more change


def test_a_record_says_how_it_was_made_and_nothing_of_this_machine_but_its_processor(root):
    program = root / "notes/where.py"
    program.write_text(f"print('0.5 in {root}/runs/a, /home/somebody/x.txt and {sys.executable}')\n"
                       "print('see https://example.org/a/b, a/b, 3/4')\n")
    path = record.write("where", ["python", str(program)], [], None, root)
    text = path.read_text()
    head, _, printed = text.partition("\n\n")
    header = dict(line.split(": ", 1) for line in head.splitlines())
    assert list(header) == record.KEYS and all(header.values())
    assert header["command"] == "python notes/where.py"
    assert header["depends"] == "ppo_rlhf.py notes/where.py"
    assert printed == "0.5 in runs/a, RUN and python\nsee https://example.org/a/b, a/b, 3/4\n"
    assert str(root) not in text and "torch 2" in header["versions"]
    assert re.fullmatch(r".+, \d+ cores", header["machine"])


def test_a_record_can_take_what_was_printed_before(root, capsys):
    saved = root / "output.txt"
    saved.write_text("0.75\n")
    command = ["--record", "long", "--from", str(saved), "--", "python", "ppo_rlhf.py"]
    assert check_numbers.main(command, root) == 0
    assert record.read("long", root) == ("0.75\n", [])
    assert check(root, capsys, "# Title\n<!-- numbers: first, long -->\n0.75 0.99\n") == (0, [])


@pytest.mark.parametrize("words, says", [
    ([], "the command is missing"),
    (["--depends", "nothing.py", "--", "python", "ppo_rlhf.py"], "there is no file nothing.py"),
    (["--", "python", "-c", "exit(3)"], "the command ended with 3")])
def test_a_record_that_cannot_be_made_is_one_line(words, says, root):
    with pytest.raises(SystemExit, match=says):
        check_numbers.main(["--record", "new", *words], root)
    assert not (root / record.FOLDER / "new.txt").exists()


@pytest.mark.parametrize("key", record.KEYS)
def test_a_header_that_lacks_something_is_named(key, root, capsys):
    path = root / record.FOLDER / "first.txt"
    path.write_text(re.sub(rf"^{key}: .*\n", "", path.read_text(), flags=re.MULTILINE))
    code, lines = check(root, capsys, "# Title\n<!-- numbers: first -->\n0.9912\n")
    assert code == 1 and lines == [f"record first: the header lacks '{key}'"]


def test_what_is_shown_and_kept_is_what_was_printed(root):
    assert record.read("first", root) == (PRINTED, [])


# ==================================================================================================
# The real pages
# ==================================================================================================
@slow
def test_every_number_in_the_pages_agrees_with_its_source(capsys):
    assert check_numbers.main([]) == 0, capsys.readouterr().out
    assert len(check_numbers.pages_of(HERE)) > 20
