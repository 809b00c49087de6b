"""What a GPU is sent stays as little as it is; the same numbers that count_launches.py prints."""

import pytest
from count_launches import STEPS, counts, main
from cpu_kernels import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no g++ to run the kernels on a CPU")
MOST = {  # operations, waits, kernels of ours
    "update, operation by operation": (618, 2, 0),
    "update, fused kernels": (220, 1, 120),
    f"{STEPS} tokens, operation by operation": (2058, 1, 0),
    f"{STEPS} tokens, fused kernels": (STEPS + 2, 1, 40 * STEPS),
}


def test_an_update_and_a_token_send_no_more_than_they_did():
    found = counts()
    assert found.keys() == MOST.keys()
    for what, (operations, waits, kernels) in MOST.items():
        assert found[what].operations <= operations, what
        assert found[what].waits <= waits, what
        assert found[what].kernels <= kernels, what


def test_the_command_prints_what_was_counted(capsys):
    main()
    printed = capsys.readouterr().out
    for what, count in counts().items():
        assert f"{what}: {count.operations} operations, {count.waits} waits" in printed
