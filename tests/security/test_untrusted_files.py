"""Files from others are data: nothing in a checkpoint, a results folder or a setting gets to run."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path

import pytest

from kvbench.cli.main import run
from kvbench.errors import ConfigError, KvbenchError, ModelSupportError
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec, check_folder_code, check_hub_code
from kvbench.results.claims import Claims
from kvbench.results.store import PartialStore, RecordStore
from tests.covering import one_in
from tests.models.checkpoints import save_checkpoint
from tests.results.record_bodies import make_body

REPO = Path(__file__).parents[2]
CODE = sorted(path for folder in ("kvbench", "policies") for path in (REPO / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "numpy.lib.npyio"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "torch.save", "yaml.load", "np.load", "numpy.load"}


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


# What one expression pickles and reads back has not left the process, so it copies and reads nothing from outside.
A_COPY = "pickle.loads(pickle.dumps(config))"


def called(tree: ast.AST) -> list[tuple[str, list[str]]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), [ast.unparse(word) for word in call.keywords]) for call in calls]


def test_no_file_of_the_project_unpickles_or_evaluates() -> None:
    assert len(CODE) > 100
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        if path.match("config/compose.py"):
            text = text.replace(A_COPY, "config").replace("import pickle\n", "")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}, path
        for name, keywords in called(tree):
            assert name not in FORBIDDEN_CALLS, (path, name)
            assert not name.startswith("pickle."), (path, name)
            assert name != "torch.load" or "weights_only=True" in keywords, path
            assert not name.endswith("read_pickle"), (path, name)
            if name.endswith("from_pretrained") and "auto" in name and "dtype" in " ".join(keywords):
                assert "use_safetensors=True" in keywords, f"weights come from safetensors only, in {path}"
            if name == "instantiate":
                assert path.match("config/build.py"), f"settings never become calls by themselves, in {path}"


def test_the_search_for_forbidden_calls_finds_them() -> None:
    assert ("torch.load", ["weights_only=True"]) in called(ast.parse("torch.load(x, weights_only=True)"))
    assert ("eval", []) in called(ast.parse("def f():\n    return [eval(x)]"))


def with_own_code(folder: Path, family: str | None) -> Path:
    """Give a good checkpoint code of its own, which leaves a trace when it is imported."""
    save_checkpoint("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_code.MyConfig", "AutoModelForCausalLM": "own_code.MyModel"}
    (folder / "config.json").write_text(json.dumps(config | ({"model_type": family} if family else {})))
    trace = f"open({str(folder / 'trace')!r}, 'w').write('ran')\n"
    (folder / "own_code.py").write_text(trace + "from transformers import LlamaConfig as MyConfig\n")
    return folder


def test_own_code_beside_a_known_family_is_not_run(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model", None)
    assert type(load_model(ModelSpec(checkpoint=str(folder)), "cpu").model).__module__.startswith("transformers.")
    assert not (folder / "trace").exists()


def test_a_family_that_needs_its_own_code_is_refused_without_running_it(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model", "my_family")
    with pytest.raises(ModelSupportError):
        load_model(ModelSpec(checkpoint=str(folder)), "cpu")
    assert not (folder / "trace").exists()


def test_code_of_another_repository_is_refused_although_code_is_trusted(tmp_path: Path) -> None:
    """Read as from the hub: the settings are fetched by transformers, and checked before any code is."""
    folder = with_own_code(tmp_path / "model", "my_family")
    check_hub_code(str(folder), None)
    config = json.loads((folder / "config.json").read_text())
    for name in ("config.json", "tokenizer_config.json"):
        before = (folder / name).read_text()
        changed = {**json.loads(before), "auto_map": {"AutoConfig": ["someone/repo--own_code.MyConfig", None]}}
        (folder / name).write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"takes code from another repository \(someone/repo--own_code"):
            check_hub_code(str(folder), None)
        with pytest.raises(ConfigError, match="does not cover, as nothing pins it"):
            check_folder_code(folder)
        (folder / name).write_text(before)
    assert config["auto_map"]
    assert not (folder / "trace").exists()


def test_pickled_weights_beside_safetensors_are_not_read(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "trace")))
    load_model(ModelSpec(checkpoint=str(folder)), "cpu")
    for name in folder.glob("*.safetensors"):
        name.unlink()
    with pytest.raises(KvbenchError, match="kvbench reads no pickle"):
        ModelSpec(checkpoint=str(folder))
    assert not (tmp_path / "trace").exists()


def test_pickles_in_a_results_folder_are_reported_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, evil = tmp_path / "results", pickle.dumps(Canary(tmp_path / "trace"))
    body = make_body()
    labels = dict.fromkeys(("model", "dataset", "policy", "budget", "positions"), "x")
    RecordStore(results).commit(make_body(1, labels=labels))
    cell = RecordStore(results).cell_folder(body["key"])
    (cell / "batches").mkdir(parents=True)
    (results / "claims").mkdir()
    for path in (
        cell / "record.json",
        cell / f"attempt-{body['attempt']}.json",
        cell / "batches" / "0.json",
        results / "claims" / f"{body['key'][:16]}.1",
        results / "table.parquet",
    ):
        path.write_bytes(evil)
    assert RecordStore(results).accepted(body["key"]) is None
    assert PartialStore(results, body["key"]).batches() == {}
    assert Claims(results).take(body["key"]) is None
    assert run(["results", "list", str(results)]) == 0
    assert "1 cells, 1 problems" in capsys.readouterr().out
    assert run(["results", "verify", str(results)]) == 1
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "words",
    one_in(
        3,
        [
            "policy._target_=os.system",
            "policy._target_=builtins.exec",
            "policy._target_=builtins.open",
            "policy._target_=subprocess.Popen",
            "policy._target_=pickle.loads",
            "dataset._target_=os.makedirs",
            "sink.wandb._target_=shutil.rmtree",
            "sink.wandb._target_=code.InteractiveInterpreter",
            "task.memory._target_=subprocess.run",
            "model._target_=subprocess.Popen",
            "budget._target_=asyncio.create_subprocess_shell",
            "+policy.recent_fraction._target_=os.system",
            "+policy.x={_target_:os.makedirs,name:trace}",
        ],
    ),
)
def test_a_setting_cannot_call_anything(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["policy=h2o", words, "results=out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
