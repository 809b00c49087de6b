"""What several tests of this room look at and do not change."""

import json

import pytest

from minirlhf.app.exact import exact_command


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """One run of all that is trained, as short as it gets: two workers, one iteration."""
    out = tmp_path_factory.mktemp("exact") / "run"
    assert exact_command(iterations=1, out=out) == 0
    return out, json.loads((out / "exact.json").read_text())
