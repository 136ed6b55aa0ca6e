"""notes/annotated.py: all of the script is on its pages, and the Chinese says what English says.

After a change of the script's comments, `pytest notes/evidence/test_annotated.py` prints the
passages that need a new translation, ready to be pasted into notes/annotated.zh.md.
"""
import ast
import difflib
import html
import io
import re
import sys
import tokenize
import xml.etree.ElementTree as ET

import pytest

from test_notes import GUIDES, NOTES, PAGES, SCRIPT, code_spans, read, run_program

sys.path.insert(0, str(NOTES))
import annotated

PAIRS = annotated.translation_pairs(read(annotated.TRANSLATIONS))
TRANSLATED = {chinese for _, chinese in PAIRS}
TRANSLATIONS = {annotated.key(english): (english, chinese) for english, chinese in PAIRS}


# ==================================================================================================
# The translation
# ==================================================================================================
def quoted(passage):
    """A passage as it must stand in notes/annotated.zh.md."""
    return "\n".join(f"> {line}".rstrip() for line in passage.split("\n"))


def what_is_wrong(source):
    """Which passages have no translation, and which translations have no passage. Empty if none."""
    passages = annotated.Script(source).passages()
    known = {annotated.key(passage.english) for passage in passages}
    leftovers = [english for key, (english, _) in TRANSLATIONS.items() if key not in known]
    lines, replaced = [], set()
    for passage in passages:
        if passage.part != "I" or annotated.key(passage.english) in TRANSLATIONS:
            continue
        lines.append(f"NO TRANSLATION (line {passage.line} or below):\n{quoted(passage.english)}")
        similar = difflib.get_close_matches(passage.english, leftovers, 1, 0.5)
        if similar:
            lines.append(f"it probably replaces this one, which is gone:\n{quoted(similar[0])}")
            replaced.update(similar)
    for english in leftovers:
        if english not in replaced:
            lines.append(f"LEFT OVER, its English is gone from the script:\n{quoted(english)}")
    return "\n\n".join(lines)


def test_part_one_is_translated_and_no_translation_is_left_over():
    problems = what_is_wrong(SCRIPT)
    assert not problems, f"notes/annotated.zh.md must follow the script.\n\n{problems}"
    assert len(PAIRS) == len(TRANSLATIONS), "a passage is translated twice"
    assert all(chinese for _, chinese in PAIRS), "a translation is empty"


def test_a_changed_passage_is_named_together_with_the_translation_that_it_leaves_behind():
    sentence = "The policy pi(a_t | s_t) is the language model."
    assert SCRIPT.count(sentence) == 1
    problems = what_is_wrong(SCRIPT.replace(sentence, "The policy is a model."))
    assert problems.count("NO TRANSLATION") == 1 and "The policy is a model." in problems
    assert "it probably replaces" in problems and sentence in problems
    assert "LEFT OVER" not in problems

    assert not what_is_wrong(SCRIPT.replace(" a_t is the next token.", " a_t is the\n#    next token."))


def test_every_title_comment_and_docstring_is_a_passage():
    """Counted in another way: by words, with neither ast nor tokenize."""
    known = set()
    for passage in annotated.Script(SCRIPT).passages():
        known.update(re.findall(r"[A-Za-z]{3,}", passage.english))
    part_one = SCRIPT[:SCRIPT.index("# II  WHAT IT IS TRIED ON")]
    said = re.findall(r'"""(.*?)"""', part_one, re.DOTALL)
    said += re.findall(r"^ *# (.*)", part_one, re.MULTILINE)
    words = set(re.findall(r"[A-Za-z]{3,}", " ".join(said)))
    assert len(words) > 500 and words <= known


NUMBER = r"(?<![A-Za-z_\d.])\d+(?:\.\d+)?(?:e-?\d+)?"
WORDS_OF_FORMULAS = (r"[\u3000-\u9fff\uff00-\uffef]|"
                     r"\b(?:the|same|of|over|all|samples|mean|sum|pairs)\b")


