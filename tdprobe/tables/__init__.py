"""Scores with their labels."""

from tdprobe.tables.block import ScoreBlock, ScoreCube, ScoreRow
from tdprobe.tables.table import ScoreTable

__all__ = ["ScoreBlock", "ScoreCube", "ScoreRow", "ScoreTable"]
