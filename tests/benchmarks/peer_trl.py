"""The benchmark's TRL peer: an iteration of its PPO trainer on Hugging Face's GPT-2.

As close to the workload as the trainer comes: same sizes, batch, lengths and epochs, float32, no
dropout, and nothing saved or evaluated. What differs: its value function is a second transformer
(it takes no head on the policy), gradients are not clipped, and its metrics are always computed.
The weights are new ones, since only time is compared. protocol.py says what it answers.
"""

import tempfile
import time
from itertools import pairwise

import torch
import trl
from datasets import Dataset
from protocol import Peer, Workload, serve
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

PAD = "[PAD]"


class Laps(TrainerCallback):
    """When each iteration ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


class TRLPeer(Peer):
    parts = ("iteration",)

    def __init__(self, workload: Workload, variant: str):
        super().__init__(workload, variant)
        self.name = f"TRL {trl.__version__}"
        torch.set_num_threads(workload.threads)

    def check(self, part: str) -> str:
        return "TRL samples its own responses; there is no result to compare"

    def trainer(self, iterations: int, laps: Laps, folder: str) -> PPOTrainer:
        w, s = self.workload, self.workload.ppo
        prompts = w.batch()["tokens"][:, : w.prompt_len].tolist()
        settings = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            seed=w.seed,
            total_episodes=iterations * w.batch_size,
            per_device_train_batch_size=w.batch_size,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=w.batch_size,
            num_ppo_epochs=s.epochs,
            num_mini_batches=1,
            response_length=w.response_len,
            temperature=1.0,
            stop_token=None,
            missing_eos_penalty=None,
            learning_rate=s.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=s.beta1,
            adam_beta2=s.beta2,
            adam_epsilon=s.eps,
            weight_decay=0.0,
            kl_coef=s.kl_coef,
            cliprange=s.clip_eps,
            cliprange_value=s.value_clip_eps,
            vf_coef=s.vf_coef,
            gamma=s.gamma,
            lam=s.lam,
        )
        sizes = GPT2Config(
            vocab_size=w.vocab_size,
            n_positions=w.prompt_len + w.response_len,
            n_embd=w.d_model,
            n_layer=w.n_layer,
            n_head=w.n_head,
            num_labels=1,
            activation_function="gelu_pytorch_tanh",  # gelu_new is the same, slower
            bos_token_id=None,
            eos_token_id=None,
        )
        return PPOTrainer(
            args=settings,
            processing_class=padding_tokenizer(w.vocab_size),
            model=GPT2LMHeadModel(sizes),
            ref_model=GPT2LMHeadModel(sizes),
            reward_model=GPT2ForSequenceClassification(sizes),
            value_model=GPT2ForSequenceClassification(sizes),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            callbacks=[laps],
        )

    def seconds(self, part: str, repeats: int) -> list[float]:
        """From the end of one iteration to that of the next, of one training; not the first."""
        laps = Laps()
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(repeats + 1, laps, folder).train()
        return [end - start for start, end in pairwise(laps.ends)]

    def run(self, part: str, repeats: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(repeats, Laps(), folder).train()


def padding_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The ids of the workload, and one above them that is never sampled: padding and end."""
    ids = {str(i): i for i in range(vocab_size)} | {PAD: vocab_size}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=PAD))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=PAD)


if __name__ == "__main__":
    serve(TRLPeer)
