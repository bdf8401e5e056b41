"""The data set `scenes`: procedural pictures with descriptions, or with follow-up questions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from kvbench.datasets.base import Example
from kvbench.datasets.scene_drawing import draw_scene
from kvbench.datasets.scene_text import describe, describe_prompt, follow_up_turns, parse_objects
from kvbench.datasets.scenes import SCENES_VERSION, SPLITS, Scene, scene_at
from kvbench.errors import ConfigError, close_matches

_ASK = ("describe", "follow_up")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """`num_samples` scenes of `split`, from scene `first` on; any number exists.

    ask: `describe` gives one example per scene, `follow_up` one per follow-up question (they share
    the scene as cluster). num_follow_ups: questions per scene. Raises: ConfigError.
    """

    num_samples: int = 32
    split: str = "test"
    first: int = 0
    ask: Literal["describe", "follow_up"] = "describe"
    num_follow_ups: int = 3

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"dataset.split is {self.split!r}; {close_matches(self.split, SPLITS)}")
        if self.ask not in _ASK:
            raise ConfigError(f"dataset.ask is {self.ask!r}; {close_matches(str(self.ask), _ASK)}")
        if self.num_samples < 1 or self.first < 0 or self.num_follow_ups < 1:
            raise ConfigError(
                f"dataset has num_samples={self.num_samples}, first={self.first}, "
                f"num_follow_ups={self.num_follow_ups}; allowed: >= 1, >= 0, >= 1"
            )

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"scenes-v{SCENES_VERSION}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; pictures are drawn when asked for."""
        scenes = [scene_at(self.split, self.first + k) for k in range(self.num_samples)]
        if self.ask == "describe":
            return [self._description(scene) for scene in scenes]
        return [example for scene in scenes for example in self._questions(scene)]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the objects that `text` states."""
        return frozenset(parse_objects(text))

    def _description(self, scene: Scene) -> Example:
        return Example(
            id=scene.name,
            cluster=scene.name,
            question=describe_prompt(scene),
            reference=describe(scene),
            load_image=partial(draw_scene, scene),
            facts=frozenset(scene.objects),
            follow_ups=tuple(follow_up_turns(scene, self.num_follow_ups)),
        )

    def _questions(self, scene: Scene) -> list[Example]:
        return [
            Example(
                id=f"{scene.name}/{number}",
                cluster=scene.name,
                question=turn.question,
                reference=turn.answer,
                load_image=partial(draw_scene, scene),
            )
            for number, turn in enumerate(follow_up_turns(scene, self.num_follow_ups))
        ]
