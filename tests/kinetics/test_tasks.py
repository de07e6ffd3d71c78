import json
from fractions import Fraction

import pytest

from thresher.errors import TraceError, UsageError
from thresher.kinetics.tasks import Problem, generate, judge, makes, read_problems


@pytest.mark.parametrize("difficulty", [1, 2, 5])
def test_sums_are_right(difficulty):
    problems = generate("sums", 40, difficulty, seed=3)
    assert len({p.text for p in problems}) == len({p.key for p in problems}) == 40
    for p in problems:
        expression = p.text.removeprefix("Calculate ").partition(". Think")[0]
        assert sum(expression.count(c) for c in "+-*") == difficulty
        assert eval(expression) == int(p.gold)
    assert problems == generate("sums", 40, difficulty, seed=3)
    assert problems != generate("sums", 40, difficulty, seed=4)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_countdown_can_be_solved(difficulty):
    def reachable(values):
        if len(values) == 1:
            return set(values)
        found = set()
        for i in range(len(values)):
            for j in range(len(values)):
                if i != j:
                    rest = [v for k, v in enumerate(values) if k not in (i, j)]
                    for v in (values[i] + values[j], values[i] - values[j], values[i] * values[j]):
                        found |= reachable([*rest, v])
        return found

    for p in generate("countdown", 15, difficulty):
        assert len(p.numbers) == difficulty + 1
        assert Fraction(p.gold) in reachable([Fraction(n) for n in p.numbers])


def test_tasks_that_cannot_be():
    for task, count, difficulty in (("chess", 1, 1), ("sums", 0, 1), ("sums", 1, 0), ("sums", 1, 11)):
        with pytest.raises(UsageError):
            generate(task, count, difficulty)
    with pytest.raises(UsageError, match="has not 100000 different"):
        generate("sums", 100_000, 1)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("So it is \\boxed{42}.", "42", 1.0),
        ("First 7, then the answer is 42", "42", 1.0),
        ("\\boxed{41} and not 42", "41", 0.0),
        ("it is $\\frac{84}{2}$", "42", 1.0),
        ("I do not know", None, 0.0),
        ("", None, 0.0),
        ("\\boxed{9**9**9**9**9}", None, 0.0),
    ],
)
def test_answers_are_judged(text, answer, score):
    found = judge(Problem("a", "", "42"), text)
    assert found[1] == score
    if answer in ("42", "41"):
        assert found[0] is not None


def test_latex_answers():
    problem = Problem("a", "", "\\boxed{\\frac{1}{2}}")
    assert judge(problem, "\\boxed{0.5}")[1] == 1.0
    assert judge(problem, "\\boxed{\\frac{2}{4}}")[1] == 1.0
    assert judge(problem, "\\boxed{2}")[1] == 0.0
    assert judge(Problem("a", "", "-7"), "= -7")[1] == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(25 - 5) * 3", True),
        ("(25-5) \\times 3 = 60", True),
        ("3*(25-5)", True),
        ("-(5-25)*3", True),
        ("60", False),
        ("25 + 35", False),
        ("(25-5)*3*1", False),
        ("(25-5)*3+5-5", False),
        ("(25-5", False),
        ("__import__('os')", False),
        ("9**9**9", False),
        ("25/(5-5)*3", False),
        ("(" * 150 + "60" + ")" * 150, False),
    ],
)
def test_countdown_answers(text, right):
    assert makes(text, (5, 25, 3), Fraction(60)) is right


def test_countdown_is_judged():
    problem = Problem("a", "", "60", (5, 25, 3))
    assert judge(problem, "Thus \\boxed{(25-5)*3}") == ("(25-5)*3", 1.0)
    assert judge(problem, "Thus \\boxed{60}")[1] == 0.0


def test_files_of_problems(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "How many?", "answer": "2 + 2 = 4\\n#### 1,004"}\n\n{"problem": "x", "answer": 7}\n')
    first, second = read_problems(path)
    assert (first.key, first.gold, second.gold) == ("1", "1004", "7")
    assert first.text.startswith("How many? Think")
    assert len(read_problems(path, 1)) == 1
    listed = tmp_path / "math.json"
    listed.write_text(json.dumps([{"id": "m1", "problem": "p", "solution": "so \\boxed{1} or \\boxed{\\frac{1}{3}}"}]))
    assert read_problems(listed)[0] == Problem(
        "m1", "p Think step by step, briefly, and put the final answer in \\boxed{}.", "\\boxed{\\frac{1}{3}}"
    )
    for text, message in (
        ('{"question": "a"}', "line 1: no question"),
        ('{"question": "a", "answer": "1"}\n[1]', "line 2: no question"),
        ('{"question": "", "answer": "1"}', "line 1: no question"),
        ("x", "line 1: not JSON"),
        ("", "no problems"),
        ('{"question": "a", "answer": "1"}\n{', "line 2: not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            read_problems(path)
    with pytest.raises(TraceError, match="No such file"):
        read_problems(tmp_path / "none")
