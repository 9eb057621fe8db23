"""Ready checks of a teacher's rewrite: `ReflectionTransform(..., accept=same_language)`.

A check is called with the parent and its rewrite, two rows as plain dicts, and returns None to accept or what is wrong
with the rewrite, which becomes `check: …` in its `error`. Write your own the same way, at the top level of a module,
so that it can be pickled.
"""

import ast
import importlib
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from typing import Any

from .columns import question
from .errors import SettingsError

Row = dict[str, Any]
Check = Callable[[Row, Row], str | None]

# Measured on 6,800 cuttings of 3 words to 250 characters in 23 languages: from 40 bytes of letters on (some 7 words of
# English, 13 signs of Chinese) none was taken for another language at 0.7 or more. Lists of names, which are prose in
# no language, come higher (composers 0.4, Italian dishes 0.93): hence 0.9. At 0.95 plain sentences are lost too: of
# 100 Alpaca instructions, 64 of them long enough, 61 are told at 0.9 and 53 at 0.95.
ENOUGH_LETTERS = 40  # bytes of UTF-8
SURE = 0.9
LONGEST = 4000  # characters looked at; detection costs about 1.3 ms for a thousand
# What a detector cannot hold apart in a sentence or two, and nobody would call a change of language.
_RELATED = {
    **dict.fromkeys(("nb", "nn", "da"), "no"),
    **dict.fromkeys(("yue", "wuu"), "zh"),
    **dict.fromkeys(("arz", "ary"), "ar"),
    **dict.fromkeys(("bs", "hr"), "sr"),
    **dict.fromkeys(("ext", "an"), "es"),
    "ms": "id",
    "pcm": "en",
}
_UNTOLD = ("zxx", "la")  # no language at all; and what lists of species, anatomy and dummy text look like
_NO_PROSE = re.compile(r"`[^`\n]+`|https?://\S+|\S{1,64}@\S+|<[^<>\n]{1,200}>|\d+")


def same_language(parent: Row, rewrite: Row) -> str | None:
    """Refuse a rewrite that is in another language than its parent: a teacher that answers German data in English.

    A new instruction must be in the language of its parent's instruction or, since it is complete in itself and may
    quote the `input`, of that. A new response must be in the language of its parent's response, or of the instruction
    that it answers: "Translate into French" makes the two differ, and a translation may be explained in the language
    of whoever asked. What passes too: a text too short to tell (under 40 bytes of letters without code, links, numbers
    and markup), one of which the detector is not sure (below 0.9), and any text whose parent is such a one. Norwegian
    and Danish, Malay and Indonesian, Bosnian, Croatian and Serbian, the varieties of Chinese, of Arabic, and of
    Spanish count as one.

    In:  instruction, input, response of both rows.

    Raises:
        SettingsError: the package py3langid is missing.
    """
    if rewrite["instruction"] != parent["instruction"]:
        if found := _foreign(rewrite["instruction"], parent["instruction"], parent.get("input")):
            return f"the new instruction is in another language ({found[0]}) than its parent's ({found[1]})"
    if found := _foreign(rewrite["response"], parent["response"], rewrite["instruction"]):
        return f"the new response is in another language ({found[0]}) than its parent's ({found[1]})"
    return None


def code_still_parses(parent: Row, rewrite: Row) -> str | None:
    """Refuse a response whose fenced Python or JSON blocks do not parse, though its parent's do.

    A language of which the parent already has a broken block is not looked at, nor is a block that the instruction or
    its input quotes ("What is wrong with this code?"). Doctests, IPython cells, and code indented as a whole are read
    as what they are. Code that is nested too deeply to be parsed passes. Never raises.

    In:  response of both rows; instruction, input.
    """
    asked = question(rewrite["instruction"] or "", rewrite.get("input"))
    before = [(language, _broken(language, code)) for language, code in _blocks(parent["response"] or "")]
    ignored = {language for language, problem in before if problem}
    numbers = dict.fromkeys(_PARSERS, 0)
    for language, code in _blocks(rewrite["response"] or ""):
        numbers[language] += 1
        if language in ignored or code.strip() in asked:
            continue
        if problem := _broken(language, code):
            return f"{language} block {numbers[language]} does not parse: {problem}"
    return None


CHECKS: dict[str, Check] = {"same_language": same_language, "code_still_parses": code_still_parses}


def all_of(names: Sequence[str]) -> Check:
    """One check out of several, by their names in `CHECKS`; the first complaint wins.

    Raises:
        SettingsError: there is no such check.
    """
    if isinstance(names, str):
        names = [names]
    if unknown := [name for name in names if name not in CHECKS]:
        raise SettingsError(f"There is no check {', '.join(map(repr, unknown))}; there are {', '.join(CHECKS)}.")
    if "same_language" in names:
        _identifier()  # said before a teacher is paid, should its package be missing
    return partial(_first_complaint, tuple(names))


