"""launch=slurm: the jobs of a sweep as one SLURM array, through submitit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher as HydrasLocalLauncher
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as HydrasSlurmLauncher
from omegaconf import OmegaConf

from runners.config import CONF
from runners.interrupt import Interrupted, StopSignal
from runners.jobs import Job, died, ended, left, pending, raised

log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0


class _Patient:
    """Waits for every job whatever became of the others. Hydra's launchers have the settings."""

    _EXECUTOR: str
    params: dict[str, Any]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is missing of the sweep. How jobs ended is in runners.outcomes."""
        jobs = pending(job_overrides)
        if jobs:
            self._run(jobs)
        return []

    def _run(self, jobs: Sequence[Job]) -> None:
        executor = self._executor()
        # Python in the job finds this code wherever the command was typed.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(CONF.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        waiting = dict(zip(submitted, jobs, strict=True))
        log.info("submitted %d jobs; their logs are in %s", len(jobs), self.params["submitit_folder"])
        with StopSignal() as stop:
            try:
                while waiting:
                    stop.check()
                    for task in [task for task in waiting if task.done()]:
                        _conclude(waiting.pop(task), task)
                    time.sleep(_POLL_SECONDS)
            except Interrupted:
                log.warning(
                    "%d jobs stay with the queue; the same command reads what they leave", len(waiting)
                )
                for job in waiting.values():
                    left(job)

    def _executor(self) -> Any:
        import submitit

        own = {key: value for key, value in self.params.items() if key not in _AT_START}
        start = {
            f"{self._EXECUTOR}_{key}": self.params[key] for key in ("max_num_timeout",) if key in self.params
        }
        executor = submitit.AutoExecutor(
            folder=self.params["submitit_folder"], cluster=self._EXECUTOR, **start
        )
        shared = set(OmegaConf.structured(BaseQueueConf))
        executor.update_parameters(
            **{key if key in shared else f"{self._EXECUTOR}_{key}": value for key, value in own.items()}
        )
        return executor


_AT_START = ("submitit_folder", "max_num_timeout")
"""Settings that an executor takes when it is made."""


class SlurmLauncher(_Patient, HydrasSlurmLauncher):
    """One SLURM array a sweep."""


class LocalLauncher(_Patient, HydrasLocalLauncher):
    """Processes of this machine in SLURM's place, all at once: for trying out."""


def _conclude(job: Job, task: Any) -> None:
    import submitit

    try:
        ended(job, task.results()[0])
    except submitit.core.utils.FailedJobError as error:
        raised(job, error)
    except submitit.core.utils.UncompletedJobError as error:  # no result: killed, out of time, cancelled
        died(job, error)
