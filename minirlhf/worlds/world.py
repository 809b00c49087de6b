"""A world: where prompts, demonstrations and rewards come from."""

from collections.abc import Callable
from dataclasses import dataclass, field

from numpy.random import Generator


@dataclass(frozen=True)
class World:
    """Everything that training needs to know about its subject; text only, no tokens, no arrays.

    The full text of an example is prompt + joiner + response. A world has at least one source of
    preference: `annotate` (simulated annotator), `pairs` (given by the user) or `reward`, which
    replaces the reward model. `gold` is the true reward: logged, never trained on.
    """

    name: str
    demonstrations: list[tuple[str, str]]  # (prompt, response), what SFT imitates
    train_prompts: list[str]
    heldout_prompts: list[str]  # disjoint from train_prompts, unless there is one prompt in all
    heldout_demonstrations: list[tuple[str, str]] = field(default_factory=list)  # of those prompts
    gold: Callable[[str, str], float] | None = None  # (prompt, response) -> true reward
    annotate: Callable[[str, str, str, Generator], bool] | None = None  # (prompt, a, b, rng): a?
    pairs: list[tuple[str, str, str]] | None = None  # (prompt, chosen, rejected)
    reward: Callable[[str], float] | None = None  # full text -> reward
    joiner: str = " "
    max_prompt_tokens: int = 32  # suggestion, special tokens included
    max_response_tokens: int = 32  # suggestion, the end token included
    notes: tuple[str, ...] = ()  # what was dropped or cut, one sentence each, to be shown

    def full_text(self, prompt: str, response: str) -> str:
        """prompt + joiner + response, the text that `reward` sees."""
        return prompt + self.joiner + response