def bare(formula):
    """A formula without the words in it and without spaces."""
    formula = re.split(annotated.GAP, formula.strip())[0]
    return re.sub(r"\s", "", re.sub(WORDS_OF_FORMULAS, "", formula))


def ids_numbers_and_names(text):
    patterns = [r"\b[SLTNPR]\d+\b", NUMBER, r"`[^`]+`", r"--[a-z]\w+", annotated.WORD,
                r"notes/\S+?\.(?:md|py)", annotated.SHAPE,
                r"[A-Za-z]+_(?:\{.*?\}|old|ref|RM|clip|ent|kl|[a-zA-Z])(?!\w)"]
    found = set()
    for pattern in patterns:
        found.update(re.findall(pattern, text, re.ASCII))
    return found


def formulas_and_tables(text):
    """What stands on lines of its own: [("formula", its signs) or ("table", cells in each row)]."""
    found = []
    for kind, lines in annotated.runs(text):
        if kind == "formula":
            found.append((kind, [bare(line) for line in lines]))
        elif kind == "table" and text in TRANSLATED:
            found.append((kind, [len(annotated.cells(line)) for line in lines]))
        elif kind == "table":
            rows = annotated.table(lines)
            found.append((kind, [len([cell for cell in row if cell]) for row in rows]))
    return found


def test_a_translation_has_the_ids_numbers_names_formulas_and_tables_of_its_passage():
    for english, chinese in PAIRS:
        assert ids_numbers_and_names(english) == ids_numbers_and_names(chinese), chinese
        assert formulas_and_tables(english) == formulas_and_tables(chinese), chinese


def test_chinese_is_written_as_chinese():
    """No ASCII punctuation after a Chinese character; spaces between Chinese and other words."""
    for _, chinese in PAIRS:
        assert not re.search(r"[\u4e00-\u9fff][,;:!?](?!\S)", chinese), chinese
        assert not re.search(r"[\u4e00-\u9fff][A-Za-z0-9`]|[A-Za-z0-9`][\u4e00-\u9fff]",
                             chinese), chinese


