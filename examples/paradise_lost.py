"""Paradise Lost with facts planted into it, for the demo."""

from thresher.evaluation.texts import paradise_lost

__all__ = ["FACTS", "paradise_lost", "with_facts"]

# (share of the text before it, the sentence, a question, what a right answer contains)
FACTS = [
    (0.05, "Remember this: the secret number is 4921.", "What is the secret number?", "4921"),
    (0.30, "Remember this: the name of the cat is Whiskers.", "What is the name of the cat?", "Whiskers"),
    (0.55, "Remember this: the library is painted orange.", "What colour is the library?", "orange"),
    (0.75, "Remember this: the captain was born in Lisbon.", "Where was the captain born?", "Lisbon"),
    (0.95, "Remember this: the lamp costs 73 dollars.", "How much does the lamp cost?", "73"),
]


def with_facts(text: str) -> str:
    """The text with each fact as a paragraph of its own, at its share of the lines."""
    lines = text.splitlines()
    for share, sentence, _, _ in reversed(FACTS):
        lines[round(share * len(lines)) : round(share * len(lines))] = ["", sentence, ""]
    return "\n".join(lines)
