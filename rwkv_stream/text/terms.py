"""Terms of a text in any language: what two spellings of one word have in common, for finding sentences by words.

A word is a run of letters, marks and digits (NFKC, casefold), so apostrophes and hyphens part words ("l'homme",
"well-known"), and a number loses the marks between its thousands. Its term is its Snowball stem in the language of the
text; irregular English forms have that of their word. Scripts that leave no space between words give overlapping pairs
of characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import Stemmer

LONGEST = 64  # characters of a word that count
_CACHED = 1 << 16  # stems kept by one `Analyzer`
_SURE = 0.04  # share of a text's words that are stop words of its language; of other languages' it is smaller

# Snowball's name of a language; the others keep their words as they are.
_STEMMERS = {
    "ar": "arabic",
    "ca": "catalan",
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "eo": "esperanto",
    "es": "spanish",
    "et": "estonian",
    "eu": "basque",
    "fa": "persian",
    "fi": "finnish",
    "fr": "french",
    "ga": "irish",
    "hi": "hindi",
    "hr": "serbian",
    "hu": "hungarian",
    "hy": "armenian",
    "id": "indonesian",
    "it": "italian",
    "lt": "lithuanian",
    "ne": "nepali",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sr": "serbian",
    "sv": "swedish",
    "ta": "tamil",
    "tr": "turkish",
    "yi": "yiddish",
}
# The first word of a letter's Unicode name → languages that are written so; where there are several, stop words decide.
_SCRIPTS = {
    "LATIN": "ca cs da de en eo es et eu fi fr ga hr hu id it la lt lv nl no pl pt ro sk sl sq sv sw tr vi",
    "CYRILLIC": "be bg ru sr uk",
    "ARABIC": "ar fa ur",
    "HEBREW": "he yi",
    "DEVANAGARI": "hi ne",
    "GREEK": "el",
    "ARMENIAN": "hy",
    "TAMIL": "ta",
    "TELUGU": "te",
    "BENGALI": "bn",
    "GUJARATI": "gu",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
# Scripts without spaces, each by itself: a change of script parts words in Japanese. Hangul has spaces, but its words
# carry particles that no stemmer here knows.
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = (
    _HAN,
    "\u3041-\u309f",
    "\u30a1-\u30ff",
    "\uac00-\ud7a3",
    "\u0e01-\u0e4f",
    "\u0e81-\u0ecd\u0edc-\u0edf",
    "\u1780-\u17d3",
    "\u1000-\u109f\uaa60-\uaa7f",
)
_FOLDER = Path(__file__).parent
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufeff]")  # within words
_THOUSANDS = re.compile(r"(?<=\d)[.,'’](?=\d{3}(?!\d))")


@cache
def _word() -> re.Pattern[str]:
    """A word, or (in a group of its own) a run of one script without spaces. Python's \\w knows no marks."""
    places = (*range(0x300, 0x3100), *range(0xA66F, 0xAC00), *range(0xFB1E, 0x20000))  # all that hold marks
    marks = "".join(chr(place) for place in places if unicodedata.category(chr(place))[0] == "M")
    runs = "|".join(f"[{script}]+" for script in _UNSPACED)
    return re.compile(f"({runs})|(?:(?![{''.join(_UNSPACED)}])(?:[^\\W_]|[{marks}]))+")


def words(text: str, language: str = "") -> list[str]:
    """The words of a text in their order, folded but not stemmed; of scripts without spaces pairs of characters."""
    if text.isascii() and language != "tr":
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
        if language == "tr":
            text = text.replace("İ", "i").replace("I", "ı")
        text = unicodedata.normalize("NFKC", text.casefold())
    text = _THOUSANDS.sub("", text)
    if text.isascii():
        return [word[:LONGEST] for word in _ASCII_WORD.findall(text)]
    found = []
    for match in _word().finditer(text):
        word = match[0]
        if match[1] is None or len(word) == 1:
            found.append(word[:LONGEST])
        else:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
    return found


@cache
def stop_words(language: str) -> frozenset[str]:
    """The commonest words of a language, question words among them, as `words` gives them; of an unknown one none."""
    return frozenset(words(listed(_FOLDER / "stop_words.txt").get(language, ""), language))


@cache
def _irregular() -> dict[str, str]:
    """Forms of English words that stemming does not join with the word: "went" → "go"."""
    return {form: word for word, forms in listed(_FOLDER / "irregular.txt").items() for form in forms.split()}


@cache
def listed(path: Path) -> dict[str, str]:
    """A file of lines `key: words`; one that is indented goes on, one with # is none."""
    lines = path.read_text("utf-8").replace("\n    ", " ").splitlines()
    found = (line.partition(": ") for line in lines if not line.startswith("#"))
    return {key: words for key, _, words in found}


class Analyzer:
    """Makes the terms of texts in one language; what it stemmed once it keeps."""

    def __init__(self, language: str) -> None:
        """`language` as ISO 639-1 code; words of one without a stemmer are their own terms."""
        self.language = language
        self.stop_words = stop_words(language)
        self._stemmer: Stemmer.Stemmer | None = None
        if language in _STEMMERS:
            import Stemmer

            self._stemmer = Stemmer.Stemmer(_STEMMERS[language], 0)  # its own cache is slower than ours
        self._irregular = _irregular() if language == "en" else {}
        self._stems: dict[str, str] = {}

    def terms(self, text: str) -> list[str]:
        """The terms of a text, in the order of its words; stop words are among them."""
        return [self.term(word) for word in words(text, self.language)]

    def term(self, word: str) -> str:
        """The term of one word as `words` gives it."""
        term = self._stems.get(word)
        if term is None:
            base = self._irregular.get(word, word)
            term = base if self._stemmer is None else self._stemmer.stemWord(base) or word
            if len(self._stems) == _CACHED:
                self._stems.clear()
            self._stems[word] = term
        return term


def version() -> str:
    """What terms depend on besides the text: postings of another version are made again."""
    import Stemmer

    return f"2 {Stemmer.version()}"


def language_of(text: str) -> str:
    """The ISO 639-1 code of a text's language, by its commonest script and its stop words; "" where they don't tell."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > scripts["CJK"] / 8:  # Japanese, where Han may be most of a text
        scripts["HIRAGANA"] += scripts["CJK"]
    if not scripts:
        return ""
    languages = _SCRIPTS.get(scripts.most_common(1)[0][0], "").split()
    if len(languages) < 2:
        return "".join(languages)
    found = words(text)
    counts = dict.fromkeys(languages, 0.0)
    for word, n in Counter(found).items():
        known = [language for language in languages if word in stop_words(language)]
        for language in known:
            counts[language] += n / len(known)  # what fewer languages have tells more
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] >= _SURE * len(found) else ""


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
