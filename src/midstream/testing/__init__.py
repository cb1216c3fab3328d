"""Checks that a pipeline or loader resumes exactly, and that a node obeys the laws of datasets.

check_resume     stops, kills and resumes a pipeline or loader, and compares the samples
check_dataset    tries every law of datasets on a node or source of your own

content.py       names samples by their content
drivers.py       Session: makes, reads, saves and resumes loaders of any kind
counting.py      counts the source rows that are read
recording.py     Recording: every batch of a session, with a checkpoint after every step
promises.py      which part of the order is promised on another number of ranks
children.py      sessions in child processes, which can be killed
report.py        compares two runs; ResumeReport
attempts.py      one attempt to resume
plan.py          all checks, within the given time
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
