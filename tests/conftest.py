import os

import pytest
from hypothesis import settings

# As `recast` itself does: torch's threads must not spin while they wait for one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A limit on the time of one example finds busy machines, not faults.
settings.register_profile("recast", deadline=None)
settings.load_profile("recast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: begun last it would leave all workers but one idle."""
    items.sort(key=lambda item: item.path.name != "test_learning.py")
