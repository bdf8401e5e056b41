"""Every family of checkpoints, read from a folder as users have it: all policies, and against stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Kind, Needs, Policy, artefact
from kvbench.cache.cache import output_weight, unrotation_of
from kvbench.cache.policy import is_divided, needs_of
from kvbench.contract.driving import held_positions
from kvbench.contract.terms import allowed, block
from kvbench.datasets.base import PICTURE_MARKS, Example, without_marks
from kvbench.datasets.files import MAX_SIDES
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.inputs import PromptBatch, adds_special_tokens, prompt_batch, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import FAMILIES as SUPPORTED
from kvbench.models.spec import TEXT_FAMILIES, VISION_FAMILIES, ModelSpec
from kvbench.tasks.decode import CacheSetting, Decoding
from tests.cache.test_hidden_states import Hearing
from tests.calibrating import in_process
from tests.covering import YAMLS
from tests.models.answering import answers_to
from tests.models.checkpoints import FAMILIES, IN_CACHE_FAMILIES, save_checkpoint

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
ENGINES = ("eager", pytest.param("graph", marks=[pytest.mark.gpu, NO_GPU]))
NEW_TOKENS = 8
BUDGET = Budget(fraction=0.3)
SIZES = ((30, 30), (40, 12), (9, 37))
QUESTIONS = ("What is it?", "A small red dot in row one, column two: where is it and what is it?", "Four objects?")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_checkpoint(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def loaded(folders: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    return cache(lambda family, device="cpu": load_model(ModelSpec(checkpoint=str(folders(family))), device))


def picture(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def examples(with_pictures: bool, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Example]:
    pictures = [picture(*size) for size in sizes]
    return [
        Example(
            id=str(k),
            cluster=str(k),
            question=QUESTIONS[k % 3],
            reference="A red dot.",
            load_image=(lambda image=image: image) if with_pictures else None,
        )
        for k, image in enumerate(pictures)
    ]


def setting_of(policy: Policy, engine: Any = "eager", budget: Budget = BUDGET) -> CacheSetting:
    return CacheSetting(policy=policy, budget=budget, positions="original", engine=engine)


def policy_of(path: Path) -> Policy:
    policy: Policy = instantiate(OmegaConf.load(path))
    return policy


def test_every_supported_family_has_a_checkpoint_here() -> None:
    assert set(FAMILIES) == set(SUPPORTED)


@pytest.mark.cover
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_holds_what_it_may_at_every_step(
    loaded: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, family: str, path: Path, engine: str
) -> None:
    ours, policy = loaded(family, "cuda" if engine == "graph" else "cpu"), in_process(monkeypatch, policy_of(path))
    batch = prompt_batch(ours, examples(ours.takes_images and Needs.REPEATED not in needs_of(policy)))
    try:
        unrotation_of(ours.model, [policy])
        artefact.artefact_of(ours.model, policy)
        if Needs.OUTPUT in needs_of(policy):
            output_weight(ours.model, 0)
    except ModelSupportError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        decoding = setting_of(policy, engine).decoding(ours, batch, NEW_TOKENS)
        after_prompt = held_positions(decoding.cache)
        for _ in range(NEW_TOKENS):
            assert bool(decoding.logits.isfinite().all())
            decoding.step(decoding.logits.argmax(dim=-1))
    held = held_positions(decoding.cache)
    for number, prompt in enumerate(batch.prompt_tokens):
        seen, sizes, most = prompt + NEW_TOKENS, [], []
        for layer_before, layer in zip(after_prompt, held, strict=True):
            for kept, head in zip(layer_before[number], layer[number], strict=True):
                sizes.append(len(head))
                most.append(allowed(policy, BUDGET, prompt, seen, len(kept)) + block(policy, 1))
                assert len(head) >= 1
                assert is_divided(policy) or len(head) <= most[-1]
                assert not policy.bounded or is_divided(policy) or len(head) < seen
                assert policy.bounded or head == tuple(range(seen))
        assert sum(sizes) <= sum(most)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_the_layers_norm_hands_to_its_projections(
    loaded: Callable[[str], LoadedModel], family: str
) -> None:
    """Of pictures and text, in a padded batch, at the prompt and at steps; told by the norms' own outputs."""
    ours = loaded(family)
    decoder = ours.model.get_decoder()
    norms = [
        getattr(layer, "input_layernorm", None) or layer.ln_1 for layer in getattr(decoder, "layers", None) or decoder.h
    ]
    given: list[list[Tensor]] = [[] for _ in norms]
    hooks = [
        norm.register_forward_hook(lambda _module, _given, out, states=states: states.append(out))
        for norm, states in zip(norms, given, strict=True)
    ]
    batch = prompt_batch(ours, examples(ours.takes_images))
    decoding = setting_of(Hearing(), budget=UNLIMITED).decoding(ours, batch, NEW_TOKENS)
    for _ in range(NEW_TOKENS):
        decoding.step(decoding.logits.argmax(dim=-1))
    for hook in hooks:
        hook.remove()
    for layer, states in zip(decoding.cache.policy_layers, given, strict=True):
        assert layer.slots is not None
        position, noted = layer.slots.entries.position, layer.slots.entries.noted
        assert noted is not None
        whole = torch.cat(states, dim=1)
        for row, prompt in enumerate(batch.prompt_tokens):
            mine = whole[row, -prompt - NEW_TOKENS :]
            for head in range(position.shape[1]):
                at = position[row, head][position[row, head] >= 0]
                assert len(at) == prompt + NEW_TOKENS
                assert torch.equal(noted[row, head, position[row, head] >= 0], mine[at, head].float())


