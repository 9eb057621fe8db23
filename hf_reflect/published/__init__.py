"""The authors' published tables as candidates of hf_reflect; and whether the paper rule keeps as many as they say.

    python -m hf_reflect.published alpaca-7b

Their texts are four splits of one length, matched by position; their scores, one table a student, likewise. A pass
that failed when they scored is 0 there, and their script counts it as an IFD of 0, which passes both gates. Here it
is null. Source: arXiv 2402.10110, Table 1; github.com/tianyi-lab/Reflection_Tuning, selection_code.

`tables` has what they published and loads it, `checking` counts what is kept of it.
"""

from .checking import check_published, load_checked
from .tables import PUBLISHED, RATIO_COLUMNS, SPLITS, TEACHER, Published, load_published

__all__ = [
    "PUBLISHED",
    "RATIO_COLUMNS",
    "SPLITS",
    "TEACHER",
    "Published",
    "check_published",
    "load_checked",
    "load_published",
]