# ==================================================================================================
# The pages
# ==================================================================================================
@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder with the two pages, made as a reader makes them."""
    out = tmp_path_factory.mktemp("annotated") / "new"
    done = run_program("annotated.py", "--out", str(out))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == [str(out / name) for name in annotated.PAGES.values()]
    return out


@pytest.fixture(scope="module", params=["en", "zh"])
def page(request, out):
    """A page as a tree. The parser accepts only well-formed XML, so nothing is left unescaped."""
    text = read(out / annotated.PAGES[request.param])
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def lines_of_code():
    """(number, line) of all lines of the script that are not blank, a comment or a docstring."""
    silent = set()
    for node in ast.walk(ast.parse(SCRIPT)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                silent.update(range(node.lineno, node.end_lineno + 1))
    lines = SCRIPT.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(SCRIPT).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            silent.add(token.start[0])
    return [(number, line) for number, line in enumerate(lines, 1)
            if line.strip() and number not in silent]


def test_the_page_shows_every_line_of_code_once_in_order_and_unchanged(page):
    shown = [(int(line.get("data-n")), "".join(line.itertext())) for line in page.iter("span")
             if line.get("class") == "l"]
    assert [number for number, _ in shown] == sorted({number for number, _ in shown})
    assert [(number, line) for number, line in shown if line.strip()] == lines_of_code()


def letters(text):
    return re.sub(r"[^a-z]", "", text.lower())


def test_english_page_shows_every_passage_and_chinese_page_every_translation(out):
    shown, chinese_shown = ["".join(ET.fromstring(read(out / name).split("\n", 1)[1]).itertext())
                            for name in annotated.PAGES.values()]
    for passage in annotated.Script(SCRIPT).passages():
        # Greek letters, tables and formulas are set in another way; the test below has some.
        if not re.search(annotated.SYMBOL, passage.english) and "  " not in passage.english:
            assert letters(passage.english) in letters(shown), passage
    chinese_shown = re.sub(r"[^\u4e00-\u9fff]", "", chinese_shown)
    for _, chinese in PAIRS:
        if "  " not in chinese:
            assert re.sub(r"[^\u4e00-\u9fff]", "", chinese) in chinese_shown, chinese


def test_every_function_class_and_id_has_one_anchor_and_every_link_a_target(page, out):
    anchors = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(anchors) == len(set(anchors))
    tree = ast.parse(SCRIPT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            assert all(f"{node.name}.{method.name}" in anchors for method in methods)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name in anchors
    ids = annotated.ids_of_guide(GUIDES[0])
    assert len(ids) == 41 and set(ids) <= set(anchors)
    for link in page.iter("a"):
        target = link.get("href")
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (out / target).resolve().is_file(), target


@pytest.mark.parametrize("language", annotated.PAGES)
def test_the_pages_beside_the_guides_are_those_of_the_present_script(language):
    same = annotated.make_page(language, NOTES) == read(NOTES / annotated.PAGES[language])
    assert same, "run `python notes/annotated.py` after a change of the script or the guides"


def test_what_the_guides_name_has_an_anchor_and_their_links_lead_somewhere(out):
    anchors = {name: set(re.findall(r' id="([^"]+)"', read(out / name)))
               for name in annotated.PAGES.values()}
    script = annotated.Script(SCRIPT)
    for language, guide in annotated.GUIDES.items():
        named = {span.removesuffix("()") for span in code_spans(read(guide))}
        named &= {*script.defined, *script.constants}
        assert len(named) > 60 and named <= anchors[annotated.PAGES[language]]
        ids = annotated.ids_of_guide(guide)
        assert all(f"]({annotated.PAGES[language]}#{name})" in read(guide) for name in ids)
    for file in PAGES:
        for name, anchor in re.findall(r"(annotated(?:\.zh)?\.html)#([\w.-]+)", read(file)):
            assert anchor in anchors[name], (file.name, anchor)


def test_an_id_leads_to_the_place_that_is_about_it(out):
    text = read(out / "annotated.html")
    places = {
        "S2": "Step 2",
        "S5": "Step 5",
        "N7": "Shift",
        "L1": "PPO: Phase I",
        "L9": 'id="id-L9"'}  # the script does not name it: its row in the list has the anchor
    for name, place in places.items():
        before = text[:text.index(f' id="{name}"')]
        assert place in before[-500:], name


def test_the_pages_need_nothing_from_outside(page):
    for element in page.iter():
        assert element.tag not in ("script", "link", "img", "iframe")
        assert not (element.get("href") or "").startswith(("http:", "https:", "//"))
    assert "url(" not in annotated.STYLE and "@import" not in annotated.STYLE


# ==================================================================================================
# Pieces
# ==================================================================================================
ANY_PAGE = annotated.Page(annotated.Script(SCRIPT), "en", NOTES)


def text_as_html(text):
    return ANY_PAGE.prose(text, "")


def plain(marked):
    """HTML as text, with _ and ^ for what is set lower and higher."""
    marked = marked.replace("<sub>", "_").replace("<sup>", "^")
    return html.unescape(re.sub(r"<[^>]+>", "", marked))


@pytest.mark.parametrize("text, shown", [
    ("r_t = -beta * (log pi(a_t|s_t) - log pi_ref(a_t|s_t))",
     "r_t = −β · (log π(a_t|s_t) − log π_ref(a_t|s_t))"),
    ("(gamma*lambda)^k * delta_{t+k}", "(γλ)^k · δ_t+k"),
    ("clip(rho_t, 1-eps, 1+eps) * A_t", "clip(ρ_t, 1−ε, 1+ε) · A_t"),
    ("rho < 1-eps, and Adam's eps", "ρ < 1−ε, and Adam's eps"),
    ("-mean over t of min(rho_t, 1)", "−mean_t min(ρ_t, 1)"),
    ("-sum over v of pi_v * log pi_v", "−∑_v π_v · log π_v"),
    ("pi* = pi_ref * exp(r / beta) / Z", "π^∗ = π_ref · exp(r / β) / Z"),
    ("J*(x) = beta * log Z, E_pi[r]", "J^∗(x) = β · log Z, E_π[r]"),
    ("KL(pi || pi_ref) >= 0", "KL(π ∥ π_ref) ≥ 0"),
    ("1/2 * mean over t of (V(s_t) - G_t)^2", "½ · mean_t (V(s_t) − G_t)^2"),
    ("below 1e-5, on-policy, GPT-2, --clip_eps 10", "below 1e-5, on-policy, GPT-2, --clip_eps 10"),
    ("a spider, a rhombus, pip, betas, deltas", "a spider, a rhombus, pip, betas, deltas"),
    ("clip_eps, log_ratios, policy_loss, r_target", "clip_eps, log_ratios, policy_loss, r_target"),
    ("`beta * pi_old` stays", "beta * pi_old stays"),
    ("a < b & c > d", "a < b & c > d")])
def test_formulas_in_a_text(text, shown):
    assert plain(text_as_html(text)) == shown


def test_names_and_ids_in_a_text_become_links():
    assert '<a href="#gae">gae</a>' in text_as_html("`gae` and (S5, T2)")
    assert re.search(r'<a class="id" href="#id-S5" title="[^"]+">S5</a>', text_as_html("(S5, T2)"))
    assert "href" not in text_as_html("`unknown` B2 S77")


HOSTILE = '''"""Head of <b>it</b> & more."""


# ---- A <piece> -----------------------------------------------------------------------------------
def f(a):
    """Says <script>alert(1)</script> & `a < b`."""
    # Is a < b && "c"?
    return f"{a}<br>&amp;{{}}" + \'\'\'<script>
  x = "</span>" & 1
\'\'\'  # not <b>bold</b>, is it


class C:
    def g(self):
        return 1 < 2 > 0
'''


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_that_a_script_says_becomes_a_tag(language, tmp_path):
    page = annotated.make_page(language, tmp_path, HOSTILE)
    tree = ET.fromstring(page.split("\n", 1)[1])
    assert not [element for element in tree.iter() if element.tag in ("script", "b")]
    shown = ["".join(line.itertext()) for line in tree.iter("span") if line.get("class") == "l"]
    code = [line for line in HOSTILE.split("\n") if not re.search('"""|^ *#', line)]
    assert [line for line in shown if line.strip()] == [line for line in code if line.strip()]
    text = "".join(tree.itertext())
    assert "Says <script>alert(1)</script> & a < b." in text and "Is a < b && " in text
    assert {"f", "C", "C.g"} <= {element.get("id") for element in tree.iter()}


def test_an_aligned_equals_sign_is_no_column():
    for left in ["J(pi)  ", "pi*    ", "rho_t "]:
        row = ANY_PAGE.formula(f"{left}= exp(r)        a remark", "")
        cells = re.findall("<td.*?</td>", row)
        assert [plain(cell).count("=") for cell in cells] == [0, 1] and "a remark" in plain(row)
        assert '<span class="remark">a remark</span>' in row


def test_a_table_keeps_its_columns_and_a_long_cell_goes_on():
    rows = annotated.table(["  a     one   x", "        two   y", "  bb    long", "        end",
                            "  ccccc three z"])
    assert rows == [["a", "one", "x"], ["", "two", "y"], ["bb", "long end", ""],
                    ["ccccc", "three z", ""]]
    assert annotated.translated_table(["  甲  一  子", "  二  丑"], rows[:2]) == [
        ["甲", "一", "子"], ["", "二", "丑"]]