@pytest.mark.long
@torch.inference_mode()
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_pictures_and_questions_are_found_and_what_stays_respects_them(
    loaded: Callable[[str], LoadedModel], family: str
) -> None:
    ours = loaded(family)
    batch, budget = prompt_batch(ours, examples(True)), Budget(fraction=0.7)
    ids, lengths = batch.tensors["input_ids"], batch.prompt_tokens
    assert batch.find_question_tokens is not None
    asked = batch.find_question_tokens()
    spans = []
    for row, (length, number) in enumerate(zip(lengths, asked, strict=True)):
        told = ours.tokenizer.decode(ids[row, -number:]).lstrip()
        assert told.startswith(QUESTIONS[row])
        text = {p for p, token in enumerate(ids[row, -length:].tolist()) if token != ours.image_token_id}
        spans.append({"text": text, "question": set(range(length - number, length))})
        spans[-1]["picture"] = set(range(length)) - text
        assert spans[-1]["picture"]
    for span in ("text", "picture", "question"):
        policy = instantiate(OmegaConf.load(next(path for path in YAMLS if path.stem == "key_norm")), protect=span)
        held = held_positions(setting_of(policy, budget=budget).decoding(ours, batch, 1).cache)
        for layer in held:
            for row, heads in enumerate(layer):
                room = int(budget.fraction * lengths[row])
                for head in heads:
                    mine = spans[row][span]
                    assert len(head) == room
                    assert mine <= set(head) if len(mine) <= room else set(head) <= mine


@torch.inference_mode()
def drive(ours: LoadedModel, batch: PromptBatch, tokens: Tensor) -> Tensor:
    """Logits (N + 1, B, V) of the full cache, with `tokens` (B, N) forced in."""
    full = policy_of(next(path for path in YAMLS if path.stem == "full"))
    decoding = setting_of(full, budget=UNLIMITED).decoding(ours, batch, NEW_TOKENS)
    return torch.stack([decoding.logits, *(decoding.step(column).clone() for column in tokens.T)])


def stock(family: str, folder: Path) -> Any:
    auto = transformers.AutoModelForCausalLM if family in TEXT_FAMILIES else transformers.AutoModelForImageTextToText
    return auto.from_pretrained(str(folder), dtype=torch.float32).double().eval()


