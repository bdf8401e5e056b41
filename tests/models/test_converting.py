"""The script of docs/models.md that turns published pickles into safetensors, run as it is printed there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvbench.errors import ConfigError
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec
from tests.models.checkpoints import save_checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_pickled_parts_become_a_folder_that_loads(tmp_path: Path) -> None:
    script = re.search(r"<!-- convert.py -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert script is not None
    (tmp_path / "convert.py").write_text(script[1])
    folder = tmp_path / "qwen"
    folder.mkdir()
    save_checkpoint("qwen", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    with pytest.raises(ConfigError, match=r"no \.safetensors file; kvbench reads no pickle"):
        ModelSpec(checkpoint=str(folder))
    subprocess.run([sys.executable, tmp_path / "convert.py", folder], check=True)
    loaded = load_model(ModelSpec(checkpoint=str(folder)), "cpu").model.state_dict()
    assert set(loaded) == set(names)
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
