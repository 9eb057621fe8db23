"""A judge compares two models' answers, shown in both orders; win, tie and lose by the papers' rule.

asked twice a question       (ours, theirs) and (theirs, ours), since judges prefer a place
win                          better in both orders, or better in one and equal in the other
lose                         the mirror image; everything else is a tie
a review without two scores  unparsed: counted, shown, and never a tie
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BudgetExceeded, DataError, SettingsError, TeacherError
from .pairs import error_code
from .parsing import withheld
from .parsing.reply import shortened, whole
from .parsing.scores import Scores
from .parsing.scores import read_scores as read_scores
from .prompts import PROMPTS, JudgePrompt
from .teacher import Chat, Teacher
from .teacher.replies import Reply
from .teacher.stream import Ask, Verdict, too_many

if TYPE_CHECKING:
    from datasets import Dataset

OUTCOMES = ("win", "tie", "lose")
_RESAMPLES = 10_000


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
        nothing was parsed. Where all n outcomes are the same, a bootstrap has nothing to vary: the interval is then
        that of the rule of three, by which what was never seen has a probability of at most 3 / n (95 % confidence).
        So is share_interval where no question was won, or every one.

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
    interval, share_interval = _middle((drawn[:, 0] - drawn[:, 2]) / total + 1), _middle(drawn[:, 0] / total)
    unseen = min(3 / total, 1.0)  # how likely at most, by the rule of three
    if total == win:
        interval, share_interval = (2 - 2 * unseen, 2.0), (1 - unseen, 1.0)
    elif total == lose:
        interval = (0.0, 2 * unseen)
    elif total == tie:
        interval = (1 - unseen, 1 + unseen)
    if win == 0:
        share_interval = (0.0, unseen)
    return result | {
        "win_rate": (win - lose) / total + 1,
        "interval": interval,
        "share": win / total,
        "share_interval": share_interval,
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
        SettingsError: `teacher` or `prompt` is no such thing.
        TeacherError: the endpoint cannot be used; or past the teacher's `max_failure_rate` of the requests failed or
            brought no scores, checked from the 50th on; or no review at all has any. What a spent budget left out is
            no failure: it is in the table, with `error`.

    Source: arXiv 2402.10110, section 4.2 and Figure 4.
    """
    from datasets import Dataset

    prompt = prompt or PROMPTS["judge"]
    if not isinstance(prompt, JudgePrompt):
        raise SettingsError(f"`prompt` is a `JudgePrompt`, not a {type(prompt).__name__}.")
    if not isinstance(teacher, Teacher) and not callable(teacher):
        raise SettingsError(
            "`teacher` is the judge, a `Teacher` or a callable from a list of chats to a list of `Reply`, not a "
            f"{type(teacher).__name__}: `Teacher('gpt-5.4')`."
        )
    columns = _checked_columns({"questions": questions, "ours": ours, "theirs": theirs, "category": category})
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


def check_judges(judges: Iterable[Teacher], question: str) -> None:
    """Have each write one review, before hours are spent on answers: a TeacherError where one is of no use.

    The reviews stay in the ledger, so a second start asks nothing.
    """
    for judge in judges:
        judge.check_ready()
        chat = PROMPTS["judge"].chat(question, "I do not know.", "Nor do I, but I would look it up.")
        reply = ask_beforehand(judge, chat)
        if reply is not None and _read(reply) is None:
            raise _of_no_use([reply], 1, judge.max_failure_rate, judge.ledger)


def ask_beforehand(judge: Teacher, chat: Chat) -> Reply | None:
    """One reply of a judge, kept in its ledger and counted in its `stats`; None where it says nothing about the judge.

    So do what a filter withheld, and what a spent budget left out. It is asked for live, also where the judge takes
    batch jobs, since one may last a day.
    """
    live = replace(judge, mode="live")
    (reply,) = live([chat])
    judge.count(**live.stats)
    is_waived = error_code(reply.error or withheld(reply.finish_reason)) in ("refused", "budget")
    return None if is_waived else reply