@pytest.mark.few(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_equals_stock_transformers_on_a_padded_batch_of_different_pictures(
    folders: Callable[[str], Path], family: str
) -> None:
    """In float64, so that what differs is the computation and not its rounding."""
    ours, theirs = load_model(ModelSpec(checkpoint=str(folders(family))), "cpu"), stock(family, folders(family))
    ours.model.double()
    batch = prompt_batch(ours, examples(ours.takes_images))
    assert len(set(batch.prompt_tokens)) == 3
    output = theirs.generate(
        **batch.tensors,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[:, batch.kind.shape[1] :]
    logits = drive(ours, batch, tokens[:, :-1])
    torch.testing.assert_close(logits, torch.stack(output.logits).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(dim=-1).T, tokens)


@pytest.mark.cover
@pytest.mark.parametrize("name", ["full", "h2o", "streaming_llm"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_neighbours_and_pads_change_nothing(loaded: Callable[[str], LoadedModel], family: str, name: str) -> None:
    ours, policy = loaded(family), policy_of(next(path for path in YAMLS if path.stem == name))
    together = answers_to(ours, prompt_batch(ours, examples(True)), setting_of(policy), max_new_tokens=NEW_TOKENS)
    for example, answer in zip(examples(True), together, strict=True):
        batch = prompt_batch(ours, [example])
        assert answers_to(ours, batch, setting_of(policy), max_new_tokens=NEW_TOKENS) == [answer]


@pytest.mark.cover
@pytest.mark.parametrize("size", [(7, 7), (64, 9), (9, 64), (33, 31), (17, 40), (16, 16)])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen"])
def test_a_picture_of_any_shape_gets_as_many_tokens_as_vectors(
    loaded: Callable[[str], LoadedModel], family: str, size: tuple[int, int]
) -> None:
    """The models themselves refuse a prompt whose image tokens are not as many as the picture's vectors."""
    ours = loaded(family)
    batch = prompt_batch(ours, examples(True, (size,)))
    assert int((batch.kind == int(Kind.IMAGE)).sum()) >= 1
    with torch.inference_mode():
        decoding = Decoding(ours, batch, setting_of(policy_of(YAMLS[0])).cache(ours, batch, 1))
    assert bool(decoding.logits.isfinite().all())


REFUSED = [family for family in FAMILIES if family not in (*IN_CACHE_FAMILIES, "qwen")]  # qwen: by length only


@pytest.mark.parametrize("family", REFUSED)
def test_ranks_in_the_cache_are_refused_where_they_are_not_defined(
    loaded: Callable[[str], LoadedModel], family: str
) -> None:
    ours = loaded(family)
    batch = prompt_batch(ours, examples(True))
    chosen = CacheSetting(policy=policy_of(YAMLS[0]), budget=BUDGET, positions="in_cache")
    with pytest.raises(ModelSupportError, match="Use positions=original"):
        chosen.cache(ours, batch, 1)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_vision_tower_keeps_its_own_attention(loaded: Callable[[str], LoadedModel], family: str) -> None:
    config = loaded(family).model.config
    assert config.get_text_config()._attn_implementation == "kvbench"
    vision = getattr(config, "vision_config", None)
    assert vision is None or vision._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_pictures_mark_in_a_question_is_plain_text_and_no_further_picture(
    loaded: Callable[[str], LoadedModel], family: str
) -> None:
    ours = loaded(family)
    mark = ours.tokenizer.convert_ids_to_tokens(ours.image_token_id)
    first = examples(True)[0]
    odd = replace(first, id="x", question=f"Is {mark} in it?{mark}")
    ids, usual = (prompt_batch(ours, [one]).tensors["input_ids"][0].tolist() for one in (odd, first))
    assert ids.count(ours.image_token_id) == usual.count(ours.image_token_id) >= 1
    assert ours.tokenizer.decode(ids).count(odd.question) == 1
    assert mark in PICTURE_MARKS, "readers write it otherwise"
    assert mark not in without_marks(odd.question)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_prompts_are_what_the_familys_own_processor_makes(loaded: Callable[[str], LoadedModel], family: str) -> None:
    """Text and pictures are put together by kvbench, so that data stays plain text; the tensors are the processor's."""
    ours, some = loaded(family), examples(True)
    texts = [prompt_text(ours, example) for example in some]
    theirs = ours.processor(
        text=texts,
        images=[example.load_image() for example in some if example.load_image],
        return_tensors="pt",
        padding=True,
        add_special_tokens=adds_special_tokens(ours, texts[0]),
    )
    batch = prompt_batch(ours, some)
    assert set(batch.tensors) == set(theirs)
    for name, tensor in batch.tensors.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, MAX_SIDES), (2 * MAX_SIDES, 2), (3, 3)])
def test_every_processor_takes_what_the_readers_let_through(
    loaded: Callable[[str], LoadedModel], family: str, size: tuple[int, int]
) -> None:
    batch = prompt_batch(loaded(family), examples(True, (size,)))
    assert bool(batch.tensors["pixel_values"].isfinite().all())


def test_a_picture_that_only_the_processor_rejects_is_named(loaded: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(DataError, match=r"does not take 1 \(ValueError: absolute aspect ratio must be smaller"):
        prompt_batch(loaded("qwen2_5_vl"), examples(True, ((30, 30), (2, 500))))


def test_a_package_that_a_processor_lacks_is_no_items_fault(
    loaded: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loaded("qwen2_5_vl")

    def broken(*arguments: Any, **options: Any) -> Any:
        raise ImportError("no torchvision")

    monkeypatch.setattr(ours.processor, "image_processor", broken)
    with pytest.raises(ImportError, match="no torchvision"):
        prompt_batch(ours, examples(True))
