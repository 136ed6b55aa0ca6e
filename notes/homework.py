"""Homework that grades itself: eight functions to write, and tests that give hints.

    python notes/homework.py FOLDER     # FOLDER must be new or empty
    pytest FOLDER

FOLDER gets a copy of ppo_rlhf.py in which eight functions are empty, except for their docstrings.
The docstring has the formula, and the student writes the code. The tests grade each function alone.
They know the usual mistakes, such as a score on the padding, and give a hint that fits. The tests
are notes/homework_tests.py. When all eight are solved, the copy is a whole script again.
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

NOTES = Path(__file__).resolve().parent
SCRIPT = NOTES.parent / "ppo_rlhf.py"
TESTS = NOTES / "homework_tests.py"

# The functions, in the order of homework_tests.py, and where they are in the articles.
STEPS = {
    "token_log_probs": "T9",
    "token_rewards": "step 2, S2",
    "td_residuals": "step 4, S4",
    "gae": "step 5, S5",
    "policy_loss": "step 6, S6",
    "value_loss": "step 6, S6",
    "ranking_loss": "L3",
    "sample_tokens": "step 1, S1",
}

# These settings belong to FOLDER alone, also if it lies inside another project.
PYTEST_INI = """[pytest]
python_files = homework_test.py
addopts = --verbose --no-header -p no:cacheprovider -rN
console_output_style = classic
"""

# The list at the end of what pytest prints.
CONFTEST = '''"""The list at the end of what pytest prints: a line for each function."""


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    passed, total = 0, 0
    for report in sorted(reports, key=lambda report: report.start):
        if "homework_test.py::test[" not in report.nodeid:
            continue
        name = report.nodeid.partition("[")[2].rstrip("]")
        total += 1
        passed += report.passed
        outcome = "passes" if report.passed else report.longreprtext.splitlines()[0]
        if total == 1:
            terminalreporter.section("HOMEWORK")
        terminalreporter.write_line(f"{name:<17}{outcome}")
    if total:
        terminalreporter.write_line(f"{passed} of {total} pass")
'''

README = """# Homework: eight functions of PPO for RLHF

中文说明在本页下半部分。

`ppo_rlhf.py` is the whole script, but eight of its functions are empty. Each one still has its
docstring, and the docstring has the formula. Write the code. You need no article for it.

1. Open `ppo_rlhf.py` and look for `NotImplementedError("homework`.
2. Solve one function. Two to ten lines are enough. Leave its name and its arguments as they are.
3. Run the tests, in this folder:

       pytest                          # all eight
       pytest -k gae                   # only one

4. A function that is wrong gets a message. If the mistake is a usual one, the message is a hint.
   If not, it shows a small example, with the numbers that are expected and yours.
5. When all eight pass, the script runs again: `python ppo_rlhf.py`, in this folder. It takes about
   a minute (with loops over tokens, longer), and trains the models with your code.

Each function is graded alone, so you can begin where you like. The order goes from easy to hard:
log-probs, then steps 2, 4, 5 and 6, the loss of the reward model, and sampling last. (Step 3, the
critic, is given.) B to E are articles. You
need none of them; `notes/guide.md`, in the repository, names them and explains the ids.

| | function | id | in the articles | what it needs |
|---|---|---|---|---|
| 1 | `token_log_probs` | T9 | E, Step 1 | log-softmax, and one token out of many |
| 2 | `token_rewards` | S2 | E, Step 2 | the last real token of each reply |
| 3 | `td_residuals` | S4 | E, Step 4 | the next value, and nothing after the end |
| 4 | `gae` | S5 | E, Step 5 | a loop backwards |
| 5 | `policy_loss` | S6 | E, Step 6; D, formula L^CLIP | ratio, clip, min, a mean without padding |
| 6 | `value_loss` | S6 | E, "Critic ＆Entropy"; B | a squared error |
| 7 | `ranking_loss` | L3 | D, stage 1 (阶段1); C, InstructGPT | all pairs of replies |
| 8 | `sample_tokens` | S1 | E, Step 1 | softmax, temperature, chance |

Rules: where a function has a `mask`, it is True on the real tokens of a reply. A position where it
is False must not influence any result, even if it holds NaN, and a result there is 0. Do not write
into the tensors that you are given. Losses and log-probs need a gradient: no `.item()`, no
`.detach()`. You may call the functions that are not empty, such as `masked_mean`. In shapes, B is
replies, T tokens, V words in the vocabulary, N rankings, K replies in a ranking.

