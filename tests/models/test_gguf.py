"""GGUF files, written here by the package of their format: what is loaded is what was written, the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.datasets.base import Example
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.models import gguf as gguf_files
from kvbench.models.gguf import parsed_once
from kvbench.models.inputs import answer_tokens, prompt_batch, prompt_ids
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec
from tests.models.checkpoints import WITH_LINES, text_model, tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

EXAMPLE = Example(id="a", cluster="a", question="What is it?", reference="A small red dot.")
Change = Callable[[Any], None]


def write_gguf(
    path: Path,
    *,
    family: str = "llama",
    kind: str = "F32",
    change: Change = lambda writer: None,
    with_tokenizer: bool = True,
    leave_out: str = "nothing",
) -> Any:
    """Write a random model of `family` with its tokenizer; return the model."""
    wide = {"head_dim": 128} if family == "qwen3" else {}  # every Qwen3's, and what transformers takes for it
    model, words = text_model(family, **wide), tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if with_tokenizer:
        _add_tokenizer(writer, words)
    change(writer)
    names = gguf.get_tensor_name_map(_architecture(family), config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        values = _as_stored(name, parameter.numpy(), config) if family == "llama" else parameter.numpy()
        if leave_out in name:
            continue
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 and values.shape[1] % 32 == 0 else "F32"]
        raw = gguf.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: Any, words: Any) -> None:
    vocabulary = sorted(words.get_vocab().items(), key=lambda entry: entry[1])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in words.all_special_tokens else 1 for token, _ in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)
    writer.add_chat_template(WITH_LINES)


def _architecture(family: str) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)


def _as_stored(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Return queries and keys in pairs of neighbours, as llama.cpp rotates them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((number for part, number in heads.items() if part in name), None)
    if found is None:
        return values
    return values.reshape(found, 2, len(values) // found // 2, -1).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_gives_the_model_tokens_and_template_that_were_written(family: str, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "a.gguf", family=family)
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")
    assert loaded.model.config.model_type == family
    held, given = loaded.model.state_dict(), written.state_dict()
    assert held.keys() == given.keys()
    assert all(torch.equal(held[name], given[name]) for name in given)
    assert loaded.chat_template == WITH_LINES
    assert loaded.end_token_ids == {tokenizer().eos_token_id}
    text = "<|user|>\nWhat is it?\n<|assistant|>\n"
    assert prompt_ids(loaded, EXAMPLE) == tokenizer()(text, add_special_tokens=False)["input_ids"]
    batch = prompt_batch(loaded, [EXAMPLE])
    assert loaded.tokenizer.decode(answer_tokens(loaded, EXAMPLE)[:-1]) == "A small red dot."
    with torch.inference_mode():
        ours, theirs = loaded.model(**batch.tensors).logits, written.eval()(**batch.tensors).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", "float32"), ("Q4_1", "bfloat16"), ("F16", "float16")])
def test_weights_are_dequantised_and_the_kinds_of_blocks_are_in_the_key(kind: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    written = write_gguf(path, kind=kind)
    spec = ModelSpec(checkpoint=str(path), dtype=dtype)
    weight = load_model(spec, "cpu").model.model.embed_tokens.weight
    assert weight.dtype == getattr(torch, dtype)
    stored = gguf.GGMLQuantizationType[kind]
    table = written.model.embed_tokens.weight.detach().numpy()
    dense = gguf.dequantize(gguf.quantize(table, stored), stored)
    assert torch.equal(weight, torch.from_numpy(dense.astype(np.float32)).to(weight.dtype))
    types = spec.key()["gguf_types"]
    assert types.keys() == {"F32", kind}
    assert sum(types.values()) == len(written.state_dict())


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "Q4_1", "float32"),
        ("llama", "BF16", "bfloat16"),
        ("qwen2", "Q8_0", "float16"),
        ("qwen3", "F16", "float32"),
    ],
)
def test_the_model_is_bit_by_bit_what_the_library_makes_of_the_file(
    family: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", family=family, kind=kind)
    ours = load_model(ModelSpec(checkpoint=str(tmp_path / "model.gguf"), dtype=dtype), "cpu")
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "model.gguf"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype), **dense)
    for held, given in (
        (ours.model.state_dict(), theirs.state_dict()),
        (dict(ours.model.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert held.keys() == given.keys()
        assert all(torch.equal(held[name], given[name]) for name in given)
        assert {name: one.dtype for name, one in held.items()} == {name: one.dtype for name, one in given.items()}
    tied = "lm_head.weight" not in dict(theirs.named_parameters())
    assert tied == (ours.model.lm_head.weight is ours.model.model.embed_tokens.weight)
    assert ours.model.generation_config.to_dict() == theirs.generation_config.to_dict()
    of_place = {"_name_or_path", "dtype", "attn_implementation"}
    ours_said, theirs_said = ours.model.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in ours_said.items() if k not in of_place} == {
        k: v for k, v in theirs_said.items() if k not in of_place | {"quantization_config"}
    }
    words = transformers.AutoTokenizer.from_pretrained(**where)
    assert words.get_vocab() == ours.tokenizer.get_vocab()
    assert words("What is it?")["input_ids"] == ours.tokenizer("What is it?")["input_ids"]


def test_the_key_is_of_the_bytes_and_not_of_the_place(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.GGUF")
    first, second = (ModelSpec(checkpoint=str(tmp_path / name)) for name in ("a.gguf", "b.GGUF"))
    assert first.key() == second.key()
    with (tmp_path / "b.GGUF").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    assert ModelSpec(checkpoint=str(tmp_path / "b.GGUF")).key() != first.key()


def test_nothing_beside_the_file_is_read_and_no_progress_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_gguf(tmp_path / "a.gguf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{nonsense")
    (tmp_path / "chat_template.jinja").write_text("other")
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")
    assert "%|" not in capsys.readouterr().err
    assert loaded.chat_template == WITH_LINES
    assert loaded.model.config.hidden_size == written.config.hidden_size


def test_a_file_is_parsed_once_for_loading_and_the_package_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf")
    asked: list[Any] = []
    tables: list[Any] = []
    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map

    class Counted(reader):  # type: ignore[misc, valid-type]
        def __init__(self, path: Path) -> None:
            asked.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *what: [table(*what), tables.append(what)][0])
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(ModelSpec(checkpoint=str(tmp_path / "model.gguf")), "cpu")
    assert (len(asked), len(tables)) == (1, 1)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with pytest.raises(ZeroDivisionError), parsed_once(tmp_path / "model.gguf"):
        raise ZeroDivisionError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_lists_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_array("kvbench.words", ["", "a", "\u0d24\u0d41", "x" * 300])
        writer.add_array("kvbench.whole", [0, -3, 2**31 - 1])
        writer.add_array("kvbench.parts", [0.5, -1e30])
        writer.add_array("kvbench.truths", [True, False, True])
        writer.add_array("kvbench.nested", [[1, 2], [3, 4]])

    path = tmp_path / "a.gguf"
    write_gguf(path, change=add)
    state, stock = path.stat(), gguf.GGUFReader(path)
    ours = gguf_files._parsed(path, state.st_size, state.st_mtime_ns)
    assert list(ours.fields) == list(stock.fields)
    for name, field in stock.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].types == field.types
    assert ours.data_offset == stock.data_offset
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours.tensors, stock.tensors, strict=True))


@pytest.mark.parametrize("at_once", [1, 96, 2**15])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q6_K"])
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (48, 256), (3, 5, 256)])
def test_blocks_are_unpacked_to_the_same_numbers_however_many_at_once(
    shape: tuple[int, ...], kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "_NUMBERS_AT_ONCE", at_once)
    stored, generator = gguf.GGMLQuantizationType[kind], np.random.default_rng(1)
    if kind == "Q6_K":  # the package does not pack it; bytes below 64 make no scale that is infinite
        block, size = gguf.GGML_QUANT_SIZES[stored]
        packed = generator.integers(0, 64, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    else:
        packed = gguf.quantize(generator.standard_normal(shape).astype(np.float32), stored)
    packed.flags.writeable = False  # as a file's
    got = gguf_files.unpacked(packed, stored)
    assert got.flags.writeable
    assert np.array_equal(got, gguf.dequantize(packed, stored).reshape(shape))


@pytest.mark.parametrize("num_threads", [1, 5])
def test_tensors_come_in_the_files_order_however_many_are_unpacked_at_once(num_threads: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    want = [
        (tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    ]
    got = gguf_files.dense_tensors(tmp_path / "a.gguf", lambda name, dense: (name, dense), num_threads=num_threads)
    assert [name for name, _ in got] == [name for name, _ in want]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, want, strict=True))


def test_a_list_is_walked_and_its_words_are_made_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    item = gguf_files._Parts.__getitem__
    monkeypatch.setattr(
        gguf_files._Parts, "__getitem__", lambda parts, number: [made.append(number), item(parts, number)][1]
    )
    write_gguf(tmp_path / "a.gguf")
    spec = ModelSpec(checkpoint=str(tmp_path / "a.gguf"))
    assert made == []
    vocabulary = load_model(spec, "cpu").tokenizer.get_vocab()
    assert bool(made) != gguf_files._reads_words_itself()
    monkeypatch.setattr(gguf_files, "_reads_words_itself", lambda: False)
    assert load_model(spec, "cpu").tokenizer.get_vocab() == vocabulary
    assert len(made) >= len(vocabulary)


def test_without_its_size_in_the_header_the_vocabulary_is_as_large_as_its_words(tmp_path: Path) -> None:
    leave = "vocab_size"
    write_gguf(tmp_path / "a.gguf", change=lambda writer: [values.pop(f"llama.{leave}") for values in writer.kv_data])
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")
    assert loaded.model.config.vocab_size == len(tokenizer().get_vocab())


def test_a_cell_of_a_file_is_built_from_the_command_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    words = ["model=local", f"model.checkpoint={tmp_path / 'a.gguf'}", "dataset=needles", "policy=h2o"]
    (composed,) = compose_grid(words, multirun=False, config_dir=None)
    cell = build_cell(composed)
    assert cell.settings["model"]["fingerprint"] == ModelSpec(checkpoint=str(tmp_path / "a.gguf")).fingerprint()
    with pytest.raises(ConfigError, match=r"(takes|reads) text only"):
        build_cell(compose_grid([*words[:2], "dataset=scenes"], multirun=False, config_dir=None)[0])


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        ModelSpec(checkpoint=str(path), **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_file_that_breaks_off_is_told_in_one_line(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "no GGUF file" in refused(path) if share == 0.0 else "is not a whole GGUF file" in refused(path)


def test_what_is_no_gguf_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"\x80\x02pickled")
    assert "is no GGUF file: it begins with" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "pointer of git-lfs" in refused(path)
    path.unlink()
    assert "give a file" in refused(path)


def add_experts(writer: Any) -> None:
    writer.add_expert_count(8)


def add_window(writer: Any) -> None:
    writer.add_sliding_window(64)


def add_scaling(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def add_frequencies(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))


def add_integers(writer: Any) -> None:
    writer.add_tensor("blk.0.other.weight", np.ones(8, dtype=np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_experts, "holds a mixture of experts"),
        (add_window, "holds a sliding window"),
        (add_scaling, "holds scaled rotary positions (yarn)"),
        (add_frequencies, "rotary frequencies of its own (rope_freqs.weight)"),
        (add_integers, "tensors of type I32, which cannot be dequantised"),
    ],
)
def test_what_would_be_left_unread_is_refused_before_loading(change: Change, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", change=change)
    assert message in refused(tmp_path / "a.gguf")


def test_another_family_or_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is of family 'gemma3'; supported as GGUF: llama, mistral, qwen2, qwen3" in refused(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", with_tokenizer=False)
    assert "holds no tokenizer" in refused(tmp_path / "b.gguf")


def test_a_file_that_lacks_a_tensor_is_told_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", leave_out="layers.1.mlp.up_proj")
    with pytest.raises(
        ModelSupportError, match=r"lacks 1 tensor that its header asks for \(model.layers.1.mlp.up_proj"
    ):
        load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")


def test_a_tensor_that_the_model_does_not_have_is_told_by_name(tmp_path: Path) -> None:
    add = "blk.0.attn_q.bias"
    write_gguf(tmp_path / "a.gguf", change=lambda writer: writer.add_tensor(add, np.ones(64, dtype=np.float32)))
    with pytest.raises(
        ModelSupportError, match=r"holds 1 tensor that the model of its header does not have \(blk.0.attn_q"
    ):
        load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")


def test_a_tensor_of_another_shape_is_told_with_both(tmp_path: Path) -> None:
    def another(writer: Any) -> None:
        writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))

    write_gguf(tmp_path / "a.gguf", change=another, leave_out="model.norm")
    with pytest.raises(ModelSupportError, match=r"of other shapes .*\(model.norm.weight is 8, not 32\)"):
        load_model(ModelSpec(checkpoint=str(tmp_path / "a.gguf")), "cpu")


def test_settings_that_a_file_does_not_have_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    assert "model.revision" in refused(tmp_path / "a.gguf", revision="0" * 40)
    assert "model.trust_remote_code" in refused(tmp_path / "a.gguf", trust_remote_code=True)


def test_without_the_extra_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr("kvbench.models.gguf.find_spec", lambda name: None)
    assert "pip install 'kvbench[gguf]'" in refused(tmp_path / "a.gguf")
