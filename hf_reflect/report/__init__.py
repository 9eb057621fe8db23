"""What happened to the data: the papers' statistics of it, and one page on which people look at it."""

from .page import build_report
from .statistics import Statistics, statistics, table_of

__all__ = ["Statistics", "build_report", "statistics", "table_of"]