Until you have solved everything, keep `homework_test.py`, the finished script (also as a page,
`notes/annotated.html`), `notes/staircase.md` and the solutions of exercises 2 and 12 closed: they
contain the answers.

# 作业：PPO（RLHF）的八个函数

`ppo_rlhf.py` 是完整的脚本，只是其中八个函数被清空了。文档字符串（docstring）还在，公式就写在里面。请你把公式写成代码。

1. 打开 `ppo_rlhf.py`，搜索 `NotImplementedError("homework`。
2. 先做一个函数，两到十行就够。函数名和参数不要改。
3. 在本文件夹里运行测试：

       pytest                          # 全部八个
       pytest -k gae                   # 只测一个

4. 做错的函数会得到一段说明。如果是常见错误，说明就是提示；如果不是，会给出一个小例子，并列出应得的数和你的数。
   说明是英文的，句子都很短。其中 bootstrapping（自举）指的是：用 V(s_{t+1}) 代替后面还没有发生的奖励。
5. 八个都通过以后，脚本又能运行了：在本文件夹里运行 `python ppo_rlhf.py`，大约一分钟，用你的代码训练出所有模型。

每个函数单独评分，所以先做哪个都可以。下面的顺序由易到难。“E”“D”等是文章，编号见 `notes/guide.zh.md`。

| | 函数 | 编号 | 文章中的位置 | 要点 |
|---|---|---|---|---|
| 1 | `token_log_probs` | T9 | E，Step 1 | log-softmax，从词表中取出被采样的词元 |
| 2 | `token_rewards` | S2 | E，Step 2 | 每条回复的最后一个真实词元 |
| 3 | `td_residuals` | S4 | E，Step 4 | 下一个状态的价值；结束之后什么都没有 |
| 4 | `gae` | S5 | E，Step 5 | 从后往前的循环 |
| 5 | `policy_loss` | S6 | E，Step 6；D，公式 L^CLIP | 概率比、裁剪、min，求平均时不算 padding |
| 6 | `value_loss` | S6 | E，“Critic ＆Entropy”；B | 平方误差 |
| 7 | `ranking_loss` | L3 | D，阶段1；C，InstructGPT | 所有的回复对 |
| 8 | `sample_tokens` | S1 | E，Step 1 | softmax、温度、随机 |

规则：有 `mask` 的函数里，它在真实词元处为 True，为 False 的位置不能影响任何结果，即使那里是 NaN，而且那里的结果是 0。不要改写传入的张量。
损失和对数概率要有梯度：不要用 `.item()` 和 `.detach()`。没有清空的函数可以调用，例如 `masked_mean`。形状里的 B 是回复数，T 是词元数，
V 是词表大小，N 是排序数，K 是一个排序里的回复数。

全部做完之前，请不要看 `homework_test.py`、完整的脚本、`notes/staircase.md` 和练习 2、12 的答案，答案都在里面。公式的中文见网页
`notes/annotated.zh.html`，但代码就在旁边，看时请遮住右边。
"""


def emptied(source: str) -> str:
    """The script's text, where the bodies of the eight functions are gone."""
    lines = source.splitlines(keepends=True)
    functions = [node for node in ast.parse(source).body
                 if isinstance(node, ast.FunctionDef) and node.name in STEPS]
    for function in reversed(functions):  # from the end, so that the line numbers stay right
        docstring = function.body[0]
        note = f'    raise NotImplementedError("homework: {function.name} ({STEPS[function.name]})")\n'
        lines[docstring.end_lineno:function.end_lineno] = [note]
    return "".join(lines)


def refuse(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    folder = parser.parse_args().folder
    try:
        if folder.exists() and any(folder.iterdir()):
            refuse(f"{folder} is not empty; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ppo_rlhf.py").write_text(
            emptied(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copyfile(TESTS, folder / "homework_test.py")
        (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
        (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        (folder / "README.md").write_text(README, encoding="utf-8")
    except OSError as error:
        refuse(f"cannot write to {folder}: {error.strerror}")
    print(f"Eight empty functions are in {folder / 'ppo_rlhf.py'}. Read {folder / 'README.md'} "
          "(below, in Chinese).")
    print(f"To see how far you are: pytest {folder}")


if __name__ == "__main__":
    main()
