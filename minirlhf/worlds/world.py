"""A world: where prompts, demonstrations and rewards come from."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from numpy.random import Generator

from minirlhf.worlds.rewards import UserReward


@dataclass(frozen=True)
class World:
    """Everything that training needs to know about its subject; text only, no tokens, no arrays.

    It has a source of preference, or serves fine-tuning alone: `annotate`, `pairs`, `reward`.
    """

    name: str
    demonstrations: list[tuple[str, str]]  # (prompt, response), what SFT imitates
    train_prompts: list[str]
    heldout_prompts: list[str]  # disjoint from train_prompts, unless there is one prompt in all
    heldout_demonstrations: list[tuple[str, str]] = field(default_factory=list)  # of those prompts
    gold: Callable[[str, str], float] | None = None  # (prompt, reply) -> true reward, only logged
    annotate: Callable[[str, str, str, Generator], bool] | None = None  # (prompt, a, b, rng): a?
    pairs: list[tuple[str, ...]] | None = None  # (prompt, best reply, .., worst reply)
    reward: UserReward | None = None  # the user's own
    joiner: str = " "
    max_prompt_tokens: int = 32  # suggestion, special tokens included
    max_response_tokens: int = 32  # suggestion, the end token included
    notes: tuple[str, ...] = ()  # what was dropped or cut, one sentence each, to be shown

    def continued(self) -> "World":
        """For a model without a separator: what joined a reply to its prompt begins the reply."""

        def begun(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
            return [(prompt, *(self.joiner + reply for reply in rest)) for prompt, *rest in rows]

        texts = {"demonstrations": begun(self.demonstrations), "joiner": ""}
        texts["heldout_demonstrations"] = begun(self.heldout_demonstrations)
        return replace(self, **texts, pairs=self.pairs and begun(self.pairs))

    def rewards(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The user's own reward of each reply; its text is prompt + joiner + response."""
        texts = [self.joiner.join(both) for both in zip(prompts, responses, strict=True)]
        return self.reward(prompts, responses, texts)

    def golds(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The true reward of each reply."""
        return [float(self.gold(*both)) for both in zip(prompts, responses, strict=True)]

    def gold_or_none(self, prompt: str, response: str) -> float | None:
        """The true reward, or None where there is none, or none for this prompt."""
        try:
            return self.gold(prompt, response) if self.gold else None
        except ValueError:  # a prompt that the world does not know
            return None
