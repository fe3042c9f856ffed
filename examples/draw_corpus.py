"""Draw the sample that tdprobe ships from the human-rated sentences of vaderSentiment 3.3.2.

The draw is deterministic: the same archive always gives the same file, byte for byte.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python examples/draw_corpus.py vaderSentiment-3.3.2.tar.gz tdprobe/data/vader_sample.jsonl
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

REGISTERS = {
    "tweets": "tweets",
    "amazon_reviews": "amazonReviewSnippets",
    "movie_reviews": "movieReviewSnippets",
    "nyt_editorials": "nytEditorialSnippets",
}
PER_REGISTER = 200
LENGTH = range(40, 221)
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"

# What does not belong in a sample that everybody installs: swearing and links by pattern, the rest (abuse of
# persons, ethnic or sexual insult, private grief) by tweet number, after reading.
UNWANTED = re.compile(
    r"https?:|www\.|\S@\S|\d{3}-\d{4}|f+u+c*k|fck|sh( \*|[ie]+t)|bitch|\bass(es|h?oles?)?\b|\bdick"
    r"|\bpuss(y|ies)|\bcrap|\b(god)?damn|\bwtf|\bomfg|\bstfu|\b(lm|lmf|af)ao|\bbastard|\bpiss|\bporn|\bsex"
    r"|\brap(e|ed|ist|ing)\b|\bsuicid|\bretard|\bgay|\bhomo|\bwhore|\bslut|\bnaked|\bdie in\b",
    re.IGNORECASE,
)
LEFT_OUT = [350, 351, 524, 859, 1192, 1225, 1334, 1404, 1493, 1692, 2279, 2280, 2709, 2869, 3162, 3672]
LEFT_OUT += [3753, 3784, 3896, 3986, 4037, 4125, 4169]


def main(archive: str, target: str) -> None:
    """Read the source archive and write the sample as JSONL."""
    registers = [_draw(name, text) for name, text in _texts(archive)]
    rows = [row for group in zip(*registers, strict=True) for row in group]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(target).write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{len(rows)} rows -> {target}")


def _texts(archive: str) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as outer:
        packed = next(m for m in outer.getmembers() if m.name.endswith(INNER))
        inner = io.BytesIO(outer.extractfile(packed).read())
    with tarfile.open(fileobj=inner) as files:
        for register, stem in REGISTERS.items():
            member = next(m for m in files.getmembers() if m.name.endswith(f"{stem}_GroundTruth.txt"))
            yield register, files.extractfile(member).read().decode("utf-8")


def _draw(register: str, text: str) -> list[dict]:
    """Take rows in turn from the eight unit bins of the score, in hash order within a bin."""
    bins: dict[int, list[dict]] = defaultdict(list)
    seen = set()
    for row in sorted(_rows(register, text), key=_order):
        # The source rates one sentence in several typographies ("gross", "GROSS!!"): keep one of them.
        words = " ".join(re.findall(r"\w+", row["text"].lower()))
        if words not in seen:
            seen.add(words)
            bins[min(math.floor(row["score"]), 3)].append(row)
    turns = chain.from_iterable(zip_longest(*(bins[b] for b in sorted(bins))))
    return [row for row in turns if row is not None][:PER_REGISTER]


def _rows(register: str, text: str) -> Iterator[dict]:
    for line in text.splitlines():
        source_id, score, raw = line.split("\t", 2)
        row = {
            "text": _clean(raw),
            "score": round(float(score), 4),
            "register": register,
            "source_id": source_id,
        }
        unwanted = (register == "tweets" and int(source_id) in LEFT_OUT) or UNWANTED.search(row["text"])
        if len(row["text"]) in LENGTH and not unwanted:
            yield row


def _clean(text: str) -> str:
    # Some rows were escaped twice.
    text = html.unescape(html.unescape(text))
    text = re.sub(r"(?<!\w)@\w+", "@user", text)
    return " ".join(text.split())


def _order(row: dict) -> bytes:
    return hashlib.blake2b(f"{row['register']}/{row['source_id']}".encode(), digest_size=8).digest()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