def _first_complaint(names: tuple[str, ...], parent: Row, rewrite: Row) -> str | None:
    return next((complaint for name in names if (complaint := CHECKS[name](parent, rewrite))), None)


# ---- language


def _foreign(text: str | None, *models: str | None) -> tuple[str, str] | None:
    """The language of the text and of the first model, where both are sure and no model has the text's."""
    spoken = _language(text or "")
    if spoken is None:
        return None
    expected = [_language(model or "") for model in models]
    return None if expected[0] is None or spoken in expected else (spoken, expected[0])


@lru_cache(maxsize=1024)  # a parent is compared with several rewrites, an instruction with several answers
def _language(text: str) -> str | None:
    """The language's code, relatives counted as one; None where nobody could be sure."""
    prose = _NO_PROSE.sub(" ", _without_code(text)[:LONGEST])
    if sum(len(sign.encode("utf-8", "replace")) for sign in prose if sign.isalpha()) < ENOUGH_LETTERS:
        return None
    shares: dict[str, float] = {}
    for code, share in _identifier().rank(prose):
        code = _RELATED.get(code, code)
        shares[code] = shares.get(code, 0.0) + share
    best = max(shares, key=lambda code: shares[code])
    return None if shares[best] < SURE or best in _UNTOLD else best


@cache
def _identifier() -> Any:
    try:
        langid = importlib.import_module("py3langid.langid")
    except ImportError as error:
        raise SettingsError(
            "The check `same_language` needs the package py3langid, which is not installed: "
            "`pip install 'hf_reflect[checks]'` or `pip install 'py3langid>=0.4,<0.5'`. Or leave the check out."
        ) from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


# ---- code

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*\{?\.?([\w+-]*)([^\n]*)")
_LANGUAGES = {"python": "python", "py": "python", "python3": "python", "json": "json"}


def _fenced(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """Pieces of the text: lines outside of code (None), and of each fenced block with its language as written."""
    prose: list[str] = []
    block: list[str] = []
    fence = indent = language = ""
    for line in text.replace("\r\n", "\n").split("\n"):
        found = _FENCE.match(line)
        if not fence:
            if found and "`" not in found[4]:  # else it is code inside a line
                yield None, prose
                prose, block = [], []
                indent, fence, language = found[1], found[2], found[3].lower()
            else:
                prose.append(line)
        elif found and found[2].startswith(fence) and not found[3] and not found[4].strip():
            yield language, block
            fence = ""
        else:
            block.append(line.removeprefix(indent))
    yield (language, block) if fence else (None, prose)


def _without_code(text: str) -> str:
    return "\n".join("\n".join(lines) for language, lines in _fenced(text) if language is None)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks in languages that can be parsed here."""
    for language, lines in _fenced(text):
        if language in _LANGUAGES:
            yield _LANGUAGES[language], "\n".join(lines)


def _broken(language: str, code: str) -> str | None:
    """The parser's own words, or None."""
    try:
        _PARSERS[language](code)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except ValueError as error:  # JSON; a null byte or half a surrogate pair in Python
        return str(error)
    except (RecursionError, MemoryError):
        return None
    return None


def _parse_python(code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is no error
        try:
            ast.parse(textwrap.dedent(code))
        except SyntaxError:
            plain = _from_session(code)
            if plain == code:
                raise
            ast.parse(textwrap.dedent(plain))


_PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.|In ?\[\d*\]:| *\.\.\.:)(?: |$)")
_MAGIC = re.compile(r"([ \t]*)(?:[%!].*|[\w.]+\?\??|\?\??[\w.]+)")


def _from_session(code: str) -> str:
    """What was typed in a doctest or an IPython cell, line for line; output is blank, and a magic is `pass`."""
    lines = code.split("\n")
    if any(re.match(r"[ \t]*(>>>|In ?\[\d*\]:)", line) for line in lines):
        lines = [line[found.end() :] if (found := _PROMPT.match(line)) else "" for line in lines]
    if lines and lines[0].startswith("%%"):
        return "pass"  # a cell in whatever language its magic says
    return "\n".join(found[1] + "pass" if (found := _MAGIC.fullmatch(line)) else line for line in lines)


def _parse_json(code: str) -> None:
    json.loads(code, parse_int=str)  # str: Python's limit on the digits of an integer is none of JSON's


_PARSERS: dict[str, Callable[[str], None]] = {"python": _parse_python, "json": _parse_json}