def require_asked(judged: "Dataset", judge: Teacher) -> None:
    """Raise a BudgetExceeded where a limit left questions unjudged: what was judged is no result yet."""
    if waiting := [error for error in judged["error"] if error and "budget: " in error]:
        raise BudgetExceeded(
            f"The judge {judge.model!r} was not asked about {len(waiting)} of {len(judged)} questions, for a limit of "
            f"this ledger is reached ({shortened(waiting[0], 120)}).\nRaise it (`max_cost`, `max_requests`, "
            "`max_total_tokens`): the same command asks only the rest."
        )


def _features() -> Any:
    from datasets import Features, List, Value

    texts = ("question", "category", "ours", "theirs", "review", "review_reverse")
    scores = {name: List(Value("float64")) for name in ("scores", "scores_reverse")}
    text = Value("string")
    return Features({**dict.fromkeys(texts, text), **scores, "outcome": text, "error": text})


def _checked_columns(given: dict[str, Sequence[str] | None]) -> dict[str, list[str]]:
    columns: dict[str, list[Any]] = {}
    for name, values in given.items():
        if values is None and name == "category":
            values = [""] * len(columns["questions"])
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise DataError(
                f"`{name}` of `judge_pairs` is a list of texts, one a question, not {shortened(repr(values))}."
            )
        columns[name] = list(values)
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
    return {name: list(map(whole, values)) for name, values in columns.items()}


def _read(reply: Reply) -> Scores | None:
    return None if reply.error else read_scores(reply.text)


def _why(reply: Reply) -> str:
    return reply.error or f"unparsed: {shortened(reply.text, 80)!r}"


def _reviews(teacher: Teacher | Callable[[list[Chat]], list[Reply]], chats: list[Chat]) -> list[Reply]:
    """The reply to each chat; a TeacherError where they are of no use."""
    limit = getattr(teacher, "max_failure_rate", 0.2)
    if isinstance(teacher, Teacher):
        found: dict[str, Reply] = {}
        keys = [teacher.key(chat) for chat in chats]
        useless: list[Reply] = []

        def take(key: str, reply: Reply) -> Verdict:
            found[key] = reply
            unusable = _read(reply) is None
            if unusable and not _is_unasked(reply):
                useless.append(reply)
                if too_many(len(useless), len(found), limit):
                    raise _of_no_use(useless, len(found), limit, getattr(teacher, "ledger", None))
            return Verdict(unusable=unusable)

        asks = (Ask(key, teacher.request(chat), key) for key, chat in zip(keys, chats, strict=True))

        teacher.stream(asks, take, len(chats))
        replies = [found[key] for key in keys]
    else:
        replies = teacher(chats)
        are_replies = isinstance(replies, list) and all(
            isinstance(reply, Reply) and isinstance(reply.text, str) for reply in replies
        )
        if not are_replies or len(replies) != len(chats):
            raise TeacherError(f"The judge must return a list of {len(chats)} `Reply`, one a chat, in order.")
    answered = [reply for reply in replies if not _is_unasked(reply)]
    if answered and all(_read(reply) is None for reply in answered):
        raise _of_no_use(answered, len(answered), limit, getattr(teacher, "ledger", None))
    return [reply._replace(text=whole(reply.text)) for reply in replies]


def _is_unasked(reply: Reply) -> bool:
    """Whether a limit kept it from being asked, which is nobody's failure."""
    return (reply.error or "").startswith("budget:")


def _of_no_use(useless: list[Reply], asked: int, limit: float, ledger: str | None) -> TeacherError:
    """Whether it is the endpoint that fails, or the judge that keeps to no form: whichever is more often so."""
    failed = [reply for reply in useless if reply.error]
    if 2 * len(failed) >= len(useless):
        return TeacherError(
            f"{len(failed)} of {asked} requests to the judge failed (max_failure_rate={limit}); the first: "
            f"{shortened(failed[0].error or '', 200)}\nSee to the endpoint and run it again: reviews that came are in "
            "the ledger, and are not asked for again."
        )
    unread = Counter(_why(reply) for reply in useless if not reply.error)
    example, count = unread.most_common(1)[0]
    return TeacherError(
        f"{unread.total()} of {asked} reviews of the judge hold no two scores (max_failure_rate={limit}); "
        f"{count} such as {example}.\nThe judge is asked for a first line of two numbers: take another model, or give "
        "it more `max_tokens` if it thinks first. Reviews that came are kept"
        + (f" in {ledger}" if ledger else "")
        + " and not asked for again."
    )
