"""A judge compares two models' answers, shown in both orders; win, tie and lose by the papers' rule.

asked twice a question       (ours, theirs) and (theirs, ours), since judges prefer a place
win                          better in both orders, or better in one and equal in the other
lose                         the mirror image; everything else is a tie
a review without two scores  unparsed: counted, shown, and never a tie
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, SettingsError, TeacherError
from .parsing.reply import shortened, strip, whole
from .prompts import PROMPTS, JudgePrompt
from .teacher import Chat, Teacher
from .teacher.replies import Reply

if TYPE_CHECKING:
    from datasets import Dataset

Scores = tuple[float, float]  # ours, theirs
OUTCOMES = ("win", "tie", "lose")
HIGHEST = 10  # of the scale that the judge is given
_CHECKED_FROM = 50  # reviews
_RESAMPLES = 10_000

_NUMBER = r"(?<![\d./+-])(\d{1,2}(?:\.\d+)?)(?:\s*/\s*10|\s+out\s+of\s+10)?(?![\d/]|\.\d)"
_BETWEEN = r"(?:\s*[,;|&]\s*|\s+and\s+|\s+)"
_PAIR = re.compile(rf"(?i){_NUMBER}{_BETWEEN}{_NUMBER}")
# what may stand before two scores on their line, up to a colon
_LABEL = re.compile(r"(?i)[^:]*\b(?:scor|rat|assistant|answer|evaluat|verdict|result|point|grade)[^:]*:\s*")
_ONE = re.compile(
    rf"(?i)\bassistant\s*#?([12])\b(?:'s)?(?:\s+(?:overall\s+)?(?:answer|response|score|rating))*"
    rf"\s*(?:[:=–—-]|\b(?:is|gets|receives|scores|deserves)\b)\s*(?:an?\s+)?(?:overall\s+)?(?:score\s*(?:of|:)?\s*)?{_NUMBER}"
)
_MARKUP = str.maketrans("", "", '*_#`[](){}>"')


def read_scores(review: str) -> Scores | None:
    """The two scores in a judge's review, for the first and the second answer as they were shown; None without them.

    Read as "8 7", "8/10 7/10", "8.5, 7", "Scores: 8 7", "Assistant 1: 8" with "Assistant 2: 7" (in either order), or a
    number on each of two lines, also behind thinking or a sentence. What could be read in two ways is not read: three
    numbers, one, two different pairs, scores that are not from 0 to 10.
    """
    lines = [strip(line.translate(_MARKUP)) for line in whole(review).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return None
    found = [pair for line in lines if (pair := _only_scores(line))]
    if not found and (begun := _PAIR.match(lines[0])):  # the explanation follows on the same line
        rest = lines[0][begun.end() :].lstrip()
        if not re.match(_NUMBER, rest.lstrip(".,;:- ")):
            found = [_scores(begun)]
    if (first := _only_scores(lines[0])) is not None:
        found = [first]  # as asked for; what the explanation says later is no score
    elif not found:
        found = _labelled(lines) or _stacked(lines)
    if len(set(found)) != 1 or not all(0 <= score <= HIGHEST for score in found[0]):
        return None
    return found[0]


def _scores(match: re.Match[str]) -> Scores:
    return float(match[1]), float(match[2])


def _only_scores(line: str) -> Scores | None:
    """Two scores, perhaps a label before them, and nothing else."""
    label = _LABEL.match(line)
    if label and re.sub(r"\D", "", label[0]) not in ("", "12"):
        return None  # "Assistant 1:" names one, not both
    match = _PAIR.fullmatch((line[label.end() :] if label else line).rstrip(" ."))
    return _scores(match) if match else None


def _labelled(lines: list[str]) -> list[Scores]:
    """The scores that are given by the assistants' names, if each has one."""
    given: dict[str, set[float]] = {"1": set(), "2": set()}
    for match in _ONE.finditer("\n".join(lines)):
        given[match[1]].add(float(match[2]))
    if any(len(scores) != 1 for scores in given.values()):
        return []
    return [(given["1"].pop(), given["2"].pop())]


def _stacked(lines: list[str]) -> list[Scores]:
    """One number on each of the first two lines, and none on the third."""
    alone = [re.fullmatch(rf"(?i){_NUMBER}", line.rstrip(" .")) for line in lines[:3]]
    if len(alone) < 2 or not (alone[0] and alone[1]) or (len(alone) > 2 and alone[2]):
        return []
    return [(float(alone[0][1]), float(alone[1][1]))]


