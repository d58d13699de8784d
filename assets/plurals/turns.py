"""What the teacher reads: six questions with their answers as earlier turns, then the question.

And what counts as right: the bare word. A model that was tuned for chat says a sentence otherwise.
"""

EXAMPLES = {
    "cat": "cats", "city": "cities", "box": "boxes",
    "knife": "knives", "child": "children", "tree": "trees",
}  # fmt: skip


def teacher(row, completions, verdicts, index):
    """For --teacher-prompt."""
    turns = []
    for word, answer in EXAMPLES.items():
        question = f"What is the plural of {word}? Answer with one word."
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": row["prompt"]}]


def right(completion, answer, row):
    """For --verifier."""
    return completion.strip().lower().removesuffix(".") == answer
