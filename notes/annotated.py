"""The script as a page to read: text on the left, code on the right, as in an annotated paper.

    python notes/annotated.py                      # after a change of the script
    python notes/annotated.py --out FOLDER

It writes annotated.html and annotated.zh.html, which lie beside this program, so that one can open
them at once and the guides can link to them. Each is one file that needs no network. The text is
made of the docstrings and comments of ppo_rlhf.py. The code is the script's own, line by line, with
its line numbers. Every function and class has an anchor with its name, such as #gae, and every id
of the articles has one too, such as #S5.

The Chinese texts are in notes/annotated.zh.md, each below the English passage that it translates.
A passage without a translation appears in English. To mend a translation after a change of the
script, run `pytest notes/evidence/test_annotated.py`: it prints the passages that have none.
"""
import argparse
import ast
import builtins
import html
import io
import keyword
import os
import re
import textwrap
import tokenize
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "ppo_rlhf.py"
TRANSLATIONS = HERE / "annotated.zh.md"
GUIDES = {"en": HERE / "guide.md", "zh": HERE / "guide.zh.md"}
PAGES = {"en": "annotated.html", "zh": "annotated.zh.html"}

# What the pages say themselves.
WORDS = {
    "en": {
        "title": "ppo_rlhf.py, annotated",
        "intro": "Text on the left, code on the right. The numbers are lines of ppo_rlhf.py. "
                 "An id such as S2 leads to the [list of ids](#ids) at the end. A name that is "
                 "underlined leads to the function.",
        "contents": "Contents",
        "other": "中文",
        "ids": "The ids of the articles",
        "ids_intro": "The table is that of the [guide]({guide}), which has tests and experiments "
                     "too. The first column leads to the place in this page.",
        "id": "id",
        "what": "what the articles ask for",
        "where": "in the script",
        "line": "line {}"},
    "zh": {
        "title": "ppo_rlhf.py 注释版",
        "intro": "左边是文字，右边是代码。数字是 ppo_rlhf.py 的行号。"
                 "S2 这样的编号通向文末的[编号表](#ids)；带下划线的名字通向那个函数。"
                 "第 I 部分全部译出；II、III 两部分没有译文的地方，保留英文。",
        "contents": "目录",
        "other": "English",
        "ids": "文章的编号",
        "ids_intro": "这张表来自[导读]({guide})，那里还列出了测试和实验。点第一列，跳到本页中的位置。",
        "id": "编号",
        "what": "内容",
        "where": "脚本",
        "line": "第 {} 行"}}


# ==================================================================================================
# 1  The script, cut into headings, texts and code
# ==================================================================================================
class Heading(NamedTuple):
    """A banner of the script."""

    level: int        # 1 a part, 2 a section, 3 a piece of a section
    anchor: str
    title: str
    text: str         # the lines below the title
    line: int


class Row(NamedTuple):
    """A piece of text and the code beside it."""

    name: str         # of the function or class that begins here, or ""
    texts: list[str]  # comments and docstring
    helps: list[str]  # help texts of flags: the code shows them, so only translations appear
    notes: dict[int, str]  # line -> the comment at its end
    lines: list[int]  # of the code


class Passage(NamedTuple):
    """What is translated as a whole: a paragraph, a title, or a comment at the end of a line."""

    part: str
    line: int
    english: str


def tokens_of(source: str) -> list:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def with_bodies(tree):
    """All functions and classes, each with its full name, such as "ActorCritic.forward"."""
    found = []

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.append((prefix + child.name, child))
                walk(child, prefix + child.name + ".")
            else:
                walk(child, prefix)

    walk(tree, "")
    return found


def constants(tree) -> dict[str, int]:
    """Names in capitals that the script assigns at its top level -> the line where it does."""
    found = {}
    for node in tree.body:
        for target in getattr(node, "targets", []):
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and name.id.isupper():
                    found.setdefault(name.id, node.lineno)
    return found


