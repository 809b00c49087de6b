"""The benchmark's PyTorch peer: `eager`, or `compile` (torch.compile where it is faster).

On a GPU there is `graphs` too: an update, and the reference's log-probs, as one CUDA graph each.
The same GPT-2 or Llama, the same PPO. protocol.py says what it reads and answers.
"""

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import devices
import numpy as np
import torch
import torch.nn.functional as F
from protocol import Peer, Workload, serve
from torch import Tensor, nn


def norm(w: Workload) -> nn.Module:
    return nn.RMSNorm(w.d_model, eps=1e-5) if w.block == "llama" else nn.LayerNorm(w.d_model)


class RotaryAngles(nn.Module):
    """cos and sin (T, D) of all positions, both halves of the channels alike."""

    def __init__(self, n_positions: int, D: int):
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, D, 2).double() / D)
        angles = torch.outer(torch.arange(n_positions).double(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Block(nn.Module):
    """x + Attention(Norm1(x)), then x + MLP(Norm2(x))."""

    def __init__(self, w: Workload):
        super().__init__()
        C, self.n_head, width = w.d_model, w.n_head, w.d_ff or 4 * w.d_model
        bias = w.block == "gpt2"
        self.ln1, self.ln2 = norm(w), norm(w)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(C, 3 * C, bias=bias), "out": nn.Linear(C, C, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(C, width, bias=bias), "down": nn.Linear(width, C, bias=bias)}
        )
        if w.block == "llama":
            self.mlp["gate"] = nn.Linear(C, width, bias=False)

    def forward(
        self, x: Tensor, kv: Tensor | None, column: int, rotary: RotaryAngles | None
    ) -> Tensor:
        qkv = self.attn["qkv"](self.ln1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        if rotary is not None:
            columns = slice(column, column + x.shape[1])
            cos, sin = rotary.cos[columns], rotary.sin[columns]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if kv is not None:
            end = column + x.shape[1]
            kv[0, :, :, column:end], kv[1, :, :, column:end] = k, v
            k, v = kv[:, :, :, :end]
        a = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.attn["out"](a.transpose(1, 2).flatten(2))
        n = self.ln2(x)
        if "gate" in self.mlp:
            u = F.silu(self.mlp["gate"](n)) * self.mlp["up"](n)
        else:
            u = F.gelu(self.mlp["up"](n), approximate="tanh")
        return x + self.mlp["down"](u)


class Transformer(nn.Module):
    """Pre-LN GPT-2, or Llama, without its output layer."""

    def __init__(self, w: Workload):
        super().__init__()
        self.wte = nn.Embedding(w.vocab_size, w.d_model)
        n_positions = w.prompt_len + w.response_len
        self.wpe = self.rotary = None
        if w.block == "llama":
            self.rotary = RotaryAngles(n_positions, w.d_model // w.n_head)
        else:
            self.wpe = nn.Embedding(n_positions, w.d_model)
        self.blocks = nn.ModuleList(Block(w) for _ in range(w.n_layer))
        self.ln_f = norm(w)

    def forward(
        self, tokens: Tensor, first: int, kv: Tensor | None = None, column: int = 0
    ) -> Tensor:
        """h (B, T - first, C) at the columns from `first` on.

        Args:
            tokens: (B, T), standing in the columns from `column` on.
            kv: (L, 2, B, H, S, D) keys and values of the columns before, extended in place.
        """
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[column : column + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if kv is None else kv[i], column, self.rotary)
        return self.ln_f(x[:, first:])


def named_parameters(model: nn.Module):
    """(path in arrays.npz, parameter): Linear's weight is stored transposed there."""
    names = {nn.Linear: ("w", "b"), nn.LayerNorm: ("gain", "bias"), nn.RMSNorm: ("gain", "")}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield path, module.weight
        elif type(module) in names:
            weight, bias = names[type(module)]
            yield f"{path}.{weight}", module.weight
            if getattr(module, "bias", None) is not None:
                yield f"{path}.{bias}", module.bias


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def in_folder_layout(path: str, x: Tensor) -> Tensor:
    return x.T if path.endswith(".w") else x


def load_model(w: Workload, owner: str, head: str | None = None) -> nn.ModuleDict:
    model = nn.ModuleDict({"transformer": Transformer(w)})
    if head is not None:
        model[head] = nn.Linear(w.d_model, 1)
    arrays = w.parameters(owner)
    with torch.no_grad():
        for path, parameter in named_parameters(model):
            parameter.copy_(in_folder_layout(path, torch.from_numpy(arrays[path])))
    return model.to(devices.TORCHS)


def next_logits(model: nn.ModuleDict, h: Tensor) -> Tensor:
    return F.linear(h, model["transformer"].wte.weight)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, R); the fused cross entropy is faster than gather - logsumexp."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -loss.view(targets.shape)


def response_logprobs(model: nn.ModuleDict, tokens: Tensor, prompt_len: int) -> Tensor:
    h = model["transformer"](tokens[:, :-1], prompt_len - 1)
    return token_logprobs(next_logits(model, h), tokens[:, prompt_len:])


def policy_outputs(policy: nn.ModuleDict, tokens: Tensor, prompt_len: int) -> tuple[Tensor, Tensor]:
    """Log-probs and values of the responses, (B, R) each."""
    h = policy["transformer"](tokens[:, :-1], prompt_len - 1)
    logp = token_logprobs(next_logits(policy, h), tokens[:, prompt_len:])
    return logp, policy["value_head"](h).squeeze(-1)


def reward_scores(reward: nn.ModuleDict, tokens: Tensor) -> Tensor:
    h = reward["transformer"](tokens, tokens.shape[1] - 1)
    return reward["reward_head"](h).flatten()


def ppo_loss(
    policy: nn.ModuleDict,
    tokens: Tensor,
    old_logp: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    w: Workload,
) -> Tensor:
    logp, values = policy_outputs(policy, tokens, w.prompt_len)
    eps, value_eps = w.ppo.clip_eps, w.ppo.value_clip_eps
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - eps, 1 + eps)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    near = old_values + (values - old_values).clamp(-value_eps, value_eps)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    return policy_loss + w.ppo.vf_coef * 0.5 * errors.mean()


def gae(rewards: Tensor, values: Tensor, w: Workload) -> Tensor:
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    columns = []
    for reward, value in zip(reversed(rewards.unbind(1)), reversed(values.unbind(1)), strict=True):
        td = reward + w.ppo.gamma * next_value - value
        next_advantage = td + w.ppo.gamma * w.ppo.lam * next_advantage
        next_value = value
        columns.append(next_advantage)
    return torch.stack(columns[::-1], dim=1)


class TorchPeer(Peer):
    def __init__(self, workload: Workload, variant: str):
        super().__init__(workload, variant)
        self.name = f"PyTorch {torch.__version__} {variant}"
        self.best_threads: dict[str, int] = {}
        torch.manual_seed(workload.seed)
        if variant not in ("eager", "compile", "graphs"):
            raise ValueError(f"variant: expected eager, compile or graphs; got {variant!r}")
        functions = (ppo_loss, policy_outputs, response_logprobs, reward_scores)
        if variant == "compile":
            functions = [torch.compile(f, dynamic=False) for f in functions]
        self.ppo_loss, self.policy_outputs, self.response_logprobs, self.reward_scores = functions

        self.policy = load_model(workload, "policy", "value_head")
        s = workload.ppo
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=s.learning_rate,
            betas=(s.beta1, s.beta2),
            eps=s.eps,
            weight_decay=0.0,
            fused=True,
            capturable=variant == "graphs",
        )
        arrays = {name: torch.from_numpy(x) for name, x in workload.batch().items()}
        self.batch = {name: x.to(devices.TORCHS) for name, x in arrays.items()}

    @cached_property
    def reference(self) -> nn.ModuleDict:
        return load_model(self.workload, "reference")

    @cached_property
    def reward(self) -> nn.ModuleDict:
        return load_model(self.workload, "reward", "reward_head")

    def at_best_threads(self, part: str, f: Callable[[], Any]) -> Any:
        """f() with one thread or all: whichever was faster at the first call of a part."""
        if devices.TORCHS == "cuda":
            return f()
        if part not in self.best_threads:
            laps = {}
            for n in (1, self.workload.threads):
                torch.set_num_threads(n)
                f()  # compilation, memory
                start = time.perf_counter()
                f()
                laps[n] = time.perf_counter() - start
            self.best_threads[part] = min(laps, key=laps.get)
        torch.set_num_threads(self.best_threads[part])
        return f()

    def loss(self) -> Tensor:
        """Loss of the fixed batch; the gradients are left at the parameters."""
        return self.gradients(self.batch)

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        return self.at_best_threads("loss", lambda: self.backward(batch))

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        loss = self.ppo_loss(self.policy, **batch, w=self.workload)
        loss.backward()
        return loss

    def sample(self) -> Tensor:
        return self.at_best_threads("sample", self.draw)

    @torch.inference_mode()
    def draw(self, logprobs: list[Tensor] | None = None) -> Tensor:
        """Prompts and new responses (B, P+R).

        Eager in both variants. A compiled step was slower: 23 ms a sample to 19 on one thread at
        V 64, C 32, L 2, 8 new tokens for 256 prompts, with the column as a symbolic size or with
        all columns attended to under a mask.

        Args:
            logprobs: a list that receives the (B,) log-probs of the tokens, column by column.
        """
        w = self.workload
        P, R = w.prompt_len, w.response_len
        transformer = self.policy["transformer"]
        prompts = self.batch["tokens"][:, :P]
        tokens = torch.cat([prompts, prompts.new_empty(len(prompts), R)], dim=1)
        sizes = w.n_layer, 2, len(prompts), w.n_head, P + R - 1, w.d_model // w.n_head
        kv = torch.empty(sizes, device=prompts.device)
        h = transformer(prompts, P - 1, kv)
        for column in range(P, P + R):
            logits = next_logits(self.policy, h[:, 0])
            new = torch.multinomial(logits.softmax(dim=-1), 1)
            tokens[:, column : column + 1] = new
            if logprobs is not None:
                logprobs.append(logits.log_softmax(dim=-1).gather(1, new)[:, 0])
            if column < P + R - 1:
                h = transformer(new, 0, kv, column)
        return tokens

    @torch.inference_mode()
    def logprobs(self) -> Tensor:
        tokens, P = self.batch["tokens"], self.workload.prompt_len
        if self.variant == "graphs":
            return self.logprobs_graph()
        return self.at_best_threads(
            "logprobs", lambda: self.response_logprobs(self.reference, tokens, P)
        )

    def adamw(self) -> None:
        """One step with the gradient of the fixed batch, made at the first call."""
        if self.policy["value_head"].bias.grad is None:
            self.loss()
        self.optimizer.step()

    def update(self) -> None:
        """One step of the optimiser on the fixed batch."""
        self.step(self.batch)

    def step(self, batch: dict[str, Tensor]) -> None:
        if self.variant == "graphs":
            for name, x in batch.items():
                self.batch_of_graph[name].copy_(x)
            self.step_graph()
        else:
            self.learn_from(batch)

    def learn_from(self, batch: dict[str, Tensor]) -> None:
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.workload.ppo.max_grad_norm)
        self.optimizer.step()

    @cached_property
    def batch_of_graph(self) -> dict[str, Tensor]:
        """Memory that the graph of an update reads."""
        return {name: x.clone() for name, x in self.batch.items()}

    @cached_property
    def step_graph(self) -> Callable[[], None]:
        """An update as one graph; the updates that come before its capture are undone."""
        before = [p.detach().clone() for p in self.policy.parameters()]
        replay = captured(lambda: self.learn_from(self.batch_of_graph))
        with torch.no_grad():
            for p, x in zip(self.policy.parameters(), before, strict=True):
                p.copy_(x)
            for moments in self.optimizer.state.values():
                for x in moments.values():
                    x.zero_()
        return replay

    @cached_property
    def logprobs_graph(self) -> Callable[[], Tensor]:
        tokens, P = self.batch["tokens"], self.workload.prompt_len
        return captured(lambda: self.response_logprobs(self.reference, tokens, P))

    def wait(self) -> None:
        if devices.TORCHS == "cuda":
            torch.cuda.synchronize()

    def launches(self, part: str) -> int | None:
        return devices.launched(getattr(self, part)) if devices.TORCHS == "cuda" else None

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_reserved() if devices.TORCHS == "cuda" else None

    def iteration(self) -> None:
        self.learn(self.sample())

    def learn(self, tokens: Tensor) -> dict[str, Tensor]:
        """From samples to updated parameters; returns the advantages and scores."""
        batch, score = self.experience(tokens)
        batch = {name: x.clone() for name, x in batch.items()}  # autograd keeps no inference tensor
        for _ in range(self.workload.ppo.epochs):
            self.step(batch)
        return {"advantages": batch["advantages"], "score": score}

    @torch.inference_mode()
    def experience(self, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the loss holds constant, and the scores (B,)."""
        w = self.workload
        torch.set_num_threads(w.threads)
        old_logp, old_values = self.policy_outputs(self.policy, tokens, w.prompt_len)
        ref_logp = self.response_logprobs(self.reference, tokens, w.prompt_len)
        score = self.reward_scores(self.reward, tokens)
        rewards = -w.ppo.kl_coef * (old_logp - ref_logp)
        rewards[:, -1] += score
        advantages = gae(rewards, old_values, w)
        returns = advantages + old_values
        var, mean = torch.var_mean(advantages, correction=0)
        advantages = (advantages - mean) / torch.sqrt(var + 1e-8)
        batch = {
            "tokens": tokens,
            "old_logp": old_logp,
            "old_values": old_values,
            "advantages": advantages,
            "returns": returns,
        }
        return batch, score

    def check(self, part: str) -> dict[str, np.ndarray]:
        if part == "loss":
            return {"loss": to_numpy(self.loss()), **self.policy_arrays("grad")}
        if part == "sample":
            logprobs: list[Tensor] = []
            tokens = self.draw(logprobs)
            return {"tokens": to_numpy(tokens), "logp": to_numpy(torch.stack(logprobs, dim=1))}
        if part == "logprobs":
            return {"logp": to_numpy(self.logprobs())}
        if part in ("adamw", "update"):
            getattr(self, part)()
            return self.policy_arrays("data")
        results = self.learn(self.batch["tokens"])
        return {name: to_numpy(x) for name, x in results.items()} | self.policy_arrays("data")

    def policy_arrays(self, attribute: str) -> dict[str, np.ndarray]:
        """Parameters ("data") or gradients ("grad") under their paths."""
        return {
            f"policy.{path}": to_numpy(in_folder_layout(path, getattr(parameter, attribute)))
            for path, parameter in named_parameters(self.policy)
        }


def captured(f: Callable[[], Any]) -> Callable[[], Any]:
    """f as one CUDA graph, which reads and writes the same memory at every call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is made at the first calls
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = f()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


if __name__ == "__main__":
    serve(TorchPeer)
