"""Problems whose answers can be verified: two that are generated, and files that people have (GSM8K, MATH, AIME)."""

import ast
import json
import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from thresher.errors import TraceError, UsageError

GENERATED = ("sums", "countdown")
ASK = "Think step by step, briefly, and put the final answer in \\boxed{}."
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Problem:
    """gold: the answer. numbers: for countdown, those that an expression for it may use, each once."""

    key: str
    text: str
    gold: str
    numbers: tuple[int, ...] = ()


def generate(task: str, count: int, difficulty: int, seed: int = 0, ask: str = ASK) -> list[Problem]:
    """Problems that are all different. sums: `difficulty` operations on numbers up to 20, to a whole number; countdown:
    a number to be made of `difficulty + 1` others. ask: what is said behind the problem. Raises UsageError."""
    if task not in GENERATED:
        raise UsageError(f"task '{task}': choose from {', '.join(GENERATED)}, or give a file of problems")
    if not (1 <= difficulty <= 10 and 1 <= count <= 100_000):
        raise UsageError(f"difficulty {difficulty}, {count} questions: give 1 to 10, and 1 to 100,000")
    rng = random.Random(f"{task} {difficulty} {seed}")
    made: dict[str, Problem] = {}
    barren = 0  # draws since the last new one; of so many one more would have been among them
    while barren < 50 * (len(made) + 20):
        problem = (_sum if task == "sums" else _countdown)(rng, difficulty, ask)
        barren = 0 if made.setdefault(problem.text, problem) is problem else barren + 1
        if len(made) == count:
            return [Problem(f"{task}{difficulty}-{i}", p.text, p.gold, p.numbers) for i, p in enumerate(made.values())]
    raise UsageError(f"task {task} of difficulty {difficulty} has not {count} different questions")


def _sum(rng: random.Random, operations: int, ask: str) -> Problem:
    text, value = _expression(rng, operations)
    return Problem("", f"Calculate {text}. {ask}", str(value))


def _expression(rng: random.Random, operations: int) -> tuple[str, int]:
    if operations == 0:
        value = rng.randint(2, 20)
        return str(value), value
    left = rng.randint(0, operations - 1)
    (a, x), (b, y) = _expression(rng, left), _expression(rng, operations - 1 - left)
    sign = rng.choice("++--*")
    if left:
        a = f"({a})"
    if operations - 1 - left:
        b = f"({b})"
    return f"{a} {sign} {b}", {"+": x + y, "-": x - y, "*": x * y}[sign]


def _countdown(rng: random.Random, operations: int, ask: str) -> Problem:
    """The number is what some expression of all the others gives, so that it can be made."""
    while True:
        numbers = tuple(rng.randint(1, 25) for _ in range(operations + 1))
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:
            a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
            values.append(rng.choice([a + b, a - b, a * b]))
        if 1 <= values[0] <= 200 and values[0] not in numbers:
            break
    listed = ", ".join(map(str, numbers))
    text = f"Use the numbers {listed}, each exactly once, with +, -, * and / to make {values[0]}. {ask}"
    return Problem("", text, str(values[0]), numbers)


def read_problems(path: Path, limit: int | None = None, ask: str = ASK) -> list[Problem]:
    """A file of JSON lines, or a JSON list, of GSM8K (question, answer with ####), MATH (problem, solution or answer)
    or AIME (problem or question, answer). Raises TraceError that names the line."""
    try:
        data = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    entries: list[tuple[int, Any]] = []
    try:
        if data.lstrip().startswith("["):
            entries = list(enumerate(json.loads(data), 1))
        else:
            for number, line in enumerate(data.splitlines(), 1):
                if line.strip():
                    entries.append((number, json.loads(line)))
    except (ValueError, RecursionError):
        raise TraceError(f"{path}, line {len(entries) + 1}: not JSON") from None
    found = []
    for number, entry in entries[:limit]:
        text = entry.get("problem", entry.get("question")) if isinstance(entry, dict) else None
        gold = _gold(entry) if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip() or gold is None:
            raise TraceError(f"{path}, line {number}: no question (or problem) with an answer (or boxed solution)")
        found.append(Problem(str(entry.get("id", number)), f"{text.strip()} {ask}", gold))
    if not found:
        raise TraceError(f"{path}: no problems")
    return found


def _gold(entry: dict[str, Any]) -> str | None:
    answer = entry.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer.rsplit("####", 1)[-1].strip().replace(",", "") if "####" in answer else answer.strip()
    solution = entry.get("solution")
    if isinstance(solution, str) and "\\boxed" in solution:
        return solution[solution.rindex("\\boxed") :]
    return None


@cache
def verifier() -> tuple[Any, Any, Any]:
    """math-verify's parse and verify, and what is looked for: a box, else the last expression. Raises UsageError if it
    is not installed."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        raise UsageError(
            "answers are checked with math-verify; install it with: pip install 'thresher[scale]'"
        ) from None
    return parse, verify, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def judge(problem: Problem, text: str) -> tuple[str | None, float]:
    """The answer in a text, None if there is none, and 1.0 if it is right, else 0.0. Only in a process's main thread:
    math-verify bounds its time by a signal. Raises UsageError if math-verify is not installed."""
    parse, verify, wanted = verifier()
    found = parse(text, extraction_config=wanted)
    if not found:
        return None, 0.0
    if problem.numbers:
        written = str(found[-1])
        return written, float(makes(written, problem.numbers, Fraction(problem.gold)))
    # As if it were LaTeX: gold answers of MATH are.
    gold = parse(problem.gold if "\\" in problem.gold else f"${problem.gold}$", extraction_config=wanted)
    return str(found[0]), float(verify(gold, found))


def makes(expression: str, numbers: tuple[int, ...], goal: Fraction) -> bool:
    """Whether an expression uses just these numbers, each once, and gives the goal."""
    text = expression
    for latex, plain in (
        ("\\times", "*"),
        ("\\cdot", "*"),
        ("\\div", "/"),
        ("\\left", ""),
        ("\\right", ""),
        ("\u00d7", "*"),
    ):
        text = text.replace(latex, plain)
    text = text.split("=")[0].strip(" $.")
    if len(text) > 200 or not re.fullmatch(r"[\d\s+\-*/()]+", text):
        return False
    try:
        tree = ast.parse(text, mode="eval").body
        used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        return used == Counter(numbers) and _value(tree) == goal
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError
