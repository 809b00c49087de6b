"""What TRL's PPO trainer logs: a few iterations on a tiny GPT-2, its trainer_state.json.

    python tests/peers/trl_ppo_log.py tests/app/trl-1.12.0-ppo

made the file that tests/app/test_logs.py reads, with TRL 1.12.0, the last release that has the
trainer; test_trl_logs.py makes it again where that is installed.
"""

import copy
import shutil
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

ITERATIONS, BATCH = 5, 8
WORDS = ["[PAD]", "[EOS]", *"abcdefghijkl"]


def main(out: Path) -> None:
    """Train, and copy the state of the last checkpoint to `out`."""
    set_seed(0)
    ids = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ids, pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )
    sizes = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    policy = GPT2LMHeadModel(sizes)
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_steps=ITERATIONS,
            logging_steps=1,
            disable_tqdm=True,
            num_sample_generations=0,
            total_episodes=ITERATIONS * BATCH,
            per_device_train_batch_size=BATCH,
            num_mini_batches=2,
            response_length=8,
            stop_token="eos",
            temperature=1.0,
            learning_rate=1e-2,
            kl_coef=0.05,
        )
        PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=copy.deepcopy(policy),
            reward_model=GPT2ForSequenceClassification(sizes),
            value_model=GPT2ForSequenceClassification(sizes),
            train_dataset=Dataset.from_dict({"input_ids": [[2 + i % 12, 3] for i in range(64)]}),
        ).train()
        out.mkdir(parents=True, exist_ok=True)
        state = next(Path(folder).glob("checkpoint-*/trainer_state.json"))
        shutil.copy(state, out / state.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
