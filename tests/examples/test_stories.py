"""The example of a pretrained model, on one that is small and knows nothing."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import arrays_of, write
from tiny_pieces import VOCAB, to_bin

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = (12, 20, 1, 2, 2, len(VOCAB), 256)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def called(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def write_model(folder):
    path = write(folder / "stories15M.bin", arrays_of(True, sizes=SIZES), SIZES)
    (folder / "tokenizer.bin").write_bytes(to_bin())
    return path


def test_a_copy_is_compared_and_becomes_a_folder(tmp_path, monkeypatch):
    import get_stories15m

    path = write_model(tmp_path)
    with pytest.raises(SystemExit, match="expected stories15M, SHA-256 cd590644"):
        called(monkeypatch, get_stories15m, tmp_path / "model", "--from", path)
    data = path.read_bytes()
    monkeypatch.setattr(get_stories15m, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(get_stories15m, "MODEL", len(data))
    monkeypatch.setattr(get_stories15m, "TOKENIZER", len(to_bin()))
    called(monkeypatch, get_stories15m, tmp_path / "model", "--from", path)
    whole = tmp_path / "llama2.data"
    whole.write_bytes(data + to_bin() + b"what follows")
    called(monkeypatch, get_stories15m, tmp_path / "again", "--from", whole)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_it_runs_and_says_what_held(tmp_path, monkeypatch, capsys):
    import stories

    small = {"iterations": 1, "batch_size": 4, "epochs": 1, "minibatches": 1}
    monkeypatch.setattr(stories, "PPO", {**stories.PPO, **small})
    changes = {"reward_model": {"n_normalize": 64}, "max_response_tokens": 6, "eval_prompts": 2}
    monkeypatch.setattr(stories, "SETTINGS", {**stories.SETTINGS, **changes, "workers": 1})
    monkeypatch.setattr(stories, "OTHER_NAMES", ["Tom"])
    monkeypatch.setattr(stories, "GOOD", {"a", "the", "dog", "and"})
    (tmp_path / "rewards.py").write_text("def good_feeling(response):\n    return len(response)\n")
    monkeypatch.setattr(stories, "__file__", str(tmp_path / "rewards.py"))
    called(monkeypatch, stories, write_model(tmp_path), "--seeds", 3, "--out", tmp_path / "runs")
    found = json.loads((tmp_path / "runs" / "stories.json").read_text())
    assert found["rows"]["3"].keys() == {"reference", "0", "0.3", "10"}
    assert found["rows"]["3"]["reference"]["kl_seq"] == 0.0
    claims = found["claims"]["3"]
    said = capsys.readouterr().out
    assert all(f"{int(held)} of 1 seeds: {claim}" in said for claim, held in claims.items())
    assert (tmp_path / "runs" / "stories.html").stat().st_size < 3_000_000


def test_what_is_wanted_is_not_what_is_paid():
    import stories

    assert stories.good_feeling('"Happy, happy!" she LAUGHED. Unhappy.') == 3
    assert not set(stories.openings(stories.NAMES)) & set(stories.openings(stories.OTHER_NAMES))

    class Reply:
        response, ids, kl_seq = "happy " * 9, [1, 2, 1, 2, 1], 5.0
        ref_logp = np.array([-3.0, -4.0])

    row = stories.measured([Reply])  # 4 bigrams, 2 different; mean log pi_ref is -3.5
    assert row["reward"] == 9 and row["gold"] == pytest.approx(3 - 10 * 0.5 - 2 * 1.5)