class Script:
    """ppo_rlhf.py, or a text like it, as a list of `pieces`: headings and rows in its order."""

    def __init__(self, source: str):
        self.lines = source.split("\n")
        self.tree = ast.parse(source)
        self.tokens = tokens_of(source)
        self.defined = dict(with_bodies(self.tree))
        self.constants = constants(self.tree)
        self.docstrings = self.find_docstrings()
        self.comments, self.line_ends = self.find_comments()
        self.helps = self.find_helps()
        self.head = ""
        self.pieces = []
        self.cut()

    def find_docstrings(self) -> dict[int, tuple[int, str]]:
        """First line -> last line, text."""
        found = {}
        for node in [self.tree, *self.defined.values()]:
            text = ast.get_docstring(node)
            if text is not None:
                place = node.body[0]
                found[place.lineno] = (place.end_lineno, text)
        return found

    def find_comments(self) -> tuple[dict[int, tuple[int, str]], dict[int, str]]:
        """Comments that have lines of their own: first line -> last line, text. Those at the end of
        a line: line -> text. The line that names the interpreter is none of either."""
        blocks, ends = {}, {}
        first, last, column = 0, -1, 0
        for token in self.tokens:
            line, start = token.start
            if token.type != tokenize.COMMENT or token.string.startswith("#!"):
                continue
            if self.lines[line - 1][:start].strip():
                ends[line] = token.string
                continue
            text = token.string[1:]
            if line == last + 1 and start == column:
                blocks[first] = (line, blocks[first][1] + "\n" + text)
            else:
                first, column = line, start
                blocks[first] = (line, text)
            last = line
        for first, (last, text) in blocks.items():
            blocks[first] = (last, text.removeprefix("\n"))
        return blocks, ends

    def find_helps(self) -> dict[int, tuple[str, str]]:
        """First line of a flag in a config class -> its name, its help."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                for word in node.value.keywords:
                    if word.arg == "help" and isinstance(word.value, ast.Constant):
                        found[node.lineno] = (node.target.id, word.value.value)
        return found

    def first_lines(self) -> dict[int, str]:
        """The first line of each function and class, decorators included -> its full name."""
        found = {}
        for name, node in self.defined.items():
            decorators = [decorator.lineno for decorator in node.decorator_list]
            found[min([node.lineno, *decorators])] = name
        return found

    def cut(self):
        begins = self.first_lines()
        number = 1
        self.counts = [0, 0]  # of sections and of their pieces, for the anchors
        self.new_row()
        if ast.get_docstring(self.tree):  # the head of the file has a place of its own
            last, self.head = self.docstrings[min(self.docstrings)]
            number = last + 1
        while number <= len(self.lines):
            if number in self.comments:
                last, text = self.comments[number]
                if text.startswith((" ====", " ----")):
                    self.pieces.append(self.heading(number, text))
                    self.new_row()
                else:
                    self.new_row()
                    self.row.texts.append(textwrap.dedent(text))
                number = last + 1
                continue
            if number in self.docstrings:
                last, text = self.docstrings[number]
                self.row.texts.append(text)
                number = last + 1
                if not self.lines[last].strip():  # it divided the docstring from the code
                    number += 1
                continue
            if number in begins and (self.has_docstring(begins[number]) or self.is_top(number)):
                self.new_row(begins[number])
            elif self.is_top(number) and not any(self.lines[number - 3:number - 1]):
                self.new_row()  # what follows two blank lines is no longer the function's
            if number in self.helps:
                self.new_row()
                self.row.helps.append(self.helps[number][1])
            if number in self.line_ends and is_sentence(self.line_ends[number]):
                self.row.notes[number] = without_shapes(self.line_ends[number])
            if not self.lines[number - 1].startswith("#!"):
                self.row.lines.append(number)
            number += 1
        self.drop_blank_lines()

    def has_docstring(self, name: str) -> bool:
        return ast.get_docstring(self.defined[name]) is not None

    def is_top(self, number: int) -> bool:
        return not self.lines[number - 1].startswith(" ")

    def new_row(self, name: str = ""):
        """Begin a row. A comment just above a function shares the function's row."""
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, Row) and not any(self.lines[i - 1].strip() for i in last.lines):
            self.pieces.pop()
            self.row = last._replace(name=last.name or name, lines=[])
        else:
            self.row = Row(name, [], [], {}, [])
        self.pieces.append(self.row)

    def heading(self, number: int, text: str) -> Heading:
        """`text` is a whole banner, with its rules of = or -."""
        first, *below = text.split("\n")
        if first.startswith(" ----"):
            self.counts[1] += 1
            title = first.strip(" -")
            anchor = f"section-{self.counts[0]}-{self.counts[1]}"
            return Heading(3, anchor, title, textwrap.dedent("\n".join(below)), number)
        lines = [line for line in below if not line.startswith(" ====")]
        title, text = lines[0].strip(), textwrap.dedent("\n".join(lines[1:])).strip("\n")
        name = title.split()[0]
        if not name.isdigit():
            return Heading(1, f"part-{name}", title, text, number)
        self.counts = [int(name), 0]
        return Heading(2, f"section-{name}", title, text, number)

    def drop_blank_lines(self):
        """Remove blank lines at both ends of each row, and rows without anything."""
        pieces = []
        for piece in self.pieces:
            if isinstance(piece, Row):
                lines = piece.lines
                while lines and not self.lines[lines[0] - 1].strip():
                    lines.pop(0)
                while lines and not self.lines[lines[-1] - 1].strip():
                    lines.pop()
                if not lines and not piece.texts:
                    continue
            pieces.append(piece)
        self.pieces = pieces

    def passages(self) -> list[Passage]:
        """All that can be translated, in order."""
        found = [Passage("I", 1, text) for text in paragraphs(self.head)]
        part = "I"
        for piece in self.pieces:
            if isinstance(piece, Heading):
                if piece.level == 1:
                    part = piece.title.split()[0]
                texts, line = [piece.title, *paragraphs(piece.text)], piece.line
            else:
                texts, line = [], (piece.lines or [0])[0]
                for text in piece.texts:
                    texts += paragraphs(text)
                texts += [*piece.helps, *piece.notes.values()]
            found += [Passage(part, line, text) for text in texts]
        return found


SHAPE = r"\[(?:[A-Z0-9,+]|width|pairs|prompts)+\]"


def without_shapes(comment: str) -> str:
    """'# which replies have no EOS yet       # [B]' -> 'which replies have no EOS yet'"""
    pieces = re.split(r"\s*#\s*", comment)
    pieces = [re.sub(rf"^(both )?(\s*{SHAPE})+|(\s*{SHAPE})+$", "", piece) for piece in pieces]
    return " ".join(" ".join(pieces).split())


def is_sentence(comment: str) -> bool:
    """Does a comment at the end of a line say more than a shape, a symbol or a step's number?"""
    words = re.findall(r"(?<![\w(])[a-z]{2,}\b(?!\()", without_shapes(comment))
    return len([word for word in words if word not in ("log", "pi", "steps", "to")]) >= 2


# ==================================================================================================
# 2  Paragraphs: prose, formulas and small tables
# ==================================================================================================
def paragraphs(text: str) -> list[str]:
    """Pieces between blank lines, with their own line breaks."""
    return [piece.strip("\n") for piece in re.split(r"\n[ \t]*\n", text) if piece.strip()]


