"""Independent units of text: documents that share a paragraph belong together.

A paragraph's key is the hash of its text, case folded and with whitespace collapsed. Paragraphs of fewer than
`TRIVIAL_CHARACTERS` such characters (headings, "Parameters ---------", list markers) are trivial: they link nothing.
A paragraph that stands in more than `BOILERPLATE_DOCUMENTS` documents (licences, copied parameter descriptions) is
boilerplate: left in, it would glue a corpus into one unit, so it is taken out of the text everywhere and counted.
Documents that share any other paragraph are one unit (union-find), and a document that repeats another is dropped.
The order is that of the documents.

Left out: near-duplicate detection (MinHash); two documents that share no whole paragraph are independent here.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lowprec.steps.sources import Document, paragraphs

TRIVIAL_CHARACTERS = 40
BOILERPLATE_DOCUMENTS = 3
UNWRAPPED_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """`members` are documents by unit, with duplicates and boilerplate paragraphs removed."""

    members: tuple[tuple[Document, ...], ...]
    duplicate_documents: int
    boilerplate_paragraphs: int


def paragraph_keys(text: str) -> list[tuple[str, bytes | None]]:
    """Each paragraph of `text` with the hash of its normalised form; None for a trivial one.

    Where a line has `UNWRAPPED_CHARACTERS` or more the text is not wrapped, and a line is a paragraph.
    """
    result: list[tuple[str, bytes | None]] = []
    for block in paragraphs(text):
        lines = block.split("\n")
        for paragraph in lines if max(map(len, lines)) >= UNWRAPPED_CHARACTERS else [block]:
            normal = _normal(paragraph)
            trivial = len(normal) < TRIVIAL_CHARACTERS
            result.append((paragraph, None if trivial else hashlib.blake2b(normal.encode(), digest_size=16).digest()))
    return result


def find_units(documents: Iterable[Document]) -> Units:
    """Joins documents that share a paragraph; the order of units and members is that of `documents`."""
    documents = tuple(documents)
    distinct: dict[bytes, Document] = {}
    for document in documents:
        distinct.setdefault(hashlib.sha256(_normal(document.text).encode()).digest(), document)
    kept = tuple(distinct.values())
    keyed = [paragraph_keys(document.text) for document in kept]
    holders = Counter(key for pairs in keyed for key in {key for _, key in pairs if key is not None})
    boilerplate = {key for key, count in holders.items() if count > BOILERPLATE_DOCUMENTS}
    members: dict[int, list[Document]] = defaultdict(list)
    for document, pairs, root in zip(kept, keyed, _joined(keyed, boilerplate), strict=True):
        text = document.text
        if any(key in boilerplate for _, key in pairs):
            text = "\n\n".join(paragraph for paragraph, key in pairs if key not in boilerplate)
        if text.strip():
            members[root].append(Document(source=document.source, text=text, name=document.name))
    return Units(
        members=tuple(tuple(group) for group in members.values()),
        duplicate_documents=len(documents) - len(kept),
        boilerplate_paragraphs=len(boilerplate),
    )


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _joined(keyed: list[list[tuple[str, bytes | None]]], ignored: set[bytes]) -> list[int]:
    """For each document the number of the first one that it is joined to, over any chain of shared paragraphs."""
    parents = list(range(len(keyed)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[bytes, int] = {}
    for i, pairs in enumerate(keyed):
        for _, key in pairs:
            if key is not None and key not in ignored:
                a, b = root(first.setdefault(key, i)), root(i)
                parents[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(keyed))]
