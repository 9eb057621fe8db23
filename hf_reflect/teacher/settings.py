"""What a teacher's settings may be: checked when it is made, long before anything is asked."""

import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError

if TYPE_CHECKING:
    from . import Teacher

_OWN_FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stream"}
# The name of an environment variable; a key holds other characters, or a long run of small letters and digits.
_VARIABLE = re.compile(r"[A-Z_][A-Z\d_]*|(?!\w*?(?=[A-Za-z]*\d)[A-Za-z\d]{20})[A-Za-z_]\w*", re.ASCII)
_NEEDED = ("max_concurrency", "max_tokens", "max_retries", "max_failure_rate", "timeout")  # cannot be None
_NUMBERS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("max_concurrency", "max_tokens"),
        "at least 1, a whole number",
        lambda n: isinstance(n, Integral) and int(n) >= 1,
    ),
    (("max_retries",), "0 or more, a whole number", lambda n: isinstance(n, Integral) and int(n) >= 0),
    (("max_failure_rate",), "a share between 0 and 1", lambda n: 0 <= n <= 1),
    (("timeout", "total_timeout", "requests_per_minute", "tokens_per_minute"), "positive", lambda n: n > 0),
    (("temperature", "top_p"), "0 or more, or None", lambda n: n >= 0),
    (
        ("price_per_million_input", "price_per_million_output", "max_cost", "max_requests", "max_total_tokens"),
        "0 or more",
        lambda n: n >= 0,
    ),
)


def check_settings(teacher: "Teacher") -> None:
    """Raise a SettingsError for values out of range, and for those that do not go together."""
    for name, allowed in (("on_budget", ("stop", "raise")), ("mode", ("live", "batch"))):
        if getattr(teacher, name) not in allowed:
            raise SettingsError(f'`{name}` is "{allowed[0]}" or "{allowed[1]}", not {getattr(teacher, name)!r}.')
    for names, words, holds in _NUMBERS:
        for name in names:
            value = getattr(teacher, name)
            if value is None and name not in _NEEDED:
                continue
            if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
                raise SettingsError(f"`{name}` must be {words}, not {value!r}.")
    if not isinstance(teacher.api_key_env, str) or not _VARIABLE.fullmatch(teacher.api_key_env):
        raise SettingsError(
            "`api_key_env` is the name of the environment variable that holds the key. What was given is no such "
            "name, and is not repeated here, since it may be the key itself: `export OPENAI_API_KEY=...`, and "
            "leave the argument out."
        )
    if teacher.base_url is not None and not teacher.base_url.startswith(("http://", "https://")):
        raise SettingsError("`base_url` begins with http:// or https://, such as http://localhost:8000/v1.")
    if teacher.max_cost is not None and None in (teacher.price_per_million_input, teacher.price_per_million_output):
        raise SettingsError(
            f"`max_cost={teacher.max_cost}` cannot be kept without prices: set `price_per_million_input` and "
            "`price_per_million_output`, or limit `max_total_tokens` or `max_requests`."
        )
    if named := sorted(_OWN_FIELDS & set(teacher.extra_body or ())):
        raise SettingsError(
            f"`extra_body` holds {', '.join(named)}, which would undo the limits, the ledger or the "
            "further attempts. Use the argument of that name, where there is one."
        )
    if teacher.mode == "batch" and teacher.api_version is not None:
        raise SettingsError("`mode=\"batch\"` speaks OpenAI's batch API, not Azure's: leave `api_version` out.")