GAP = r"(?<![<>=])\s{2,}(?![=\s])"  # between two columns; not the space that aligns an = sign


def is_display(line: str) -> bool:
    """Lines that keep their own line: indented ones, and those with a wide gap in them."""
    return line.startswith("  ") or bool(re.search(r"\S\s{3,}(?!=)\S", line))


def is_formula(line: str) -> bool:
    """A line that is one formula, such as a_t ~ pi(. | s_t) = softmax(logits / temperature)."""
    formula = re.split(GAP, line.strip())[0]
    sign = re.search(r"(?:^|\s)= ", formula)
    is_sentence = re.search(r"[.:,。：，]$|。|, [a-z]{2,} ", formula)
    return bool(sign) and sign.start() <= 28 and not is_sentence


def runs(paragraph: str) -> list[tuple[str, list[str]]]:
    """A paragraph in pieces: ("prose", lines), ("formula", lines), ("table", lines) or ("code", lines)."""
    lines = paragraph.split("\n")
    shown = [is_display(line) for line in lines]
    if all(show or is_formula(line) for show, line in zip(shown, lines)):
        shown = [True] * len(lines)
    found = []
    for show, line in zip(shown, lines):
        if found and (found[-1][0] != "prose") == show:
            found[-1][1].append(line)
        else:
            found.append(("display" if show else "prose", [line]))
    result = []
    for kind, lines in found:
        if kind == "display":
            kind = "formula" if any(is_formula(line) for line in lines) else "table"
            if kind == "formula" and not is_formula(lines[0]):
                kind = "table"
            if any(line.startswith("    return ") for line in lines):
                kind = "code"
        result.append((kind, lines))
    return result


def cells(line: str) -> list[tuple[int, str]]:
    """The columns of a line of a table: where each begins, and its text."""
    found, start = [], len(line) - len(line.lstrip())
    for gap in [*re.finditer(GAP, line), None]:
        end = gap.start() if gap else len(line)
        if line[start:end].strip():
            found.append((start, line[start:end].strip()))
        start = gap.end() if gap else start
    return found


def table(lines: list[str]) -> list[list[str]]:
    """Lines with aligned columns -> rows of cells. A line with one cell goes on with the last."""
    rows = [cells(line) for line in lines]
    starts = sorted({start for row in rows for start, _ in row})
    if len(starts) > 1:
        for i, line in enumerate(lines):  # a first cell so long that only one space follows
            second = starts[1]
            if len(rows[i]) == 1 and rows[i][0][0] == starts[0] and line[second - 1:second] == " ":
                rows[i] = [(starts[0], line[:second].strip()), (second, line[second:].strip())]
    filled = []
    for row in rows:
        if filled and len(row) == 1 and row[0][0] > starts[0]:
            place = starts.index(row[0][0])
            if filled[-1][place]:
                filled[-1][place] = filled[-1][place] + " " + row[0][1]
                continue
        places = [""] * len(starts)
        for start, text in row:
            places[starts.index(start)] = text
        filled.append(places)
    return filled


def translated_table(lines: list[str], english: list[list[str]]) -> list[list[str]]:
    """The rows of a translation, whose columns are not aligned: its cells take the places of the
    English ones."""
    rows = []
    for line, row in zip(lines, english):
        texts = iter([text for _, text in cells(line)])
        rows.append([next(texts, "") if text else "" for text in row])
    return rows


def without_wraps(lines: list[str]) -> list[str]:
    """English lines joined where the next word did not fit. Where it did, the end was meant."""
    result = [lines[0].strip()]
    for before, line in zip(lines, lines[1:]):
        if len(before) + len(line.split()[0]) < 80:
            result.append(line.strip())
        else:
            result[-1] += " " + line.strip()
    return result


# ==================================================================================================
# 3  Formulas
# ==================================================================================================
GREEK = {
    "beta": "β",
    "gamma": "γ",
    "lambda": "λ",
    "delta": "δ",
    "rho": "ρ",
    "pi": "π",
    "epsilon": "ε"}

# Names with a subscript that are symbols. All others, such as clip_eps, are names in the code.
LATIN = ("s_t a_t r_t r_T r_RM A_t G_t s_i s_j z_a pi_v points_i points_j c_V c_ent C_V C_clip "
         "C_ent k_kl E_pi E_ref Ψ_t").split()

SYMBOL = "|".join([
    r"(?P<over>(?:mean|sum) over [tkv] of)(?= )",
    r"(?P<product>gamma\*lambda)(?!\w)",
    r"(?P<star>(?:pi|J)\*)(?![\w*])",
    rf"(?P<greek>(?:{'|'.join(GREEK)})(?:_old|_ref|_t|_v|_\{{[^}}]*\}})?)(?![\w*.]\w|\w)",
    rf"(?P<latin>(?:{'|'.join(sorted(LATIN, key=len, reverse=True))}|[A-Za-z]_\{{[^}}]*\}}))(?!\w)",
    r"(?P<half>1/2)(?= \*)",
    r"(?P<one>1[+-]eps)(?!\w)"])  # the clip's epsilon; Adam's eps stays as it is

SYMBOL_KINDS = ["over", "product", "star", "greek", "latin", "half", "one"]

# Signs, longest first. Those between spaces are operators there and nothing else.
SIGNS = {
    "->": "→",
    "<=": "≤",
    ">=": "≥",
    "||": "∥",
    "+-": "±",
    " * ": " · ",
    " - ": " − "}


def subscripted(symbol: str) -> str:
    """pi_old -> π with a subscript, as HTML."""
    base, _, below = symbol.partition("_")
    below = below.strip("{}")
    below = GREEK.get(below, below)
    text = f"<i>{GREEK.get(base, base)}</i>"
    if below:
        text += f"<sub>{html.escape(below)}</sub>"
    return text


