"""`hydra/launcher=supervised`: the jobs of one batch together, in worker processes that kvbench watches.

Hydra finds the class here by itself, in the namespace package that all its plugins share. A sweeper hands over the
jobs of a batch; jobs of one model and data set share a process and their prompts, and each gets its objective back.
Hydra imports every plugin at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class SupervisedLauncher(Launcher):
    """Measures a batch of jobs in supervised workers; the settings of those are `worker.*`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what the jobs are composed from and run by. Raises: ConfigError for jobs that are not kvbench's."""
        from kvbench.cli.sweep import App
        from kvbench.config.compose import SharingLoader
        from kvbench.errors import ConfigError

        if not isinstance(task_function, App):
            raise ConfigError("hydra/launcher=supervised runs kvbench's jobs only; choose another launcher")
        # The sweeper's check of a batch goes through it too.
        self._jobs = SharingLoader(hydra_context.config_loader, config)
        hydra_context.config_loader = cast(ConfigLoader, self._jobs)
        self._context, self._app, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return one JobReturn per job, in order, whose value is the job's objective.

        A callback's `on_job_start` comes when the whole batch is measured. Raises: KvbenchError for a batch that
        cannot be run, HydraException for one that cannot be composed, both before anything is measured.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [self._job(words, number) for number, words in enumerate(job_overrides, initial_job_idx)]
        objectives = self._app.measure([self._app.composed(job) for job in jobs])
        return [self._returned(job, objective) for job, objective in zip(jobs, objectives, strict=True)]

    def _job(self, words: Sequence[str], number: int) -> DictConfig:
        job = self._jobs.take(words)
        with open_dict(job):
            job.hydra.job.id = f"{OmegaConf.select(job, 'hydra.job.name')}_{number}"
            job.hydra.job.num = number
        return job

    def _returned(self, job: DictConfig, objective: Any) -> JobReturn:
        returned = run_job(
            hydra_context=self._context,
            task_function=lambda config: objective,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        return returned
