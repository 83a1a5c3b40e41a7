"""How the jobs of this command ended, as far as this process was told: by a job that ran in it, or by the
launcher that waits for jobs in other processes.
"""

from __future__ import annotations

from runners import CellOutcome

OUTCOMES: list[CellOutcome] = []
"""In the order in which they ended."""