def typeset(match) -> str:
    """A match of SYMBOL as HTML."""
    text = match["symbol"]
    [kind] = [kind for kind in SYMBOL_KINDS if match[kind] is not None]
    if kind == "over":
        word, _, index, _ = text.split()
        return f"{'∑' if word == 'sum' else 'mean'}<sub>{index}</sub>"
    if kind == "product":
        return "<i>γλ</i>"
    if kind == "star":
        return f"<i>{GREEK.get(text[:-1], text[:-1])}</i><sup>∗</sup>"
    if kind == "half":
        return "½"
    if kind == "one":
        return "1+<i>ε</i>" if "+" in text else "1−<i>ε</i>"
    return subscripted(text)


def signs(text: str) -> str:
    """Plain text -> HTML, with mathematical signs and exponents."""
    for plain, sign in SIGNS.items():
        text = text.replace(plain, sign)
    text = re.sub(r"(?<![A-Za-z\-])-(?=[\w(]|$)", "−", text, flags=re.ASCII)
    text = html.escape(text, quote=False)
    text = re.sub(r"\)_(\w)\b", r")<sub>\1</sub>", text, flags=re.ASCII)
    return re.sub(r"\^(\w)", r"<sup>\1</sup>", text, flags=re.ASCII)


# ==================================================================================================
# 4  Text and code as HTML
# ==================================================================================================
# Names of files, names.with.dots and names_with_underscores, which are set as code even without
# backticks.
WORD = r"\w+\.(?:py|csv|jsonl?)|(?:cfg|rollout|torch)\.\w+|[a-z]+(?:_[a-z0-9]+)+"

# What is marked in a text: the names of groups in Page.inline.
KINDS = ["code", "label", "file", "id", "flag", "shape", "tiny", "name", "symbol", "word"]


