"""Records: what a command printed, and with what code, where and when. For check_numbers.py.

A record is the file records/NAME.txt: a header of `key: value` lines, an empty line, the output.
"""
import ast
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

FOLDER = "notes/evidence/records"
DIGITS = r"(?<![A-Za-z0-9_.])(?<![A-Za-z]-)[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?%?"
PRINTED = re.compile(DIGITS)                               # in a record: 2.5s is one too
NUMBER = re.compile(DIGITS + r"(?![A-Za-z0-9_]|\.\d)")     # in a page: 2.13.0 and 3D are none
TITLE = r"[A-Za-z]+(?: \d+)?"  # of a part of a record, in its own line: a word, or word and number
KEYS = ["command", "date", "commit", "versions", "machine", "depends", "code"]


# ==================================================================================================
# What a file computes
# ==================================================================================================
def is_text(statement: ast.AST) -> bool:
    """Is this statement only a text, such as a docstring?"""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)


def shape(node) -> object:
    """A part of a Python program as nested lists, without comments, docstrings and help texts.

    ast.dump is not the same in all versions of Python: some leave empty fields out. So do we.
    """
    if isinstance(node, list):
        return [shape(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    found = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [item for item in value if not is_text(item)]
        if name == "keywords":
            value = [item for item in value if item.arg != "help"]
        if value is not None and value != []:
            found.append([name, shape(value)])
    return found


def code_hash(file: Path) -> str:
    """A short hash of what a file computes. Raises FileNotFoundError, SyntaxError."""
    content = file.read_bytes().replace(b"\r\n", b"\n")
    if file.suffix == ".py":
        content = repr(shape(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()[:10]


# ==================================================================================================
# Writing and reading
# ==================================================================================================
def without_paths(text: str, root: Path) -> str:
    """The text without paths and the name of this machine: relative paths, `python`, or RUN."""
    text = text.replace(sys.executable, "python").replace(f"{root}/", "").replace(str(root), ".")
    text = re.sub(r"(?<![\w.:/~-])/(?!dev/)[\w.+-]+(?:/[\w.+-]+)+/?", "RUN", text)
    if platform.node():
        text = re.sub(rf"\b{re.escape(platform.node())}\b", "HOST", text)
    return text


def machine() -> str:
    """The name of the processor, and the number of cores."""
    name = platform.machine()
    file = Path("/proc/cpuinfo")
    if file.exists() and (found := re.search(r"model name\s*: (.*)", file.read_text())):
        name = found[1]
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ["torch", "transformers", "numpy"]:
        found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def commit(root: Path, files: list[str]) -> str:
    """The commit, and whether one of the files has changed since."""
    options = {"cwd": root, "capture_output": True, "text": True}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options).stdout.strip()
    changes = subprocess.run(["git", "status", "--porcelain", "--", *files], **options).stdout
    return (head or "none") + (" and changes" if changes else "")


def files_of(command: list[str], root: Path) -> list[str]:
    """The script, and the Python files that a command names."""
    files = ["ppo_rlhf.py"]
    for file in re.findall(r"[\w./-]+\.py\b", " ".join(command).replace(f"{root}/", "")):
        if file not in files and (root / file).is_file():
            files.append(file)
    return files


def run(command: list[str], root: Path) -> str:
    """Run a command and show what it prints -> what it printed. Raises SystemExit if it fails."""
    words = [sys.executable if word == "python" else word for word in command]
    printed = ""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE,
                          encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            printed += line
    if process.returncode:
        raise SystemExit(f"error: the command ended with {process.returncode}; no record is made")
    return printed


def write(name: str, command: list[str], depends: list[str], output: Path | None,
          root: Path) -> Path:
    """Run a command, or take what it printed from a file -> its record. Raises SystemExit."""
    if not command:
        raise SystemExit("error: the command is missing; write it at the end, behind --")
    depends = depends or files_of(command, root)
    for file in depends:
        if not (root / file).is_file():
            raise SystemExit(f"error: there is no file {file}")
    hashes = [code_hash(root / file) for file in depends]  # before the run, which may take hours
    at = commit(root, depends)
    day = datetime.date.today()
    if output is None:
        printed = run(command, root)
    else:
        printed = output.read_text(encoding="utf-8")
        day = datetime.date.fromtimestamp(output.stat().st_mtime)
    values = [shlex.join(command), str(day), at, versions(), machine(), " ".join(depends),
              " ".join(hashes)]
    header = ""
    for key, value in zip(KEYS, values):
        header += f"{key}: {value}\n"
    path = root / FOLDER / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(without_paths(f"{header}\n{printed}", root), encoding="utf-8")
    return path


def parse(text: str) -> tuple[dict[str, str], str]:
    """A record -> its header, and what the command printed."""
    head, _, printed = text.partition("\n\n")
    header = {}
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        header[key] = value
    return header, printed


def valid_hashes(header: dict[str, str]) -> dict[str, str]:
    """File -> the hash that it must have: that of the run, or a later one from the line `same`.

    `same: DATE COMMIT FILE HASH ...` was written by same.py: FILE with HASH did the same as before.
    """
    hashes = dict(zip(header["depends"].split(), header["code"].split()))
    words = header.get("same", "").split()[2:]
    hashes.update(zip(words[::2], words[1::2]))
    return hashes


def mark_same(path: Path, before: dict[str, str], now: dict[str, str], found: str) -> bool:
    """Let a record hold for the hashes `now` if it held for those `before`. found: date, commit."""
    text = path.read_text(encoding="utf-8")
    header, printed = parse(text)
    hashes = valid_hashes(header)
    changed = {file: now[file] for file in hashes if file in now and hashes[file] == before[file]}
    if not any(hashes[file] != changed[file] for file in changed):
        return False
    hashes.update(changed)
    header["same"] = found
    for file in now:
        if file in hashes:
            header["same"] += f" {file} {hashes[file]}"
    head = "".join(f"{key}: {value}\n" for key, value in header.items())
    path.write_text(f"{head}\n{printed}", encoding="utf-8")
    return True


def read(name: str, root: Path) -> tuple[str, list[str]]:
    """A record's name -> what the command printed, and what is wrong with the record."""
    path = root / FOLDER / f"{name}.txt"
    if not path.exists():
        return "", [f"there is no record {name}: make it with --record {name} -- COMMAND"]
    header, printed = parse(path.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if not header.get(key)]
    if missing:
        return printed, [f"record {name}: the header lacks '{missing[0]}'"]
    problems = []
    files, hashes = header["depends"].split(), header["code"].split()
    if len(files) != len(hashes):
        return printed, [f"record {name}: 'depends' and 'code' have not the same length"]
    for file, old in valid_hashes(header).items():
        if not (root / file).is_file() or code_hash(root / file) != old:
            problems.append(
                f"record {name}: {file} has changed since. Make it anew: python notes/evidence/"
                f"check_numbers.py --record {name} --depends {header['depends']} "
                f"-- {header['command']}")
    return printed, problems


def part_of(printed: str, title: str) -> str:
    """What a record has from the line `title` on, up to the next title; "" if it is missing."""
    part, inside = "", False
    before = ""
    for line in printed.splitlines():
        if before == "" and re.fullmatch(TITLE, line):
            inside = line == title
        if inside:
            part += line + "\n"
        before = line
    return part


# ==================================================================================================
# Numbers of a page and numbers that were printed
# ==================================================================================================
def numbers_in(text: str, pattern=NUMBER) -> list[str]:
    found = pattern.findall(text.replace("−", "-"))
    return [number.removeprefix("+") for number in found]


def value(number: str) -> float:
    return float(number.replace(",", "").rstrip("%"))


def rounding(number: str) -> float:
    """Half of the last digit that is printed: 0.005 for 0.99."""
    digits, _, power = number.rstrip("%").partition("e")
    places = len(digits.partition(".")[2])
    return 0.5 * 10.0 ** (int(power or 0) - places)


def agrees(number: str, printed: str, spread: str = "") -> bool:
    """Is a number of a page one that was printed? 99.1% may be printed as 0.9912, 99.1% or 99.1."""
    shown, percent = value(number), number.endswith("%")
    allowed = rounding(number)
    if spread.endswith("%"):
        allowed = max(allowed, abs(shown) * value(spread) / 100)
    elif spread:
        allowed = max(allowed, value(spread) * (100 if percent else 1))
    candidates = [value(printed)]
    if percent and not printed.endswith("%"):
        candidates.append(value(printed) * 100)
    if not percent and printed.endswith("%"):
        candidates = [value(printed) / 100]
    return any(abs(shown - candidate) <= allowed + 1e-9 for candidate in candidates)
