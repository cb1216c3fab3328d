"""Prove that a pipeline resumes exactly: yours, and other people's.

check_resume     stops and kills a pipeline or loader everywhere, and compares what comes after
check_dataset    the laws that every midstream node and source obeys, for those who write their own

content.py       batches as samples, known by content
drivers.py       loaders of every kind under one handle, and recordings of what they hand out
children.py      the same in processes of their own, which can be killed
report.py        comparison and report
resume.py        check_resume
laws.py          check_dataset
"""

from midstream.testing.laws import LawError, check_dataset
from midstream.testing.report import Check, Difference, ResumeError, ResumeReport
from midstream.testing.resume import check_resume

__all__ = [
    "Check",
    "Difference",
    "LawError",
    "ResumeError",
    "ResumeReport",
    "check_dataset",
    "check_resume",
]
