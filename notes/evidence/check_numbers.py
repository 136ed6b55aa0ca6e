"""Does every number in the pages have a source, and does it agree with it?

    python notes/evidence/check_numbers.py                      # all pages
    python notes/evidence/check_numbers.py README.md            # one page
    python notes/evidence/check_numbers.py --record NAME [--depends FILE ...] -- COMMAND
    python notes/evidence/check_numbers.py --record NAME --from FILE [--depends FILE ...] -- COMMAND

The last two make records/NAME.txt: what COMMAND prints, with date, commit, versions and machine.
With --from, FILE holds what COMMAND has printed already. A record becomes old when one of the files
in --depends computes something else (by default the script and the .py files in COMMAND). If the
change only says the same in another way, same.py can show it, and the record stays valid.

In a page, a comment says where the numbers below it come from:

    <!-- numbers: SOURCE; SOURCE; ... -->

A SOURCE is one of these. What stands in [brackets] may be left out.
    NAME, NAME [+- 0.01]             records; the numbers may differ by 0.01 from them (or by 10%)
    NAME/TITLE, ... [+- 0.01]        only the part of a record below the line TITLE, to the next one
    run: COMMAND                     a quick command, which is repeated now
    page FILE                        another page, which has a source for them
    tests test_NAME ... [NUMBERS]    tests assert them
    arithmetic [NUMBERS] [(WHY)]     they follow from numbers beside them, are settings, or quoted
    no record [NUMBERS], DATE, WHY   measured on that day with an earlier version; the page says so
With NUMBERS, a source explains these. Without, the last three explain all that the others do not.
A comment holds until the next comment or heading. It also holds for sections of lower rank below
it that have none, but without `arithmetic` and without NUMBERS. So a comment above the first
heading holds for the whole page. A section that adds to it begins its own comment with `above;`.

Not checked: whole numbers below 10, dates, versions, seeds, links, headings, quotations (>), code.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import record
from record import agrees, numbers_in

ROOT = Path(__file__).resolve().parents[2]
MONTHS = ("January February March April May June July August September October November "
          "December").split()
NOT_MEASURED = re.compile("|".join([
    r"^ {4}.*", r"^>.*", r"^\s*\d+\. ", r"`[^`\n]*`", r"\$[^$\n]+\$",  # code, quotations, formulas
    r"\]\([^)]*\)", r"https?://\S+", r"</?[a-z][^>\n]*>", r"#\d+",     # links, tags, issues
    rf"\b(?:{'|'.join(MONTHS)}) \d+", r"\d+ 月 \d+ 日", r"\b\d{4}-\d\d-\d\d",  # dates
    r"\b\d+\.\d+\.\d+\b", r"\b(?:Python|torch|transformers|TRL|glibc|et al\.|arXiv) \d[\d.]*",
    r"\b(?:sections?|questions?|exercises?|parts?|step|rungs?|experiments?|cycle|seeds?|appendix"
    r"|FAQ|eq\.) \d[\d.]*(?:(?:, | to | and | or )\d+)*", r'["“]\d\.\d[^"”]*["”]',   # references
    r"(?:第|问题|练习|种子|级) ?\d+(?:[、和]\d+)*"]), re.IGNORECASE)
LOOKED_UP = ["records", "commands", "pages"]
OWN = re.compile(r"arithmetic|(no record|tests.*?) [-+]?\d")  # sources of one section alone
MEASURED = re.compile(
    r"-?\d+\.\d+%?|\d+%|\d+ ?(?:(?:ms|s|seconds?|minutes?|GB|MB|times)\b|秒|分钟)")


# ==================================================================================================
# Pages
# ==================================================================================================
def parts_of(text: str) -> list[tuple[str, str, str]]:
    """A page -> its parts: heading, comment that holds ("" if none), text with numbers to check."""
    text = re.sub(r"<!-- numbers: (.*?) -->",
                  lambda found: "\n\0" + " ".join(found[1].split()) + "\n", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    parts = [["", "", ""]]
    held = {}  # rank of a heading -> the comment below it
    rank, fence, above = 0, "", ""
    for line in text.split("\n"):
        if line.startswith("```"):
            fence = "" if fence else line
        elif fence:
            parts[-1][2] += f"{line}\n" if fence == "```text" else ""
        elif heading := re.match(r"(#+) (.*)", line):
            rank = len(heading[1])
            held = {higher: comment for higher, comment in held.items() if higher < rank}
            sources = [source.strip() for source in held[max(held)].split(";")] if held else []
            above = "; ".join(source for source in sources if not OWN.match(source))
            title = re.sub(r"<[^>]*>|`", "", heading[2]).strip()
            parts.append([title, above, ""])
        elif line.startswith("\0"):
            held[rank] = re.sub(r"^above\b", above or "above", line[1:])
            parts.append([parts[-1][0], held[rank], ""])
        else:
            parts[-1][2] += NOT_MEASURED.sub(" ", line) + "\n"
    return [tuple(part) for part in parts]


def read_source(text: str) -> dict:
    """One source of a comment: its kind, and what belongs to it. Raises ValueError."""
    number = r"[-+]?\d(?:[^ ,;]|,\d)*"
    if found := re.fullmatch(r"run: (.+)", text):
        return {"kind": "repeated", "commands": [found[1]], "numbers": []}
    if found := re.fullmatch(r"page (\S+)", text):
        return {"kind": "another page", "pages": [found[1]], "numbers": []}
    if found := re.fullmatch(rf"arithmetic((?: {number})*)(?: \(.*\))?", text):
        return {"kind": "arithmetic", "numbers": found[1].split()}
    if found := re.fullmatch(rf"tests((?: test_\w+)+)((?: {number})*)", text):
        return {"kind": "tests", "tests": found[1].split(), "numbers": found[2].split()}
    if found := re.fullmatch(rf"no record((?: {number})*), (\d{{4}}-\d\d-\d\d), .+", text):
        return {"kind": f"no record since {found[2]}", "day": found[2], "numbers": found[1].split()}
    name = rf"[\w-]+(?:/{record.TITLE})?"
    if found := re.fullmatch(rf"({name}(?:, {name})*)(?: \+- ([\d.]+%?))?", text):
        return {"kind": "records", "records": found[1].split(", "), "spread": found[2] or "",
                "numbers": []}
    raise ValueError(f"no such source: {text}")


class Checker:
    """Checks pages. `problems` has plain lines, `counts` how many numbers have which source."""

    def __init__(self, root: Path):
        self.root = root
        self.problems = []
        self.counts = Counter()
        self.printed = {}  # record, command or page -> its numbers
        self.tests = ""
        for file in [*root.glob("test_*.py"), *root.glob("notes/evidence/test_*.py")]:
            self.tests += file.read_text(encoding="utf-8")

    def numbers_of(self, kind: str, name: str) -> list[str]:
        """The numbers of a record, of a page, or of what a command prints now; looked up once."""
        if (kind, name) in self.printed:
            return self.printed[kind, name]
        whole_name, problems = name, []
        if kind == "records":
            name, _, title = name.partition("/")
            output, problems = record.read(name, self.root)
            if title and output:
                output = record.part_of(output, title)
                problems += [] if output else [f"record {name} has no part {title}"]
        elif kind == "pages":
            output = ""
            if not (self.root / name).is_file():
                problems = [f"there is no page {name}"]
            else:
                parts = parts_of((self.root / name).read_text(encoding="utf-8"))
                output = "\n".join(visible for _, _, visible in parts)
        else:
            words = [sys.executable if word == "python" else word for word in shlex.split(name)]
            variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
            done = subprocess.run(words, cwd=self.root, env=variables, capture_output=True,
                                  encoding="utf-8")
            output = done.stdout
            if done.returncode:
                problems = [f"`{name}` ended with {done.returncode}"]
        self.problems += [problem for problem in problems if problem not in self.problems]
        self.printed[kind, whole_name] = numbers_in(output, record.PRINTED)
        return self.printed[kind, whole_name]

    def check_page(self, path: Path):
        page = path.read_text(encoding="utf-8")
        for title, comment, visible in parts_of(page):
            place = f'{path.relative_to(self.root).as_posix()}, "{title}"'
            found = MEASURED.search(visible.replace("−", "-"))
            if comment:
                self.check_part(place, comment, visible, page)
            elif found:
                line = visible[visible.rfind("\n", 0, found.start()) + 1:].split("\n")[0]
                self.problems.append(f"{place}: {found[0]}: a number without a source, "
                                     f"in: {line.strip()[:60]}")

    def check_part(self, place: str, comment: str, visible: str, page: str):
        """Check the numbers below a comment."""
        try:
            sources = [read_source(text.strip()) for text in comment.split(";")]
        except ValueError as error:
            self.problems.append(f"{place}: {error}")
            return
        numbers = []
        for number in numbers_in(visible):
            if not re.fullmatch(r"-?\d", number):  # whole numbers below 10 are in every record
                numbers.append(number)
        for source in sources:
            self.check_source(place, source, page)
            for number in source["numbers"]:
                if number not in numbers:
                    self.problems.append(f"{place}: {number}: in the comment, but not in the text")
        for number in numbers:
            kind = self.kind_of(number, sources)
            if kind:
                self.counts[kind] += 1
            else:
                self.problems.append(f"{place}: {number}: not found in: {comment}")

    def check_source(self, place: str, source: dict, page: str):
        """Do record, page or test exist? Does the page say of which day its numbers are?"""
        for kind in LOOKED_UP:
            for name in source.get(kind, []):
                self.numbers_of(kind, name)
        for name in source.get("tests", []):
            if f"def {name}(" not in self.tests:
                self.problems.append(f"{place}: there is no test {name}")
        if "day" in source:
            _, month, day = map(int, source["day"].split("-"))
            shown = " ".join(re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL).split())
            date = f"{MONTHS[month - 1]} {day}"
            if not re.search(rf"{date}\b|{month} 月 {day} 日", shown):
                self.problems.append(f"{place}: the page does not say that numbers are of {date}")

    def kind_of(self, number: str, sources: list[dict]) -> str:
        """The kind of source that a number has; "" if none."""
        for source in sources:
            if number in source["numbers"]:
                return source["kind"]
        for source in sources:
            for kind in LOOKED_UP:
                for name in source.get(kind, []):
                    for printed in self.numbers_of(kind, name):
                        if agrees(number, printed, source.get("spread", "")):
                            return source["kind"]
        for source in sources:
            if source["kind"] not in ["records", "repeated", "another page"]:
                if not source["numbers"]:
                    return source["kind"]
        return ""


def pages_of(root: Path) -> list[Path]:
    notes = root / "notes"
    return [root / "README.md", *sorted(notes.glob("*.md")), *sorted(notes.glob("[a-z]*/*.md"))]


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    """Check pages, or make a record -> the exit code."""
    words = sys.argv[1:] if words is None else words
    command = []
    if "--" in words:
        command = words[words.index("--") + 1:]
        words = words[:words.index("--")]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--depends", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--from", dest="output", type=Path, metavar="FILE")
    args = parser.parse_args(words)
    if args.record:
        path = record.write(args.record, command, args.depends, args.output, root)
        print(f"made {path.relative_to(root).as_posix()}")
        return 0
    checker = Checker(root)
    pages = [page.resolve() for page in args.pages] or pages_of(root)
    for page in pages:
        checker.check_page(page)
    for line in dict.fromkeys(checker.problems):
        print(line)
    print(f"{len(pages)} pages, {sum(checker.counts.values())} numbers with a source:")
    for kind, count in sorted(checker.counts.items()):
        print(f"{count:6} {kind}")
    return 1 if checker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
