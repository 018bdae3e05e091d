"""Search over the made-up encyclopaedia: BM25 by the package ``bm25s``, and pages by their title."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

import numpy as np

from envs.search.corpus import Corpus, Style, parts
from posttrain.errors import ToolError

NEXT = "next: "
"""Stands before the title under which a long page goes on."""

_MOST_WORDS = 64
"""Of a query; the rest is not looked at."""
_K1 = 0.1
"""Low: a page says its own name in every sentence, and how often means little."""


def words(text: str) -> list[str]:
    """What is indexed of ``text``."""
    return re.findall("[a-z]+|[0-9]+", text.lower())


def _sought(query: str) -> list[str]:
    return words(query)[:_MOST_WORDS]


class Library:
    """A corpus with its index."""

    def __init__(self, corpus: Corpus) -> None:
        # Not at the top: it takes longer to import than everything else that a config's check needs.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        self.corpus = corpus
        self._titles = list(corpus.things)
        self._pages = {title: corpus.page(title) for title in self._titles}
        # With the title, a page that says its name but once comes before those that mention it.
        tokens = [words(title) + words(page) for title, page in self._pages.items()]
        self._known = {w for page in tokens for w in page}
        self._bm25 = bm25s.BM25(k1=_K1, backend="numpy")
        self._bm25.index(tokens, show_progress=False)

    def find(self, query: str, n: int) -> list[str]:
        """At most ``n`` titles of pages that hold a word of ``query``, the best first; equals in a fixed order."""
        known = [w for w in _sought(query) if w in self._known]
        if not known:
            return []
        # Rounded, for the last bits depend on the machine.
        scores = np.round(self._bm25.get_scores(known), 4)
        best = np.argsort(-scores, kind="stable")[:n]
        return [self._titles[i] for i in best if scores[i] > 0]

    def search(self, query: str, results: int, snippet: int) -> str:
        """One line a page found: its title and up to ``snippet`` words of the sentence that fits ``query`` best.
        Raises ToolError if no page has a word of it."""
        titles = self.find(query, results)
        if not titles:
            raise ToolError("error: nothing found")
        return "\n".join(f"{t}: {self._snippet(t, query, snippet)}" if snippet else t for t in titles)

    def _snippet(self, title: str, query: str, most: int) -> str:
        asked = set(_sought(query)) - set(words(title))
        _, *sentences = parts(self._pages[title], 1)  # the first one says what the title does
        best = max(sentences, key=lambda s: len(asked & set(words(s)))).split()
        return " ".join(best[:most]) + (" ..." if len(best) > most else "")

    def browse(self, title: str, part: int) -> str:
        """The page ``title``, or its part ``k`` if it ends with `` part k``; parts have about ``part`` words. Raises
        ToolError if there is none."""
        name, _, number = " ".join(title.lower().split()).partition(" part ")
        if name not in self._pages:
            raise ToolError("error: no page")
        pieces = parts(self._pages[name], part)
        k = int(number or 1) if re.fullmatch("[0-9]{0,3}", number) else 0
        if not 1 <= k <= len(pieces):
            raise ToolError("error: no part")
        return pieces[k - 1] + (f"\n{NEXT}{name} part {k + 1}" if k < len(pieces) else "")


@lru_cache(maxsize=4)
def library(pages: int, seed: int, style: Style, fillers: int) -> Library:
    """Made on first use and kept: sessions, and worlds that say the same, share it."""
    return Library(Corpus(pages, seed, style, fillers))
