"""What released code asks of the cache itself is a hook of its own; the contract does not know of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from kvbench.cache import Budget, Policy, PolicyCache, ScorePolicy, View
from kvbench.cache.released import Departures, departures_of
from kvbench.contract.driving import drive
from kvbench.policies.released.elastic import ElasticReleased
from kvbench.policies.released.h2o import H2OReleased
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
from tests.tiny_models import random_tokens


@dataclass(frozen=True, kw_only=True)
class Newest(ScorePolicy):
    """A policy of a user's own, one class."""

    def score(self, view: View) -> Tensor:
        return view.position.float()


@dataclass(frozen=True, kw_only=True)
class NewestRoundedUp(Newest):
    """The same, counting as released code does."""

    counts_as_released: bool = True


def test_the_contract_names_no_departure_and_a_policy_without_them_departs_in_nothing() -> None:
    names = {departure.name for departure in fields(Departures)}
    assert not names & {*dir(Policy), *dir(ScorePolicy)}
    assert departures_of(Newest()) == Departures()


def test_each_departure_of_a_released_policy_goes_with_its_option() -> None:
    assert departures_of(ElasticReleased()) == Departures(counts_as_released=True)
    assert departures_of(ElasticReleased(target_rounded_up=False)) == Departures()
    assert departures_of(H2OReleased()) == Departures(mass_in_model_dtype=True)
    assert departures_of(H2OElasticRelease()) == Departures(counts_as_released=True, pools_layers=True)
    assert departures_of(H2OElasticRelease(one_set_for_the_model=False)) == Departures(counts_as_released=True)


def test_a_property_of_that_name_is_all_that_the_hook_takes(tiny_llama: Any) -> None:
    held = [
        drive(tiny_llama, PolicyCache(tiny_llama, policy, Budget(fraction=0.3)), random_tokens(1, 1, 24), 21).held
        for policy in (Newest(), NewestRoundedUp())
    ]
    counts = [[len(step[0][0][0]) for step in one] for one in held]
    assert counts == [[6, 6, 6, 7], [7, 7, 7, 8]]