class Page:
    """One page in one language. `out`: the folder that it goes to, for links to the notes."""

    def __init__(self, script: Script, language: str, out: Path):
        self.script = script
        self.language = language
        self.words = WORDS[language]
        self.out = out
        self.translations = read_translations() if language == "zh" else {}
        self.ids = ids_of_guide(GUIDES[language])
        self.names = {**script.defined, **script.constants}
        long = [name for name in script.defined if "_" in name and "." not in name]
        self.inline = re.compile("|".join([
            r"`(?P<code>[^`]+)`",
            r"\[(?P<label>[^\]]+)\]\((?P<target>[^)]+)\)",
            r"(?P<file>notes/[\w/]+\.(?:md|py))",
            rf"(?P<id>\b(?:{'|'.join(self.ids)})\b)",
            r"(?P<flag>(?<![\w-])--[a-z][\w-]+)",
            rf"(?P<shape>{SHAPE})",
            r"(?P<tiny>(?<![\w.])\d+e-\d+)",
            rf"(?P<name>(?<![\w./])(?:{'|'.join(sorted(long, key=len, reverse=True))})(?!\w))",
            rf"(?P<symbol>(?<![\w./])(?:{SYMBOL}))",
            rf"(?P<word>(?<![\w./])(?:{WORD})(?![\w(]|\.\w))"]), re.ASCII)
        self.anchored = set()  # ids whose anchor is on the page already
        self.in_texts = self.ids_in_texts()

    def ids_in_texts(self) -> set[str]:
        """The ids that a title, a docstring or a comment names, apart from the head of the file."""
        texts = []
        for piece in self.script.pieces:
            texts += [piece.title, piece.text] if isinstance(piece, Heading) else piece.texts
        return set(re.findall(r"\b[SLTNPR]\d+\b", " ".join(texts)))

    # ---- Links -----------------------------------------------------------------------------------
    def link(self, name: str, text: str) -> str:
        """The name of a function, a class or a constant, as a link to its anchor."""
        name = name.removesuffix("()")
        if name in self.names:
            return f'<a href="#{name}">{text}</a>'
        return text

    def path_to(self, file: Path) -> str:
        """The way from the page to a file of the repository."""
        return Path(os.path.relpath(file, self.out)).as_posix()

    def id_link(self, name: str, place: str) -> str:
        """An article id, as a link to the list at the end.

        The first one in the texts is the anchor. An id that no text names has its anchor in the
        code. `place`: "text", "code" or, where no anchor may be, "".
        """
        anchor = ""
        if name not in self.anchored and (
                place == "text" or place == "code" and name not in self.in_texts):
            self.anchored.add(name)
            anchor = f' id="{name}"'
        title = html.escape(re.sub(r"[`*]", "", self.ids[name][0]))
        return f'<a class="id"{anchor} href="#id-{name}" title="{title}">{name}</a>'

    # ---- Text ------------------------------------------------------------------------------------
    def prose(self, text: str, place: str = "text") -> str:
        """One paragraph, or a cell of a table, as HTML."""
        result, end = "", 0
        for match in self.inline.finditer(text):
            result += signs(text[end:match.start()])
            end = match.end()
            kind = [name for name in KINDS if match[name] is not None][0]
            found = match[kind]
            if kind == "code":
                keep = ' class="keep"' if re.fullmatch("--[a-z_]+", found) else ""
                escaped = html.escape(found, quote=False)
                result += f"<code{keep}>{self.link(found, escaped)}</code>"
            elif kind == "label":
                result += f'<a href="{html.escape(match["target"])}">{html.escape(found)}</a>'
            elif kind == "file":
                file = HERE.parent / found
                own = file.with_suffix(f".{self.language[:2]}.md")
                path = html.escape(self.path_to(own if own.exists() else file))
                result += f'<a href="{path}">{found}</a>'
            elif kind == "id":
                result += self.id_link(found, place)
            elif kind == "tiny":
                result += f'<span class="keep">{found}</span>'
            elif kind == "flag":
                result += f'<code class="keep">{found}</code>'
            elif kind == "word":
                result += f"<code>{found}</code>"
            elif kind == "shape":
                result += f'<span class="shape">{found}</span>'
            elif kind == "name":
                result += f"<code>{self.link(found, found)}</code>"
            else:
                result += typeset(match)
        return result + signs(text[end:])

    def cell(self, text: str, place: str) -> str:
        """A cell. One that only names functions links to them; a command is set as code."""
        if text.startswith(("python ", "torchrun ")):
            return f"<code>{html.escape(text, quote=False)}</code>"
        names = re.fullmatch(r"((?:[A-Za-z_.]+, )*[A-Za-z_.]+)( \.\.\.)?", text)
        if names and all(name in self.names for name in names[1].split(", ")):
            links = [f"<code>{self.link(name, name)}</code>" for name in names[1].split(", ")]
            return ", ".join(links) + (names[2] or "")
        if re.fullmatch(r"[a-z_]+( [+*-] [a-z_]+)+", text):  # a formula of names
            parts = re.split("( [+*-] )", text)
            parts[::2] = [f"<code>{self.link(name, name)}</code>" for name in parts[::2]]
            parts[1::2] = [signs(sign) for sign in parts[1::2]]
            return "".join(parts)
        attribute = re.fullmatch(r"([A-Za-z_]+)(\.\w+|\(\w+\))", text)
        if attribute and attribute[1] in self.names:
            return f"<code>{self.link(attribute[1], attribute[1])}{attribute[2]}</code>"
        return self.prose(text.removeprefix("# "), place)

    def formula(self, line: str, place: str) -> str:
        """A row of a table: left side, right side and a remark."""
        formula, *remarks = re.split(GAP, line.strip())
        formula = " ".join(formula.split())
        left, right = "", formula
        if formula.startswith("= "):
            pass
        elif " = " in formula:
            left, _, right = formula.partition(" = ")
            right = "= " + right
        remark = "".join(f' <span class="remark">{self.prose(text, place)}</span>'
                         for text in remarks)
        return (f'<tr><td class="left">{self.prose(left, place)}</td>'
                f'<td><span class="right">{self.prose(right, place)}</span>{remark}</td></tr>')

    def paragraph(self, english: str, place: str = "text") -> str:
        """A paragraph of the script, translated if this page is Chinese."""
        text = self.translations.get(key(english), english)
        language = ' lang="en"' if self.language != "en" and text == english else ""
        tables = [table(lines) for kind, lines in runs(english) if kind == "table"]
        result = ""
        for kind, lines in runs(text):
            if kind == "prose":
                lines = without_wraps(lines) if text == english else lines
                lines = [self.prose(line, place) for line in lines]
                result += f"<p{language}>{'<br/>'.join(lines)}</p>\n"
            elif kind == "formula":
                rows = "\n".join(self.formula(line, place) for line in lines)
                result += f'<table class="formula"{language}>\n{rows}\n</table>\n'
            elif kind == "code":
                block = html.escape(textwrap.dedent("\n".join(lines)), quote=False)
                result += f'<pre class="sample">{block}</pre>\n'
            else:
                rows = tables.pop(0)
                if text != english:
                    rows = translated_table(lines, rows)
                result += self.table(rows, language, place)
        return result

    def table(self, rows: list[list[str]], language: str, place: str) -> str:
        many = " many" if len(rows[0]) > 3 else ""
        result = f'<table class="plain{many}"{language}>\n'
        for row in rows:
            row = "".join(f"<td>{self.cell(text, place)}</td>" for text in row)
            result += f"<tr>{row}</tr>\n"
        return result + "</table>\n"

    # ---- Code ------------------------------------------------------------------------------------
    def code_spans(self) -> dict[int, list[tuple[int, int, str]]]:
        """Line -> pieces of it that are coloured: first column, last column, kind."""
        spans = {}
        tokens = self.script.tokens
        for i, token in enumerate(tokens):
            kind = self.kind_of(token, tokens[i - 1], tokens[min(i + 1, len(tokens) - 1)])
            if not kind:
                continue
            (first, start), (last, end) = token.start, token.end
            for line in range(first, last + 1):
                a = start if line == first else 0
                b = end if line == last else len(self.script.lines[line - 1])
                spans.setdefault(line, []).append((a, b, kind))
        return spans

    def kind_of(self, token, before, after) -> str:
        """How a token is coloured: the name of a CSS class, or "link"."""
        name = tokenize.tok_name[token.type]
        if name == "STRING" or name.startswith("FSTRING"):
            return "s"
        if name == "COMMENT":
            return "c"
        if name == "NUMBER":
            return "n"
        if name != "NAME":
            return "d" if token.string == "@" and not token.line[:token.start[1]].strip() else ""
        if before.string in ("def", "class"):
            return "f"
        if keyword.iskeyword(token.string):
            return "k"
        line, start = token.start
        before_it = token.line[:start]
        if self.script.constants.get(token.string) == line and re.fullmatch("[A-Z_, ]*", before_it):
            return "constant"
        attribute = before.string == "."
        if token.string in self.names and not attribute and after.string != "=":
            plain = "_" not in token.string and token.string.islower()
            return "link" if not plain or after.string == "(" else ""
        if hasattr(builtins, token.string) and not attribute and after.string == "(":
            return "b"
        return ""

    def code_line(self, number: int, spans: dict) -> str:
        """One line of code, verbatim but for colours and links."""
        text = self.script.lines[number - 1]
        result, end = "", 0
        for start, stop, kind in sorted(spans.get(number, [])):
            start = max(start, end)  # in Python 3.12, {{ in an f-string is counted twice
            result += html.escape(text[end:start], quote=False)
            piece = html.escape(text[start:stop], quote=False)
            if kind == "link":
                result += f'<a href="#{text[start:stop]}">{piece}</a>'
            elif kind == "constant":
                result += f'<span id="{piece}">{piece}</span>'
            elif kind in "cs":
                result += f'<span class="{kind}">{self.with_ids(piece)}</span>'
            elif kind == "f":
                result += f'<span class="f"{self.inline_anchor(number)}>{piece}</span>'
            else:
                result += f'<span class="{kind}">{piece}</span>'
            end = stop
        result += html.escape(text[end:], quote=False)
        return f'<span class="l" data-n="{number}">{result}</span>'

    def with_ids(self, piece: str) -> str:
        """Links for the article ids in a comment or a help text: those in brackets, as (S4, T2)."""
        def link(match):
            return self.id_link(match[0], "code") if match[0] in self.ids else match[0]

        def links(match):
            return re.sub(r"\b[A-Z]\d+\b", link, match[0])

        return re.sub(r"\([A-Z]\d+(, [A-Z]\d+)*\)", links, piece)

    def inline_anchor(self, number: int) -> str:
        """The anchor of a function that begins no row of its own."""
        for name, node in self.script.defined.items():
            if node.lineno == number and name not in self.row_names:
                return f' id="{name}"'
        return ""

    # ---- The whole page --------------------------------------------------------------------------
    def title(self, heading: Heading) -> str:
        return self.translations.get(key(heading.title), heading.title)

    def row(self, row: Row, spans: dict) -> str:
        text = ""
        if row.name:
            text += f'<h4 id="{row.name}"><a href="#{row.name}">{row.name}</a></h4>\n'
        for passage in row.texts:
            text += "".join(self.paragraph(paragraph) for paragraph in paragraphs(passage))
        for passage in row.helps:
            if key(passage) in self.translations:
                text += self.paragraph(passage, "code")
        notes = ""
        for number, note in row.notes.items():
            if key(note) in self.translations:
                note = self.prose(self.translations[key(note)], "code")
                label = self.words["line"].format(number)
                notes += f"<li><span>{label}</span> {note}</li>\n"
        if notes:
            text += f'<ul class="notes">\n{notes}</ul>\n'
        code = ""
        for number in row.lines:
            code += self.code_line(number, spans) + "\n"
        empty = "" if text else " empty"
        return (f'<div class="row">\n<div class="text{empty}">\n<div>\n{text}</div>\n</div>\n'
                f'<div class="code"><pre>{code}</pre></div>\n</div>\n')

    def heading(self, heading: Heading) -> str:
        level = heading.level + 1
        text = f'<h{level} id="{heading.anchor}">{self.prose(self.title(heading))}</h{level}>\n'
        below = "".join(self.paragraph(paragraph) for paragraph in paragraphs(heading.text))
        if below:
            text += f'<div class="wide">\n{below}</div>\n'
        return text

    def contents(self) -> str:
        """The table of contents."""
        result = ""
        for piece in self.script.pieces:
            if isinstance(piece, Heading):
                title = short_title(self.title(piece))
                result += (f'<li class="level{piece.level}"><a href="#{piece.anchor}">'
                           f"{signs(title)}</a></li>\n")
        return result + f'<li class="level2"><a href="#ids">{self.words["ids"]}</a></li>\n'

    def index(self) -> str:
        """The list of article ids, from the guide's table."""
        guide = self.path_to(GUIDES[self.language])
        intro = self.prose(self.words["ids_intro"].format(guide=guide), "")
        result = f'<h2 id="ids">{self.words["ids"]}</h2>\n<div class="wide">\n<p>{intro}</p>\n'
        result += '<table class="plain ids">\n<tr>'
        result += "".join(f"<th>{self.words[name]}</th>" for name in ["id", "what", "where"])
        result += "</tr>\n"
        for name, (what, where) in self.ids.items():
            label = f'<a href="#{name}">{name}</a>'
            if name not in self.anchored:  # the script's text does not name it
                label = f'<span id="{name}">{name}</span>'
            where = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", where)  # links of the guide
            what, where = self.prose(what, ""), self.prose(where, "")
            result += f'<tr id="id-{name}"><td>{label}</td><td>{what}</td><td>{where}</td></tr>\n'
        return result + "</table>\n</div>\n"

    def make(self) -> str:
        self.row_names = {piece.name for piece in self.script.pieces if isinstance(piece, Row)}
        spans = self.code_spans()
        body, open_sections = "", 0
        for piece in self.script.pieces:
            if isinstance(piece, Row):
                body += self.row(piece, spans)
                continue
            if piece.level < 3:  # a section holds its heading, which stays in sight above its rows
                body += "</section>\n" * open_sections + "<section>\n"
                open_sections = 1
            body += self.heading(piece)
        body += "</section>\n" * open_sections
        head = "".join(self.paragraph(text, "") for text in paragraphs(self.script.head))
        index = self.index()
        other = PAGES["en" if self.language == "zh" else "zh"]
        return PAGE.format(
            language="zh-CN" if self.language == "zh" else "en", title=self.words["title"],
            other=self.words["other"], other_page=other,
            intro=self.prose(self.words["intro"], ""),
            contents_title=self.words["contents"], contents=self.contents(),
            head=head, body=body, index=index, style=STYLE)


