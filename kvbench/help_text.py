"""What `kvbench --help` prints, made from the configuration folder, without importing Hydra."""

from __future__ import annotations

from importlib.resources import files

_GROUPS = ("model", "weights", "dataset", "policy", "budget", "task", "workload", "sink", "autopsy", "experiment")
_TEXT = """\
kvbench compares KV-cache policies under one definition of everything.

  kvbench                                     run the default sweep, then print the table and write the report
  kvbench policy=h2o budget.fraction=0.3      run one cell
  kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
                                              run every combination
  kvbench +experiment=NAME                    run a named sweep
  kvbench report [FOLDER...] [--format F]     build page, figures and tables again from records; report --help
  kvbench audit [FOLDER] [--sweep NAME]       check that the records hold together; exit code 1 if one does not
  kvbench frontier policy=h2o,elastic         smallest budget as good as full; frontier --help
  kvbench plot NAME [FOLDER]                  draw one figure as SVG, PDF or PNG; kvbench plot --list
  kvbench results COMMAND [FOLDER]            list, show, table, csv, parquet, verify, gc; results --help
  kvbench wandb sync [FOLDER]                 send records to Weights & Biases; wandb sync --help

settings (KEY=VALUE):
{groups}
  positions    native, original, in_cache, released
  query_visible  true, false (picture or context is compressed before the question comes)
  beyond_context  refuse, allow (prompts that with their answer are longer than the model's context)
  engine       auto, eager, graph (the decode step as one CUDA graph); worker.* (processes, time limits)
  batch_size, seed, device (auto, cpu, cuda:N), results (folder), sweep (name), force (true: measure again)

  Any value of a group can be set: budget.fraction=0.3, policy.num_sinks=8, dataset.num_samples=100,
  task.speed.new_tokens=128, model.checkpoint=FOLDER, sink.wandb.mode=offline.

flags:
  -m, --multirun       run every combination of comma-separated values
  --config-dir DIR     add your own yamls, DIR/policy/mine.yaml with `_target_: mine.Mine`
  --cfg job            print the composed configuration and stop
  --version            print the version

exit codes: 0 all cells ok, 1 some cell failed, 2 wrong configuration, 130 or 143 stopped by a signal
"""


def help_text() -> str:
    """Return the help with the names that exist in each group."""
    return _TEXT.format(groups="\n".join(f"  {group:<12} {', '.join(_names(group))}" for group in _GROUPS))


def _names(group: str) -> list[str]:
    folder = files("kvbench.conf") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
