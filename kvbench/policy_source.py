"""What a policy's code is, as a part of a cell's key."""

from __future__ import annotations

import hashlib
import inspect

from kvbench.cache import Policy
from kvbench.errors import ConfigError


def policy_source(policy: Policy) -> str:
    """Return the hash of the policy's code, so that a record never outlives the code that made it."""
    classes = [kind for kind in type(policy).__mro__ if issubclass(kind, Policy)]
    try:
        source = "".join(map(inspect.getsource, classes))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"policy: {error}; its source is part of a cell's key, so put the class in a .py file"
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()[:16]