def short_title(title: str) -> str:
    """For the table of contents: without ids, and without what stands behind a colon."""
    title = re.sub(r"\s*[(（][A-Z]\d+\b[^)）]*[)）]$", "", title)
    if re.match(r"(Step|Phase|Stage|第|阶段|训练阶段)", title):
        return title
    return re.split(r": |：", title)[0]


# ==================================================================================================
# 5  Translations and ids
# ==================================================================================================
def key(english: str) -> str:
    """A passage without its line breaks: a translation survives when a paragraph is rewrapped."""
    return " ".join(english.split())


def translation_pairs(text: str) -> list[tuple[str, str]]:
    """notes/annotated.zh.md -> pairs of English and Chinese.

    The English lines begin with ">". The Chinese below them goes to the next ">" or heading.
    """
    pairs = []
    for line in text.split("\n"):
        if line.startswith(">"):
            line = line[1:].removeprefix(" ")
            if pairs and not pairs[-1][1]:
                pairs[-1][0].append(line)
            else:
                pairs.append(([line], []))
        elif line.startswith("#"):
            pairs.append(([], [""]))  # a heading for the reader of the file
        elif pairs and (line.strip() or pairs[-1][1]):
            pairs[-1][1].append(line)
    found = []
    for english, chinese in pairs:
        if english:
            found.append(("\n".join(english), "\n".join(chinese).strip("\n")))
    return found


