"""What TRL's own trainers log, read by `read_log`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from minirlhf.app.diagnose import diagnose
from minirlhf.app.logs import read_log

HERE = Path(__file__).parent
WORDS = ["[PAD]", "[EOS]", *"abcdefghijkl"]


def tiny(folder):
    """A GPT-2 of a few thousand numbers, in a folder, and a tokenizer of letters."""
    ids = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    ids.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ids, pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )
    transformers.set_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=1, n_head=2, **ends
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder), tokenizer


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def history(folder):
    """Its rows of training: the last one, of the whole, has no numbers of a step."""
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_log_of_grpo_and_its_event_files(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, tokenizer = tiny(tmp_path / "model")
    made = settings(tmp_path, beta=0.1, num_generations=4, max_completion_length=8)
    getattr(trl, f"{name}Trainer")(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e"] * 8}),
        args=getattr(trl, f"{name}Config")(**made | {"report_to": ["tensorboard"]}),
    ).train()
    log, rows = read_log(tmp_path), history(tmp_path)
    assert (log.source, log.folder, list(log.stages)) == ("trl-grpo", None, ["ppo"])
    ours = log.stages["ppo"]
    assert [row["step"] for row in ours] == [1, 2, 3] == [row["step"] for row in rows]
    for here, there in zip(ours, rows, strict=True):
        for of_us, of_them in {
            "objective/scores": "reward",
            "objective/scores_sd": "reward_std",
            "objective/kl_token": "kl",
            "policy/entropy_avg": "entropy",
            "policy/clipfrac_avg": "clip_ratio/region_mean",
            "response_length/mean": "completions/mean_length",
            "response_length/clip_ratio": "completions/clipped_ratio",
            "loss/total": "loss",
            "grad_norm": "grad_norm",
            "lr": "learning_rate",
        }.items():
            assert here[of_us] == float(there[of_them])
    assert ours[-1]["objective/kl_token"] != 0 and "objective/kl" not in ours[0]
    assert {"num_tokens", "completions/min_length"} < set(log.unknown)
    cut_off = all(row["response_length/clip_ratio"] > 0.4 for row in ours)
    assert cut_off == ("missing-eos" in [f.rule for f in diagnose(tmp_path).findings])
    events = read_log(tmp_path / "events")
    assert events.source == log.source
    for here, there in zip(events.stages["ppo"], ours, strict=True):
        assert here == pytest.approx(there, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, stage", [("DPO", "dpo"), ("Reward", "reward_model"), ("SFT", "sft")]
)
def test_a_log_of_the_other_stages(tmp_path, name, stage):
    model, tokenizer = tiny(tmp_path / "model")
    texts = {"prompt": ["a b c", "d e"] * 4, "chosen": ["f g", "h"] * 4, "rejected": ["i", "j"] * 4}
    texts = {"text": ["a b c d"] * 8} if name == "SFT" else texts
    getattr(trl, f"{name}Trainer")(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(texts),
        eval_dataset=Dataset.from_dict(texts),
        args=getattr(trl, f"{name}Config")(
            **settings(tmp_path, eval_strategy="steps", eval_steps=1)
        ),
    ).train()
    log, state = read_log(tmp_path), read_log(tmp_path / "checkpoint-3" / "trainer_state.json")
    assert log.source == f"trl-{name.lower()}" and log.stages == state.stages
    ours, theirs = log.stages[stage], history(tmp_path)
    assert [row["step"] for row in ours] == [1, 2, 3]
    for here, there in zip(ours, theirs, strict=True):
        assert here[f"loss/{stage}"] == float(there["loss"]) and here["lr"] > 0
        assert here[f"heldout/loss_{stage}"] > 0
        if name != "SFT":
            assert 0 <= here["heldout/accuracy"] <= 1 and "heldout/margin" in here


@pytest.mark.filterwarnings("ignore")
def test_the_recorded_log_of_ppo_is_what_its_trainer_writes(tmp_path):
    if not importlib.util.find_spec("trl.experimental.ppo"):
        pytest.skip("this TRL has no PPO trainer; 1.12.0 has")
    script = [sys.executable, HERE / "trl_ppo_log.py", tmp_path]
    subprocess.run(script, check=True, capture_output=True)
    recorded, made = (
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (HERE.parent / "app" / "trl-1.12.0-ppo", tmp_path)
    )
    for there, here in zip(recorded, made, strict=True):
        assert here == pytest.approx(there | {"eps": here["eps"]}, rel=1e-3, abs=1e-4)
