"""A human study: pairs of answers sampled, blinded and put on a page for raters, and what their votes come to.

two answer files → sample_items → write_study → raters rate on the page → read_ratings → win rate, agreement

`page` has what raters see and the key that they do not, `votes` what they said, and `files` how key and ratings are
read.
"""

from .page import GUIDANCE, TITLE, sample_items, write_study
from .votes import OUTCOMES, fleiss_kappa, majority, read_ratings

__all__ = [
    "GUIDANCE",
    "OUTCOMES",
    "TITLE",
    "fleiss_kappa",
    "majority",
    "read_ratings",
    "sample_items",
    "write_study",
]
