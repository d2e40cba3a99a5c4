"""Questions with the right answer, and the nearest wrong one: `python make_pairs.py FAQ.jsonl PAIRS.jsonl`.

The nearest wrong answer is that of the most similar other question (TF-IDF of its words), unless it is the same text.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

AT_ONCE = 512
"""Questions that are compared with all at a time."""


def main(source: str, target: str) -> None:
    """Write a pair for each question."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    answers = np.unique([row["answer"] for row in rows], return_inverse=True)[1]
    vectors = TfidfVectorizer(stop_words="english").fit_transform([row["question"] for row in rows])
    with Path(target).open("w", encoding="utf-8") as file:
        for begin in range(0, len(rows), AT_ONCE):
            similar = (vectors[begin : begin + AT_ONCE] @ vectors.T).toarray()
            similar[answers[begin : begin + AT_ONCE, None] == answers[None]] = -1
            for row, nearest in zip(rows[begin : begin + AT_ONCE], similar.argmax(1).tolist(), strict=True):
                pair = {"question": row["question"], "chosen": row["answer"], "rejected": rows[nearest]["answer"]}
                file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
