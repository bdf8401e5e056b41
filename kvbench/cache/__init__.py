"""The cache, the policy contract and the attention that feeds it."""

from kvbench.cache.attention import attach
from kvbench.cache.budget import UNLIMITED, Budget
from kvbench.cache.policy import Policy, ScorePolicy
from kvbench.cache.policy_cache import Occupancy, PolicyCache
from kvbench.cache.view import Kind, Needs, Plan, View, When

__all__ = [
    "UNLIMITED",
    "Budget",
    "Kind",
    "Needs",
    "Occupancy",
    "Plan",
    "Policy",
    "PolicyCache",
    "ScorePolicy",
    "View",
    "When",
    "attach",
]
