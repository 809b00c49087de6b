"""What a run takes of memory, told from its sizes alone: at least so many bytes, by option."""

from minirlhf.memory import require_memory
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs.config import TrainConfig
from minirlhf.workers import usable_cores

COPIES = 5  # of the policy: itself, its gradient, two moments, the reference
PROCESS = 20 << 20  # bytes of a worker's own, measured: 27 to 41 MB


def check_run(config: TrainConfig, gpt: GPTConfig, max_response_tokens: int) -> None:
    """Refuse a run that the memory at hand cannot hold. (On a GPU memory is another one.)

    Raises:   InputError: names the option that takes most.
    """
    if config.device != "cpu":
        return
    V, T, C, L = gpt.vocab_size, gpt.n_ctx, gpt.d_model, gpt.n_layer
    blocks, positions, vocabulary = 48 * L * C * C, 4 * T * C, 4 * V * C
    activations = 4 * L * T * (17 * C + gpt.n_head * T)  # of the longest sequence
    in_worker = PROCESS + blocks + positions + vocabulary + activations
    model, ppo = config.reward_model, config.ppo
    drawn = {  # at once, but one after the other
        "--ppo.batch-size": ppo.batch_size,
        "--eval-prompts": config.eval_prompts,
        "--reward-model.n-normalize": model.n_normalize,
    }
    layers = 0 if config.reward or model.init == "reference" else model.n_layer
    if not (config.pairs or config.reward):
        drawn["--reward-model.n-pairs"] = model.n_pairs
        drawn["--reward-model.n-heldout-pairs"] = model.n_heldout_pairs
    most = max(drawn, key=drawn.__getitem__)
    tokens = (T - max_response_tokens) // 2, max_response_tokens  # prompts that are half as long
    require_memory(
        {
            "--model.d-model, --model.n-layer": COPIES * blocks,
            "--max-prompt-tokens, --max-response-tokens": COPIES * positions + activations,
            "--vocab-size": COPIES * vocabulary,
            "--reward-model.n-layer": COPIES * 48 * layers * C * C,
            "--workers": ((config.workers or usable_cores()) - 1) * in_worker,
            "--sft.batch-size": 100 * config.sft.batch_size,
            most: samples_bytes(gpt, drawn[most], *tokens),
        }
    )


def samples_bytes(gpt: GPTConfig, n: int, prompt_tokens: int, response_tokens: int) -> int:
    """Of n responses while they are drawn: the forward of the prompts, keys and values, logits."""
    C, L = gpt.d_model, gpt.n_layer
    of_prompt, of_response = 76 * C * L * prompt_tokens, (20 + 4 * C + 8 * C * L) * response_tokens
    return n * (of_prompt + of_response + 16 * gpt.vocab_size)
