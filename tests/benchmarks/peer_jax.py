"""The benchmark's JAX peer: everything compiled, decoding as one scan with its KV cache carried.

The same GPT-2, the same PPO, on the CPU; protocol.py says what it answers.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from protocol import Peer, Workload, serve

Tree = Any  # nested dicts of arrays, keyed by the parts of their paths in arrays.npz
jit = functools.partial(jax.jit, static_argnames="w")


def load_tree(w: Workload, owner: str) -> Tree:
    tree: Tree = {}
    for path, array in w.parameters(owner).items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.array(array)
    return tree


def linear(x: Array, p: Tree) -> Array:
    return x @ p["w"] + p["b"]


def layernorm(x: Array, p: Tree) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    var = jnp.square(x).mean(axis=-1, keepdims=True)
    return x * lax.rsqrt(var + 1e-5) * p["gain"] + p["bias"]


def queries_keys_values(x: Array, p: Tree, w: Workload) -> Array:
    """(3, B, H, T, D) from (B * T, C)."""
    qkv = linear(layernorm(x, p["ln1"]), p["attn"]["qkv"])
    qkv = qkv.reshape(w.batch_size, -1, 3, w.n_head, w.d_model // w.n_head)
    return qkv.transpose(2, 0, 3, 1, 4)


def attention(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """(B * T, C) from (B, H, T, D) queries and (B, H, S, D) keys; allowed (T, S)."""
    scores = jnp.einsum("bhtd,bhsd->bhts", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
    a = jnp.einsum("bhts,bhsd->bthd", weights, v)
    return a.reshape(-1, a.shape[2] * a.shape[3])


def rest_of_block(x: Array, a: Array, p: Tree) -> Array:
    x = x + linear(a, p["attn"]["out"])
    u = jax.nn.gelu(linear(layernorm(x, p["ln2"]), p["mlp"]["up"]), approximate=True)
    return x + linear(u, p["mlp"]["down"])


def blocks_of(p: Tree, w: Workload) -> list[Tree]:
    return [p["blocks"][str(i)] for i in range(w.n_layer)]


def transformer(p: Tree, tokens: Array, first: int, w: Workload) -> tuple[Array, list]:
    """h (B, T - first, C) at the columns from `first` on, and each block's keys and values.

    Rows (B * T, C) make faster gradients than (B, T, C).
    """
    B, T = tokens.shape
    x = (p["wte"][tokens] + p["wpe"][:T]).reshape(B * T, -1)
    causal = jnp.tri(T, dtype=bool)
    kv = []
    for block in blocks_of(p, w):
        q, k, v = queries_keys_values(x, block, w)
        x = rest_of_block(x, attention(q, k, v, causal), block)
        kv.append((k, v))
    return layernorm(x.reshape(B, T, -1)[:, first:], p["ln_f"]), kv


def decode(p: Tree, token: Array, kv: list, column: Array, w: Workload) -> tuple[Array, list]:
    """h (B, C) of one more token a sequence, and the extended keys and values (B, H, S, D)."""
    x = p["wte"][token] + p["wpe"][column]
    seen = (jnp.arange(kv[0][0].shape[2]) <= column)[None]
    extended = []
    for block, (keys, values) in zip(blocks_of(p, w), kv, strict=True):
        q, k, v = queries_keys_values(x, block, w)
        keys = lax.dynamic_update_slice_in_dim(keys, k, column, axis=2)
        values = lax.dynamic_update_slice_in_dim(values, v, column, axis=2)
        x = rest_of_block(x, attention(q, keys, values, seen), block)
        extended.append((keys, values))
    return layernorm(x, p["ln_f"]), extended


@functools.partial(jax.jit, static_argnames=("w", "with_logp"))
def sample(
    policy: Tree, prompts: Array, key: Array, w: Workload, with_logp: bool = False
) -> tuple[Array, Array | None]:
    """Prompts and new responses (B, P+R), and the log-probs (B, R) of the new tokens if wanted."""
    p, P, R = policy["transformer"], w.prompt_len, w.response_len

    def draw(h, key):
        logits = h @ p["wte"].T
        token = jax.random.categorical(key, logits)
        return token, token_logprobs(logits, token) if with_logp else None

    def step(carry, column_and_key):
        token, kv = carry
        column, key = column_and_key
        h, kv = decode(p, token, kv, column, w)
        token, logp = draw(h, key)
        return (token, kv), (token, logp)

    h, kv = transformer(p, prompts, P - 1, w)
    kv = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, R - 1), (0, 0))), kv)
    keys = jax.random.split(key, R)
    first, first_logp = draw(h[:, 0], keys[0])
    columns = jnp.arange(P, P + R - 1)
    _, (tokens, logp) = lax.scan(step, (first, kv), (columns, keys[1:]))
    tokens = jnp.concatenate([prompts, first[:, None], tokens.T], axis=1)
    return tokens, jnp.concatenate([first_logp[None], logp]).T if with_logp else None


def token_logprobs(logits: Array, targets: Array) -> Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def response_outputs(model: Tree, tokens: Array, w: Workload) -> tuple[Array, Array]:
    """Log-probs (B, R) and hidden states (B, R, C) of the responses."""
    P, p = w.prompt_len, model["transformer"]
    h, _ = transformer(p, tokens[:, :-1], P - 1, w)
    logits = h.reshape(-1, w.d_model) @ p["wte"].T
    return token_logprobs(logits, tokens[:, P:].reshape(-1)).reshape(h.shape[:2]), h


def scalar_head(h: Array, p: Tree) -> Array:
    return linear(h, p)[..., 0]


@jit
def response_logprobs(model: Tree, tokens: Array, w: Workload) -> Array:
    return response_outputs(model, tokens, w)[0]


def ppo_loss(policy: Tree, batch: dict[str, Array], w: Workload) -> Array:
    s, advantages, returns = w.ppo, batch["advantages"], batch["returns"]
    logp, h = response_outputs(policy, batch["tokens"], w)
    values = scalar_head(h, policy["value_head"])
    ratio = jnp.exp(logp - batch["old_logp"])
    clipped = jnp.clip(ratio, 1 - s.clip_eps, 1 + s.clip_eps)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
    moved = jnp.clip(values - batch["old_values"], -s.value_clip_eps, s.value_clip_eps)
    near = batch["old_values"] + moved
    errors = jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))
    return policy_loss + s.vf_coef * 0.5 * errors.mean()


loss_and_gradients = jit(jax.value_and_grad(ppo_loss))


def init_adamw(params: Tree) -> Tree:
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return {"step": jnp.zeros((), jnp.int32), "mean": zeros(params), "var": zeros(params)}


def adamw(params: Tree, gradients: Tree, state: Tree, w: Workload) -> tuple[Tree, Tree]:
    s, step = w.ppo, state["step"] + 1
    mean = jax.tree.map(lambda m, g: s.beta1 * m + (1 - s.beta1) * g, state["mean"], gradients)
    var = jax.tree.map(lambda v, g: s.beta2 * v + (1 - s.beta2) * g * g, state["var"], gradients)
    size, correction = s.learning_rate / (1 - s.beta1**step), jnp.sqrt(1 - s.beta2**step)
    params = jax.tree.map(
        lambda p, m, v: p - size * m / (jnp.sqrt(v) / correction + s.eps), params, mean, var
    )
    return params, {"step": step, "mean": mean, "var": var}


adamw_step = jit(adamw, donate_argnames=("params", "state"))


@functools.partial(jit, donate_argnames=("policy", "state"))
def update(policy: Tree, state: Tree, batch: dict[str, Array], w: Workload) -> tuple[Tree, Tree]:
    """One epoch: gradients of the whole batch, clipping, AdamW."""
    gradients = jax.grad(ppo_loss)(policy, batch, w)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, w.ppo.max_grad_norm / (norm + 1e-6))
    return adamw(policy, jax.tree.map(lambda g: scale * g, gradients), state, w)


def gae(rewards: Array, values: Array, w: Workload) -> Array:
    gamma, lam = w.ppo.gamma, w.ppo.lam

    def step(carry, reward_and_value):
        next_value, next_advantage = carry
        reward, value = reward_and_value
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        return (value, advantage), advantage

    nothing = jnp.zeros_like(values[:, 0])
    _, advantages = lax.scan(step, (nothing, nothing), (rewards.T, values.T), reverse=True)
    return advantages.T


@jit
def experience(
    policy: Tree, reference: Tree, reward: Tree, tokens: Array, w: Workload
) -> tuple[dict[str, Array], Array]:
    """What the loss holds constant, and the scores (B,)."""
    old_logp, h = response_outputs(policy, tokens, w)
    old_values = scalar_head(h, policy["value_head"])
    ref_logp, _ = response_outputs(reference, tokens, w)
    last, _ = transformer(reward["transformer"], tokens, tokens.shape[1] - 1, w)
    score = scalar_head(last[:, 0], reward["reward_head"])
    rewards = (-w.ppo.kl_coef * (old_logp - ref_logp)).at[:, -1].add(score)
    advantages = gae(rewards, old_values, w)
    returns = advantages + old_values
    advantages = (advantages - advantages.mean()) / jnp.sqrt(advantages.var() + 1e-8)
    batch = {
        "tokens": tokens,
        "old_logp": old_logp,
        "old_values": old_values,
        "advantages": advantages,
        "returns": returns,
    }
    return batch, score


class JaxPeer(Peer):
    def __init__(self, workload: Workload, variant: str):
        super().__init__(workload, variant)
        self.name = f"JAX {jax.__version__}"
        os.environ["NPROC"] = str(workload.threads)  # read when the first array is made
        jax.config.update("jax_platforms", "cpu")
        owners = ("policy", "reference", "reward")
        self.policy, self.reference, self.reward = (load_tree(workload, o) for o in owners)
        self.state = init_adamw(self.policy)
        self.batch = {name: jnp.array(x) for name, x in workload.batch().items()}
        self.key = jax.random.key(workload.seed)

    def loss(self) -> tuple[Array, Tree]:
        result = loss_and_gradients(self.policy, self.batch, w=self.workload)
        return jax.block_until_ready(result)

    def sample(self, with_logp: bool = False) -> tuple[Array, Array | None]:
        self.key, key = jax.random.split(self.key)
        prompts = self.batch["tokens"][:, : self.workload.prompt_len]
        result = sample(self.policy, prompts, key, w=self.workload, with_logp=with_logp)
        return jax.block_until_ready(result)

    def logprobs(self) -> Array:
        logp = response_logprobs(self.reference, self.batch["tokens"], w=self.workload)
        return logp.block_until_ready()

    @functools.cached_property
    def fixed_gradients(self) -> Tree:
        return self.loss()[1]

    def adamw(self) -> None:
        step = adamw_step(self.policy, self.fixed_gradients, self.state, w=self.workload)
        self.policy, self.state = jax.block_until_ready(step)

    def update(self) -> None:
        """One step of the optimiser on the fixed batch."""
        step = update(self.policy, self.state, self.batch, w=self.workload)
        self.policy, self.state = jax.block_until_ready(step)

    def iteration(self) -> None:
        self.learn(self.sample()[0])

    def learn(self, tokens: Array) -> dict[str, Array]:
        """From samples to updated parameters; returns the advantages and scores."""
        w = self.workload
        batch, score = experience(self.policy, self.reference, self.reward, tokens, w=w)
        for _ in range(w.ppo.epochs):
            self.policy, self.state = update(self.policy, self.state, batch, w=w)
        jax.block_until_ready(self.policy)
        return {"advantages": batch["advantages"], "score": score}

    def check(self, part: str) -> dict[str, np.ndarray]:
        if part == "loss":
            loss, gradients = self.loss()
            return {"loss": np.array(loss), **by_path(gradients)}
        if part == "sample":
            tokens, logp = self.sample(with_logp=True)
            return {"tokens": np.array(tokens, np.int64), "logp": np.array(logp)}
        if part == "logprobs":
            return {"logp": np.array(self.logprobs())}
        if part in ("adamw", "update"):
            getattr(self, part)()
            return by_path(self.policy)
        results = self.learn(self.batch["tokens"])
        return {name: np.array(x) for name, x in results.items()} | by_path(self.policy)


def by_path(policy: Tree) -> dict[str, np.ndarray]:
    """The arrays of a tree shaped like the policy, under their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(policy)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {f"policy.{name(path)}": np.array(x) for path, x in leaves}


if __name__ == "__main__":
    serve(JaxPeer)