def read_translations() -> dict[str, str]:
    pairs = translation_pairs(TRANSLATIONS.read_text(encoding="utf-8"))
    return {key(english): chinese for english, chinese in pairs}


def ids_of_guide(guide: Path) -> dict[str, tuple[str, str]]:
    """The guide's table of ids: id -> what the articles ask for, where the script does it."""
    found = {}
    text = re.sub(r"\[([^\]]+)\]\(annotated[^)]*\)", r"\1", guide.read_text(encoding="utf-8"))
    for line in text.split("\n"):
        columns = [column.strip() for column in line.strip("|").split("|")]
        if len(columns) == 4 and re.fullmatch(r"[SLTNPR]\d+", columns[0]):
            found[columns[0]] = (columns[1], columns[2])
    return found


# ==================================================================================================
# 6  The frame of the page
# ==================================================================================================
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #22252a; --soft: #666c75; --line: #e2e2dc; --panel: #f5f5f0;
  --link: #1a5fa8; --keyword: #8a2c8a; --string: #2f6f3a; --comment: #6d727a; --number: #a14a12;
  --function: #1a5fa8; --builtin: #36606f; --formula: #eef3f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17191c; --ink: #d9dbde; --soft: #9aa0a8; --line: #33373d; --panel: #1e2125;
    --link: #7db4ee; --keyword: #d69bd8; --string: #9ccf9f; --comment: #8b929b; --number: #e3a36b;
    --function: #8cc0f5; --builtin: #8fc3d0; --formula: #222a35;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.4rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
    "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