def outcome_of(scores: Scores | None, scores_reverse: Scores | None) -> str | None:
    """win, tie or lose from our side, by two pairs (ours, theirs), one per order; None where one was not parsed."""
    if scores is None or scores_reverse is None:
        return None
    balance = sum(int(np.sign(ours - theirs)) for ours, theirs in (scores, scores_reverse))
    return "win" if balance > 0 else "lose" if balance < 0 else "tie"


def win_rate(scores: Iterable[Any], seed: int = 0) -> dict[str, Any]:
    """Win, tie, lose and what they come to.

    Args:
        scores: of each question ((ours, theirs), (ours, theirs)), one pair per order; a pair, or the whole, is None
            where the judge's review could not be read.
        seed: of the bootstrap.

    Returns:
        win, tie, lose, unparsed (questions); win_rate, (win − lose) / all + 1, so that 1 means equal; interval (low,
        high), its 95 % bootstrap interval over questions; share (of wins), share_interval; the rates are None where
        nothing was parsed.

    Raises:
        DataError: something that is no pair of numbers.

    Source: arXiv 2402.10110, section 4.3 and Table 4.
    """
    return rate_of([_checked_outcome(number, item) for number, item in enumerate(scores)], seed)


def _checked_outcome(number: int, item: Any) -> str | None:
    if item is None:
        return None
    try:
        first, second = item
        pairs = [None if pair is None else tuple(map(float, pair)) for pair in (first, second)]
        if any(pair is not None and (len(pair) != 2 or not np.isfinite(pair).all()) for pair in pairs):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"`win_rate` found {item!r} at place {number}; of each question it takes ((ours, theirs), (ours, "
            "theirs)), a pair of scores per order, or None where a review could not be read."
        ) from None
    return outcome_of(*pairs)  # type: ignore[arg-type]


def rate_of(outcomes: Iterable[str | None], seed: int = 0) -> dict[str, Any]:
    """As `win_rate`, from outcomes: win, tie, lose, or None for what was not parsed."""
    counts = Counter(outcomes)
    if strange := set(counts) - {*OUTCOMES, None}:
        raise DataError(f"An outcome is win, tie, lose or None, not {sorted(map(str, strange))[0]!r}.")
    win, tie, lose = (counts[name] for name in OUTCOMES)
    result: dict[str, Any] = {"win": win, "tie": tie, "lose": lose, "unparsed": counts[None]}
    if not (total := win + tie + lose):
        return result | dict.fromkeys(("win_rate", "interval", "share", "share_interval"))
    # questions drawn with replacement: how many of each outcome there are is all that matters
    drawn = np.random.default_rng(seed).multinomial(total, np.array([win, tie, lose]) / total, _RESAMPLES)
    rates = (drawn[:, 0] - drawn[:, 2]) / total + 1
    return result | {
        "win_rate": (win - lose) / total + 1,
        "interval": _middle(rates),
        "share": win / total,
        "share_interval": _middle(drawn[:, 0] / total),
    }


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Between which 95 % of them lie."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def win_rates(judged: "Dataset") -> dict[str, Any]:
    """The table of a judged comparison: pooled, per test set, and per category.

    In:  outcome, optionally test_set, category (as `judge_pairs` gives them)
    Out: {"pooled": …, "test_set": {name: …}, "category": {name: …}}, each as `win_rate` gives it
    """
    outcomes = judged["outcome"][:]
    rates: dict[str, Any] = {"pooled": rate_of(outcomes)}
    for column in ("test_set", "category"):
        if column in judged.column_names:
            groups: dict[str, list[str | None]] = {}
            for name, outcome in zip(judged[column], outcomes, strict=True):
                groups.setdefault(name, []).append(outcome)
            rates[column] = {name: rate_of(some) for name, some in groups.items() if name}
    return rates


