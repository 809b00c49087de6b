"""What can be set about an optimiser and PPO: frozen dataclasses, one field a line.

A field says its symbol, unit and range; those of the other stages stand beside their loops.
`runs/config.py` puts all together, and the command line makes a flag of each.
"""

from dataclasses import dataclass
from typing import Any, Literal

from minirlhf.errors import InputError
from minirlhf.fields import check_fields
from minirlhf.rlhf.advantages import ADVANTAGES, IMPORTANCE
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.rlhf.objectives import AGGREGATIONS, CLIPS, SURROGATES


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-3  # Highest learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # After the warm-up
    warmup: int = 0  # Updates over which the learning rate rises
    floor: float = 0.0  # Last learning rate as a share of the highest
    beta1: float = 0.9  # Decay of the mean of the gradient
    beta2: float = 0.999  # Decay of the mean of its square
    eps: float = 1e-5  # Added to the root of the second moment
    weight_decay: float = 0.0  # Decoupled decay of matrices; biases and layer norms are spared
    max_grad_norm: float = 1.0  # Largest global norm, longer gradients are scaled down; 0: any
    form: Literal["torch", "tf"] = "torch"  # Where eps stands: as in PyTorch, or as in TensorFlow 1

    def __post_init__(self):
        check_fields(
            self,
            "optimizer.",
            at_least_0=("learning_rate", "warmup", "weight_decay", "max_grad_norm"),
            above_0=("eps",),
            shares=("floor",),
            decays=("beta1", "beta2"),
        )


@dataclass(frozen=True)
class PPOConfig:
    """PPO and its kin with the summed KL penalty."""

    iterations: int = 30  # Batches of fresh samples
    batch_size: int = 128  # Responses an iteration
    samples_per_prompt: int = 1  # G, responses to each prompt; divides batch_size
    epochs: int = 4  # Passes over each batch
    minibatches: int = 2  # Updates a pass
    # The most responses in one forward: bounds memory only. 0: as suits a cache; on a GPU all
    micro_batch_size: int = 0
    temperature: float = 1.0  # Of sampling and of every log-prob [> 0]
    kl_coef: float = 0.2  # beta, weight of the penalty [units of the normalised score per nat]
    # Where the penalty stands and which estimator it uses
    kl_mode: Literal[tuple(KL_MODES)] = "reward_k1"  # type: ignore[valid-type]
    kl_target: float = 0.0  # Wanted kl_seq [nats per response], adapts kl_coef. 0: fixed
    kl_horizon: float = 1280.0  # Episodes over which an adaptive kl_coef may change by 20 %
    reset_reference_every: int = 0  # Iterations until the policy becomes the reference. 0: never
    # A critic's (GAE), or none: of the G responses to a prompt, or the whole batch's
    advantages: Literal[ADVANTAGES] = "gae"  # type: ignore[valid-type]
    gamma: float = 1.0  # Discount
    lam: float = 0.95  # GAE's lambda
    whiten_advantages: bool = True  # Advantages to mean 0, variance 1 over the batch's tokens
    whiten_rewards: bool = False  # Token rewards to variance 1 (the mean stays)
    # What multiplies the advantage: a ratio a token, one a response (GSPO), a weight (CISPO)
    ratio: Literal[tuple(SURROGATES)] = "token"  # type: ignore[valid-type]
    sampler_bits: int = 0  # Bits of mantissa that the weights keep which sample. 0: all
    # What corrects for it: truncated or masked importance weights of the tokens
    importance: Literal[IMPORTANCE] = "none"  # type: ignore[valid-type]
    importance_cap: float = 2.0  # C > 1: the largest such weight
    # Clipped surrogate: PPO's, the one-sided min(ratio, 1+e) of a textbook, or none
    clip: Literal[CLIPS] = "ppo"  # type: ignore[valid-type]
    clip_eps: float = 0.2  # e below 1, and above it unless clip_eps_high is set
    clip_eps_high: float = 0.0  # e above 1 (clip-higher). 0: as clip_eps
    dual_clip: float = 0.0  # c > 1: bounds the objective from below by c A where A < 0. 0: off
    value_clip_eps: float = 0.0  # Clips the value's move from the rollout's [reward units]. 0: off
    vf_coef: float = 0.1  # Weight of the value loss
    ent_coef: float = 0.0  # Weight of the entropy bonus
    # How token losses become one number
    aggregation: Literal[AGGREGATIONS] = "token-mean"  # type: ignore[valid-type]
    target_kl: float = 0.0  # No update beyond KL(old || policy) = 1.5 of it [nats/token]. 0: off
    missing_eos_penalty: float = 0.0  # Off the score where the stop token is missing [score units]
    score_clip: float = 0.0  # Cuts the score to [-c, c] [score units]. 0: off
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, beta2=0.95)

    def __post_init__(self):
        counts = ("iterations", "batch_size", "samples_per_prompt", "epochs", "minibatches")
        check_fields(
            self,
            "ppo.",
            at_least_1=counts,
            at_least_0=(
                *("micro_batch_size", "kl_coef", "kl_target", "clip_eps", "clip_eps_high"),
                *("dual_clip", "value_clip_eps", "vf_coef", "ent_coef", "target_kl"),
                *("missing_eos_penalty", "score_clip", "reset_reference_every", "sampler_bits"),
            ),
            above_0=("temperature", "kl_horizon"),
            shares=("gamma", "lam"),
        )
        s, critic, G = self, self.has_critic, self.samples_per_prompt
        alone = G == 1 and self.advantages not in ("gae", "batch")
        for name, fits, expected in (
            ("minibatches", s.minibatches <= s.batch_size, f"at most batch_size = {s.batch_size}"),
            ("kl_coef", s.kl_coef or not s.kl_target, "more than 0, which kl_target multiplies"),
            (
                "kl_horizon",
                not s.kl_target or s.batch_size <= s.kl_horizon,
                f"at least batch_size = {s.batch_size} with kl_target, or one batch uses it up",
            ),
            ("dual_clip", not s.dual_clip or s.dual_clip > 1, "0 (off) or more than 1"),
            ("dual_clip", not s.dual_clip or s.ratio in ("token", "sequence"), f"0 with {s.ratio}"),
            ("samples_per_prompt", s.batch_size % G == 0, f"a divisor of {s.batch_size}"),
            ("samples_per_prompt", not alone, f"at least 2 with advantages {s.advantages}"),
            ("gamma", critic or s.gamma == 1, f"1 with advantages {s.advantages}"),
            ("whiten_rewards", not s.whiten_rewards or s.advantages != "group", "False with group"),
            ("value_clip_eps", critic or not s.value_clip_eps, "0 without a critic"),
            ("importance_cap", s.importance_cap > 1, "more than 1"),
            ("sampler_bits", s.sampler_bits < 24, "at most 23, as many as float32 has"),
            (
                "importance",
                s.importance == "none" or s.sampler_bits,
                "none, or sampler_bits with it: the sampler is the policy itself",
            ),
        ):
            if not fits:
                raise InputError(
                    f"ppo.{name}: expected {expected}; got {getattr(s, name)}: change one of them"
                )

    @property
    def has_critic(self) -> bool:
        """Is there a value head, and a loss for it?"""
        return self.advantages == "gae"

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * self.minibatches

    @property
    def clipping(self) -> dict[str, Any]:
        """The clip as the surrogates take it; dual_clip only where it is set."""
        dual_clip = {"dual_clip": self.dual_clip} if self.dual_clip else {}
        edges = self.clip_eps, self.clip_eps_high or self.clip_eps
        return {"clip": self.clip, "clip_eps": edges, **dual_clip}
