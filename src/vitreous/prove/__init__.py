"""Paired measurements of two or more models on the same images and the same machine."""

from .answers import Answers, Changed, ClassChange, Guess, compare
from .cost import Cost
from .distances import FeatureError
from .drift import Drift
from .faithfulness import Faithfulness, faithfulness
from .latency import Latency, interleave
from .proof import Measured, Proof, prove
from .report import Picture, write_report
from .statistics import Interval
from .verdict import Verdict, verdict

__all__ = [
    "Answers",
    "Changed",
    "ClassChange",
    "Cost",
    "Drift",
    "Faithfulness",
    "FeatureError",
    "Guess",
    "Interval",
    "Latency",
    "Measured",
    "Picture",
    "Proof",
    "Verdict",
    "compare",
    "faithfulness",
    "interleave",
    "prove",
    "verdict",
    "write_report",
]