def judge_pairs(
    questions: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    teacher: Teacher | Callable[[list[Chat]], list[Reply]],
    category: Sequence[str] | None = None,
    prompt: JudgePrompt | None = None,
) -> "Dataset":
    """Have a judge compare two models' answers to each question, in both orders.

    In:  questions, ours, theirs, in the same order (for files see `evaluation.answers.matched`)     (N each)
    Out: question, category, ours, theirs, review, review_reverse (text, null where none came), scores,
         scores_reverse ([ours, theirs] whichever was shown first, null where unparsed), outcome (win, tie, lose;
         null unless both reviews were parsed), error (why it is null)                               (N rows)

    Every review is in the teacher's ledger before it is used: a rerun asks only what is missing, limits hold.

    Args:
        questions: what both were asked.
        ours: the answers of the model that may win.
        theirs: the answers that it is compared with.
        teacher: the judge: a `Teacher`, or a callable from a list of chats to a list of `Reply`.
        category: of each question, for `win_rates`.
        prompt: `PROMPTS["judge"]` unless given; `read_scores` must be able to read what it asks for.

    Raises:
        DataError: the lists are not equally long, a text is missing, there are no questions.
        TeacherError: the endpoint cannot be used; or past the teacher's `max_failure_rate` of reviews without scores,
            checked from the 50th on; or no review at all has any.

    Source: arXiv 2402.10110, section 4.2 and Figure 4.
    """
    from datasets import Dataset

    prompt = prompt or PROMPTS["judge"]
    if not isinstance(prompt, JudgePrompt):
        raise SettingsError(f"`prompt` is a `JudgePrompt`, not a {type(prompt).__name__}.")
    columns = {"questions": list(questions), "ours": list(ours), "theirs": list(theirs)}
    columns["category"] = list(category) if category is not None else [""] * len(columns["questions"])
    _check_columns(columns)
    pairs = list(zip(columns["questions"], columns["ours"], columns["theirs"], strict=True))
    # both orders of a question next to each other
    chats = [chat for q, a, b in pairs for chat in (prompt.chat(q, a, b), prompt.chat(q, b, a))]
    reviews = _reviews(teacher, chats)
    rows = []
    for number, (question, our, their) in enumerate(pairs):
        one, other = reviews[2 * number : 2 * number + 2]
        scores, reverse = _read(one), _read(other)
        flipped = None if reverse is None else (reverse[1], reverse[0])
        wrong = [f"{_why(reply)}" for reply, read in ((one, scores), (other, reverse)) if read is None]
        rows.append(
            {
                "question": question,
                "category": columns["category"][number],
                "ours": our,
                "theirs": their,
                "review": None if one.error else one.text,
                "review_reverse": None if other.error else other.text,
                "scores": scores,
                "scores_reverse": flipped,
                "outcome": outcome_of(scores, flipped),
                "error": "; ".join(wrong) or None,
            }
        )
    return Dataset.from_list(rows, features=_features())


def _features() -> Any:
    from datasets import Features, List, Value

    texts = ("question", "category", "ours", "theirs", "review", "review_reverse")
    scores = {name: List(Value("float64")) for name in ("scores", "scores_reverse")}
    text = Value("string")
    return Features({**dict.fromkeys(texts, text), **scores, "outcome": text, "error": text})


def _check_columns(columns: dict[str, list[Any]]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise DataError(f"`judge_pairs` needs one of each for every question, but found {found}. Match them first.")
    if not columns["questions"]:
        raise DataError("`judge_pairs` found no questions, so there is nothing to compare.")
    for name, values in columns.items():
        for place, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"`judge_pairs` found {value!r} at place {place} of `{name}`, which should be a text.")


def _read(reply: Reply) -> Scores | None:
    return None if reply.error else read_scores(reply.text)


def _why(reply: Reply) -> str:
    return reply.error or f"unparsed: {shortened(reply.text, 80)!r}"


def _reviews(teacher: Teacher | Callable[[list[Chat]], list[Reply]], chats: list[Chat]) -> list[Reply]:
    """The reply to each chat; a TeacherError where they are of no use."""
    from .teacher.stream import Ask, Verdict

    limit = getattr(teacher, "max_failure_rate", 0.2)
    if isinstance(teacher, Teacher):
        found: dict[str, Reply] = {}
        keys = [teacher.key(chat) for chat in chats]
        useless: list[str] = []

        def take(key: str, reply: Reply) -> Any:
            found[key] = reply
            if _read(reply) is None and not (reply.error or "").startswith("budget"):
                useless.append(_why(reply))
                if len(found) >= _CHECKED_FROM and len(useless) > limit * len(found):
                    raise _never_in_form(useless, len(found), limit)
            return Verdict(unusable=_read(reply) is None)

        asks = (Ask(key, teacher.request(chat), key) for key, chat in zip(keys, chats, strict=True))

        teacher.stream(asks, take, len(chats))
        replies = [found[key] for key in keys]
    else:
        replies = teacher(chats)
        if not isinstance(replies, list) or len(replies) != len(chats):
            raise TeacherError(f"The judge must return a list of {len(chats)} `Reply`, one a chat, in order.")
    wrong = [_why(reply) for reply in replies if _read(reply) is None]
    if len(wrong) == len(replies):
        raise _never_in_form(wrong, len(replies), limit)
    return replies


def _never_in_form(wrong: list[str], answered: int, limit: float) -> TeacherError:
    example, count = Counter(wrong).most_common(1)[0]
    return TeacherError(
        f"{len(wrong)} of {answered} reviews of the judge hold no two scores (max_failure_rate={limit}); "
        f"{count} such as {example}.\nThe judge is asked for a first line of two numbers: take another model, or give "
        "it more `max_tokens` if it thinks first. Reviews that came are in the ledger, and are not asked for again."
    )
