"""Make a task of last words from a text, in the manner of LAMBADA: passages whose last word occurs in them before.

    python benchmarks/last_word.py BOOKS.txt last_word.jsonl
    quamba eval MODEL --task examples/tasks/last_word.json=last_word.jsonl

A passage begins with a sentence and ends with the first word, from the fiftieth on, that a punctuation mark follows,
has at least three letters, and stands in the passage before, as the same letters. Passages do not overlap. The result
depends on the text and the options alone.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
# Where a sentence ends: a full stop, question or exclamation mark, the quotes and brackets that close there, space.
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+")
_WORD = re.compile(r"[A-Za-z]+")
# Words that something ends with: a sentence, a clause, a speech.
_LAST_WORD = re.compile(r"(?<=\s)[A-Za-z]+(?=[.,;:!?])")


def passages(text: str, *, words: int = 50, most: int = 100, letters: int = 3) -> Iterator[str]:
    """The passages of a text.

    Args:
        text: documents, separated by END_OF_TEXT; no passage spans two.
        words: at least so many in a passage.
        most: at most so many; where no passage fits, the next sentence is tried as a beginning.
        letters: at least so many in the last word.
    """
    for document in text.split(END_OF_TEXT):
        free = 0
        for begin in [0, *(match.end() for match in _SENTENCE_END.finditer(document))]:
            if begin < free:
                continue
            end = _end_of_passage(document, begin, words=words, most=most, letters=letters)
            if end is not None:
                yield document[begin:end].lstrip()
                free = end


def _end_of_passage(document: str, begin: int, *, words: int, most: int, letters: int) -> int | None:
    """Where the first fitting last word ends, in a passage from `begin`."""
    for match in _LAST_WORD.finditer(document, begin):
        count = len(document[begin : match.end()].split())
        if count > most:
            return None
        if count < words or len(match[0]) < letters:
            continue
        if match[0] in _WORD.findall(document[begin : match.start()]):
            return match.end()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path, help="a JSON-lines file with a passage a line")
    parser.add_argument("--words", type=int, default=50, help="at least so many words in a passage")
    parser.add_argument("--most", type=int, default=100, help="at most so many")
    parser.add_argument("--letters", type=int, default=3, help="at least so many in the last word")
    args = parser.parse_args()
    found = passages(args.text.read_text(encoding="utf-8"), words=args.words, most=args.most, letters=args.letters)
    lines = [json.dumps({"text": passage}, ensure_ascii=False) for passage in found]
    args.out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{args.out}: {len(lines)} passages")


if __name__ == "__main__":
    main()
