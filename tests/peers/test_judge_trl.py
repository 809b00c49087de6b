"""TRL's own losses through `judge`, unchanged, beside our formulas of their KL terms.

The trainer's `_compute_loss` runs without a model: what it reads of the trainer stands in a
namespace, and the log-probs of the tokens are handed in where it would ask a model for them.
"""

import collections
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16")

from minirlhf import judge
from minirlhf.exact.judge import SAMPLERS
from minirlhf.exact.libraries import LIBRARIES, TERMS

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # the peer's own
]
SIZE, ON_POLICY = (3, 3), next(iter(SAMPLERS))
torch.set_num_threads(1)

SUMMED = ("dr_grpo", "dapo", "cispo", "luspo", "vespo")  # a divisor that all responses share: 1
MEANS = ("grpo", "bnpo", "sapo")  # of the response; bnpo's is of the batch, here one response


def trl_loss(folder, **settings):
    """A function of log-probs that is TRL's."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 1}
    config = trl.GRPOConfig(output_dir=str(folder), **quiet, **settings)
    fields = ("beta", "loss_type", "importance_sampling_level", "top_entropy_quantile", "use_vllm")
    fields += ("max_completion_length", "off_policy_mask_threshold")
    trainer = types.SimpleNamespace(
        **{name: getattr(config, name) for name in fields},
        args=types.SimpleNamespace(**{**vars(config), "steps_per_generation": 1}),
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": collections.defaultdict(list)},
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
    )

    def loss(logp, old_logp, ref_logp, advantages, mask):
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, 0 * mask, None)
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        inputs = {"prompt_ids": tokens[:, :1], "prompt_mask": mask[:, :1]}
        inputs |= {"completion_ids": tokens, "completion_mask": mask}
        inputs |= {"old_per_token_logps": old_logp, "ref_per_token_logps": ref_logp}
        inputs |= {"advantages": advantages[:, 0], "num_items_in_batch": torch.tensor(1.0)}
        return trl.GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


def mean_of(f):
    """A formula of ours, a response's mean."""

    def mean(logp, old_logp, ref_logp, mask):
        of_tokens = f(*((logp, old_logp, ref_logp) if "old_logp" in names else (logp, ref_logp)))
        return (mask * of_tokens).sum() / mask.sum()

    names = f.__code__.co_varnames
    return mean


def numbers(verdict):
    return np.array([list(row.values()) for row in verdict.rows])


def test_these_are_all_of_its_losses(tmp_path):
    source = trl.GRPOTrainer._compute_loss.__code__
    named = {c for c in _constants(source) if c in {*SUMMED, *MEANS}}
    assert named == {*SUMMED, *MEANS}
    with pytest.raises(ValueError, match="Unknown loss type"):
        judge_once = trl_loss(tmp_path, loss_type="grpo", beta=1.0)
        judge_once.__closure__[0].cell_contents.loss_type = "another"
        ones = torch.zeros(1, 2, dtype=torch.float64)
        judge_once(ones, ones, ones, ones, ones + 1)


def _constants(code):
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from (word for word in constant if isinstance(word, str))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", [*SUMMED, *MEANS])
def test_every_loss_type(tmp_path, loss_type, corrected):
    settings = {"loss_type": loss_type, "use_bias_correction_kl": corrected, "epsilon_high": 5.0}
    theirs = judge(trl_loss(tmp_path, beta=1.0, **settings), framework="torch", size=SIZE)
    row = LIBRARIES["trl-grpo" if corrected else "trl-grpo-uncorrected"]
    f = mean_of(TERMS[row.term]) if loss_type in MEANS else TERMS[row.term]
    ours = judge(f, framework="numpy", size=SIZE)
    penalties = [verdict for verdict in theirs.verdicts if verdict.part == "kl"]
    for their, our in zip(penalties, ours.verdicts, strict=True):
        assert (their.claim, their.given, their.value_is) == (our.claim, our.given, our.value_is)
        np.testing.assert_allclose(numbers(their), numbers(our), rtol=1e-8, atol=1e-8)
    prefix = "mean_" * (loss_type in MEANS)
    assert theirs.verdicts[0].claim == prefix + ("token_kl" if corrected else "token_forward_kl")
    assert theirs.holds(f"{prefix}reward") and not theirs.reads_padding


def judged(folder, **settings):
    report = judge(trl_loss(folder, **settings), framework="torch", size=SIZE)
    return [verdict.claim for verdict in report.verdicts if verdict.given == ON_POLICY]


def test_what_its_defaults_and_its_sequence_ratio_do(tmp_path):
    """As of release 1.16: the correction is the default; with GSPO's ratio it is no divergence's
    gradient; and cispo, whose ratio is cut at epsilon_high, is 0.2 of one with the default of it.
    """
    assert judged(tmp_path, beta=0.04) == ["0.04 x token_kl", "reward"]
    gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    assert judged(tmp_path, beta=0.04, **gspo) == ["none of these", "mean_reward"]
    plain = judged(tmp_path, beta=0.04, use_bias_correction_kl=False, **gspo)
    assert plain == ["0.04 x mean_token_forward_kl", "mean_reward"]
    assert judged(tmp_path, beta=0.0) == ["reward"]
    assert judged(tmp_path, beta=0.0, loss_type="cispo") == ["0.2 x reward"]
