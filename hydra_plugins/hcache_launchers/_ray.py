"""launch=ray: the jobs of a sweep as Ray tasks, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher as HydrasRayLauncher
from omegaconf import OmegaConf

from runners.interrupt import Interrupted, StopSignal
from runners.jobs import Job, died, ended, left, pending, raised

log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 78643200
"""The least that Ray takes, for a cluster of our own: jobs exchange records on disk, not objects."""


class RayLauncher(HydrasRayLauncher):
    """Hydra's, whose settings it has; it waits for every job whatever became of the others."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is missing of the sweep. How jobs ended is in runners.outcomes."""
        jobs = pending(job_overrides)
        if jobs:
            settings: Any = OmegaConf.to_container(self.ray_cfg, resolve=True)
            _run(jobs, settings["init"], settings["remote"])
        return []


def _run(jobs: Sequence[Job], init: Mapping[str, Any], remote: Mapping[str, Any]) -> None:
    import ray

    _start(init)
    options = {**remote, "num_gpus": _gpus(remote.get("num_gpus"))}
    log.info("%d jobs, each with %s CPUs and %s GPUs", len(jobs), options["num_cpus"], options["num_gpus"])
    run = ray.remote(**options)(_call)
    with StopSignal() as stop:
        waiting = {run.remote(job): job for job in jobs}
        try:
            while waiting:
                stop.check()
                done, _ = ray.wait(list(waiting), timeout=1)
                for task in done:
                    _conclude(waiting.pop(task), task)
        except Interrupted:
            for task, job in waiting.items():
                ray.cancel(task)
                left(job)


def _call(job: Job) -> Any:
    return job()


def _start(init: Mapping[str, Any]) -> None:
    """Join the cluster at init.address; without one, start one that ends with this process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given = {key: value for key, value in init.items() if value is not None}
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    ray.init(**given if "address" in given else {**own, **given})


def _gpus(asked: float | None) -> float:
    """A job's share of the GPUs: as asked, else one where there are any."""
    import ray

    return asked if asked is not None else float("GPU" in ray.cluster_resources())


def _conclude(job: Job, task: Any) -> None:
    import ray

    try:
        ended(job, ray.get(task))
    except ray.exceptions.RayTaskError as error:
        raised(job, error)
    except ray.exceptions.RayError as error:  # its process, or its machine, is gone
        died(job, error)