:lang(zh-CN) body, body:lang(zh-CN) { line-height: 1.7; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre, .shape, .text h4 {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
code, .shape { font-size: 0.87em; overflow-wrap: anywhere; }
.shape, .keep { white-space: nowrap; }
code a { text-decoration: underline; text-decoration-color: var(--line);
  text-underline-offset: 3px; }
a.id { color: var(--soft); font-size: 0.9em; }
sub, sup { line-height: 0; font-size: 0.72em; }
i { font-family: "STIX Two Text", Cambria, Georgia, "DejaVu Serif", serif; }
:target { background: color-mix(in srgb, var(--link) 14%, transparent); }

header { padding: 1.6rem 1.5rem 0; }
header h1 { margin: 0; font-size: 1.7rem; line-height: 1.3; }
header p { max-width: 52rem; margin: 0.4rem 0 0; color: var(--soft); }
nav h2 { position: static; margin: 0 0 0.4rem; padding: 0; border: 0; font-size: 1rem; }
nav ul { list-style: none; margin: 0; padding: 0; columns: 17rem; column-gap: 2rem; }
nav li { line-height: 1.45; break-inside: avoid; font-size: 0.93rem; }
nav .level1 { margin-top: 0.7em; font-weight: 700; break-after: avoid; }
nav .level2 { margin-top: 0.3em; font-weight: 600; break-after: avoid; }
nav .level1:first-child { margin-top: 0; }
nav .level3 { padding-left: 1em; font-size: 0.86rem; }
nav { margin: 1.4rem 1.5rem 1.8rem; padding: 1rem 1.2rem; border: 1px solid var(--line);
  border-radius: 6px; }
.wide { padding: 0 1.5rem; max-width: 66rem; }
.up { display: none; }

section > h2, section > h3 {
  position: sticky; top: 0; z-index: 2; margin: 2rem 0 0.8rem; padding: 0.5rem 7rem 0.5rem 1.5rem;
  background: var(--paper); border-bottom: 1px solid var(--line); font-size: 1.2rem;
  line-height: 1.35;
}
section > h2 { font-size: 1.45rem; }
section > h4 {
  margin: 1.9rem 0 0.7rem; padding: 0 1.5rem; font: inherit; font-size: 1.07rem; font-weight: 650;
}

.row { display: grid; grid-template-columns: minmax(0, 1fr) 51.5rem; }
.text { padding: 0.75rem 1.6rem 0.9rem 1.5rem; min-width: 0; }
.text h4 { margin: 0 0 0.35rem; font-size: 0.9rem; }
.text h4 a { color: var(--ink); }
.text p, .wide p { margin: 0 0 0.6em; }
.text > div > :last-child { margin-bottom: 0; }
/* The shorter one of text and code stays in sight while the longer one passes by. */
.text > div, .code pre { position: sticky; top: 3.4rem; }
.code { min-width: 0; background: var(--panel); border-left: 1px solid var(--line); }
.code pre {
  margin: 0; padding: 0.85rem 0.3rem 0.9rem 0; overflow-x: auto; font-size: 12.4px;
  line-height: 1.5;
}
.l { display: inline-block; min-height: 1.5em; vertical-align: top; }
.l::before {
  content: attr(data-n); display: inline-block; width: 3.1rem; padding-right: 0.9rem;
  color: var(--soft); opacity: 0.65; text-align: right; user-select: none;
}
.code a { color: inherit; text-decoration: underline; text-decoration-color: var(--line);
  text-underline-offset: 3px; }
.code a:hover { color: var(--link); }
.k { color: var(--keyword); }
.s { color: var(--string); }
.c { color: var(--comment); }
.n { color: var(--number); }
.f { color: var(--function); font-weight: 600; }
.b { color: var(--builtin); }
.d { color: var(--keyword); }

table { border-collapse: collapse; margin: 0.2rem 0 0.8rem; }
td, th { padding: 0.12rem 1.1rem 0.12rem 0; text-align: left; vertical-align: baseline; }
td:last-child { padding-right: 0; }
.formula {
  display: block; padding: 0.4rem 0.7rem; background: var(--formula); border-radius: 5px;
  overflow-x: auto;
}
.formula td { padding-right: 0.45em; }
.sample {
  margin: 0.2rem 0 0.8rem; padding: 0.4rem 0.7rem; background: var(--formula); border-radius: 5px;
  overflow-x: auto; font-size: 0.8em; line-height: 1.5;
}
.formula .left { white-space: nowrap; }
.right { margin-right: 1.2em; }
.remark { display: inline-block; color: var(--soft); font-size: 0.92em; }
.plain { font-size: 0.95em; }
.plain td { line-height: 1.45; }
.plain td:first-child { white-space: nowrap; }
.text .plain td:first-child { white-space: normal; }
.many code { overflow-wrap: normal; }
.ids td { padding-top: 0.25rem; border-bottom: 1px solid var(--line); white-space: normal; }
.notes { list-style: none; margin: 0.7em 0 0; padding: 0; font-size: 0.9em; color: var(--soft); }
.notes li { margin: 0.15em 0; line-height: 1.5; }
.notes span { margin-right: 0.3em; font-size: 0.9em; opacity: 0.8; }
footer { height: 40vh; }

@media (min-width: 1540px) {
  .page { display: grid; grid-template-columns: 15.5rem minmax(0, 1fr); }
  header, main { grid-column: 2; }
  nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; margin: 0; padding: 1.2rem 1rem;
    border: 0; border-right: 1px solid var(--line); border-radius: 0; grid-area: 1 / 1 / 3 / 2; }
  nav ul { columns: auto; }
  .head { padding-top: 1.2rem; }
}
@media (max-width: 1539px) {
  .up { display: block; position: fixed; right: 1rem; top: 0.55rem; z-index: 3;
    padding: 0.1rem 0.6rem; border: 1px solid var(--line); border-radius: 5px;
    background: var(--paper); font-size: 0.85rem; }
}
@media (max-width: 1150px) {
  .row { grid-template-columns: minmax(0, 1fr); }
  .text { padding: 1rem 1rem 0.6rem; max-width: 46rem; }
  .text.empty { display: none; }
  .text > div, .code pre { position: static; }
  .code { border-left: 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
  .l::before { width: 2.7rem; padding-right: 0.7rem; }
  header, .wide { padding-left: 1rem; padding-right: 1rem; }
  nav { margin: 1.2rem 1rem 1.6rem; }
  section > h2, section > h3 { padding-left: 1rem; }
  section > h4 { padding: 0 1rem; }
  .wide { overflow-x: auto; }
}
@media (max-width: 600px) {
  html { scroll-padding-top: 4.6rem; }
  .many { font-size: 0.85em; }
  .many td { padding-right: 0.6rem; }
  .ids .keep { white-space: normal; }
  .ids td:nth-child(2) { min-width: 7rem; }
  section > h2 { font-size: 1.2rem; }
  section > h3 { font-size: 1.05rem; }
  header h1 { font-size: 1.4rem; padding-right: 6.5rem; }
  .formula td, .formula .left { white-space: normal; }
  .code pre { font-size: 11.5px; }
}
@media print { section > h2, section > h3 { position: static; } .up { display: none; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="up" href="#contents">☰ {contents_title}</a>
<div class="page">
<header>
<h1>{title}</h1>
<p><a href="{other_page}">{other}</a></p>
<p>{intro}</p>
</header>
<nav id="contents">
<h2>{contents_title}</h2>
<ul>
{contents}</ul>
</nav>
<main>
<div class="wide head">
{head}</div>
{body}
<section>
{index}</section>
<footer></footer>
</main>
</div>
</body>
</html>
"""


def make_page(language: str, out: Path, source: str | None = None) -> str:
    """The page as text. `source`: another script than ppo_rlhf.py, for tests."""
    script = Script(SCRIPT.read_text(encoding="utf-8") if source is None else source)
    return Page(script, language, Path(out).resolve()).make()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE), metavar="FOLDER",
                        help="where the two pages go (default: runs/annotated)")
    out = Path(parser.parse_args(arguments).out)
    out.mkdir(parents=True, exist_ok=True)
    for language, name in PAGES.items():
        page = make_page(language, out)
        (out / name).write_text(page, encoding="utf-8")
        print(out / name)


if __name__ == "__main__":
    main()
