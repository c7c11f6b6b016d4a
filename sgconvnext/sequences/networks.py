"""Networks for sequences: a classifier and a causal language model, of SGConv and attention in any order.

timm creates them by name: `sequence_classifier` and `sequence_lm`. `backbone` says what their layers are.

Letters: B batch, L tokens, C channels, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from .backbone import Backbone

COLDEST = 1e-3  # temperature; below it logits could become infinite


class SequenceClassifier(Backbone):
    """Tokens (B, L), or signals (B, in_chans, L), to the logits of a class: embedding, layers, mean, linear head.

    Every token sees all others.

    Args:
        num_classes: outputs; 0: none.
        vocabulary: V, 256 if neither is given; or
        in_chans: channels of a signal.
        pad_token: the token that stands for none. It takes no part, so a sequence may be filled up with it.
        length, layers, dim, others: as of `Backbone`.

    Raises:
        ValueError: unknown letters, both or neither of vocabulary and in_chans; in forward, x of another kind or
            longer than the length.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        vocabulary: int | None = None,
        in_chans: int = 0,
        pad_token: int | None = None,
        length: int = 1024,
        layers: str = "CCCC",
        dim: int = 128,
        **others: Any,
    ) -> None:
        super().__init__(length, layers, dim, causal=False, **others)
        if vocabulary is None:
            vocabulary = 0 if in_chans else 256
        if min(vocabulary, in_chans) != 0 or max(vocabulary, in_chans) < 1:
            raise ValueError(
                f"vocabulary={vocabulary} and in_chans={in_chans}: give one of them, of tokens or of signals"
            )
        self.num_classes, self.vocabulary, self.in_chans = num_classes, vocabulary, in_chans
        self.pad_token = pad_token
        self.embed = nn.Embedding(vocabulary, dim) if vocabulary else nn.Linear(in_chans, dim)
        self.reset_classifier(num_classes)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of tokens (B, L) or signals (B, in_chans, L)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, L, C) of tokens (B, L) or signals (B, in_chans, L); at a pad_token, the mean of the other tokens."""
        self._check(x)
        seen = None if self.pad_token is None else x != self.pad_token
        features = self.mix(self.embed(x if self.vocabulary else x.mT), seen)
        if seen is None:
            return features
        there = seen[..., None]
        mean = (features.float() * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return torch.where(there, features, mean.to(features.dtype))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean over the tokens of features (B, L, C), and its logits unless pre_logits."""
        x = x.float().mean(1).to(x.dtype) if x.dtype != torch.float64 else x.mean(1)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes; the mean is the only pooling."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: a sequence is pooled by its mean, 'avg'")
        self.num_classes = num_classes
        like: Any = {"device": self.embed.weight.device, "dtype": self.embed.weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()

    def _check(self, x: Tensor) -> None:
        if self.vocabulary:
            _check_tokens(x, "B, L")
        elif x.ndim != 3 or x.shape[1] != self.in_chans or x.shape[2] == 0:
            raise ValueError(
                f"x is {tuple(x.shape)}; this network takes signals (B, {self.in_chans}, L), L at least 1"
            )


def _check_tokens(tokens: Tensor, layout: str) -> None:
    right = tokens.ndim == len(layout.split(", ")) and tokens.dtype in (torch.int64, torch.int32)
    if not right or 0 in tokens.shape[1:]:
        told = f"tokens are {tuple(tokens.shape)} {tokens.dtype}"
        raise ValueError(f"{told}; this network takes ({layout}) of int64 or int32, at least one each")


class LanguageModel(Backbone):
    """Tokens (B, L) to the logits (B, L, V) of the token that follows each; the embedding is also the head.

    Args:
        num_classes: V; of bytes 256.
        length, layers, dim, others: as of `Backbone`.

    Raises:
        ValueError: unknown letters; in forward, x is not (B, L) of whole numbers, or longer than the length.
    """

    def __init__(
        self, num_classes: int = 256, *, length: int = 1024, layers: str = "CCCC", dim: int = 256, **others: Any
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1: it is the vocabulary")
        super().__init__(length, layers, dim, causal=True, **({"mlp_ratio": 4.0} | others))
        self.num_classes = num_classes
        self.embed = nn.Embedding(num_classes, dim)
        self.init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of tokens (B, L)."""
        _check_tokens(tokens, "B, L")
        return self._logits(self.mix(self.embed(tokens)))

    def step(self, tokens: Tensor, states: "States | None" = None) -> tuple[Tensor, "States"]:
        """Logits (B, V) after one more token (B), equal to the last of forward; without gradients.

        Args:
            tokens: the newest ones (B).
            states: of all layers, as the last call returned them; they are changed in place. None at the start. The
                weights have to stay as they are.
        """
        _check_tokens(tokens, "B")
        return self._generate("step", self.embed(tokens), states)

    def prefill(self, tokens: Tensor, states: "States | None" = None) -> tuple[Tensor, "States"]:
        """Logits (B, V) after the last of a chunk of tokens (B, T), which follows those of the states."""
        _check_tokens(tokens, "B, L")
        logits, states = self._generate("prefill", self.embed(tokens), states, last=True)
        return logits, states

    @torch.no_grad()
    def _generate(self, how: str, x: Tensor, states: "States | None", last: bool = False) -> tuple[Tensor, "States"]:
        before = states if states is not None else States([None] * len(self.layers))
        if before.layers[0] is not None and before.layers[0].count + (x.shape[1] if last else 1) > self.length:
            raise ValueError(f"the state has {before.layers[0].count} of length={self.length} tokens; no more fit")
        counts = [0 if state is None else state.count for state in before.layers]
        after = []
        layer: Any
        try:
            for layer, state in zip(self.layers, before.layers, strict=True):
                x, state = layer.generate(how, x, state)
                after.append(state)
        except BaseException:  # out of memory, Ctrl-C: another try finds the states as they were
            for state, count in zip(before.layers, counts, strict=True):
                if state is not None:
                    state.count = count
            raise
        return self._logits(self.norm(x[:, -1] if last else x)), States(after)

    @torch.no_grad()
    def generate(self, prompt: Tensor, num: int, temperature: float = 1.0, chunk: int = 4096) -> Tensor:
        """``num`` further tokens (B, num) after a prompt (B, T), T at least 1.

        Args:
            prompt: tokens.
            num: of new tokens; T + num must not exceed the length.
            temperature: divides the logits; 0 takes the most likely token.
            chunk: tokens of the prompt that are read at a time.
        """
        _check_tokens(prompt, "B, L")
        if num < 0 or chunk < 1 or prompt.shape[1] + num > self.length:
            raise ValueError(
                f"{prompt.shape[1]} + {num} tokens, chunk={chunk}: use at most {self.length} in all, chunks from 1 on"
            )
        if not (temperature == 0 or COLDEST <= temperature < math.inf):
            raise ValueError(f"temperature={temperature} must be 0, or a number from {COLDEST} on")
        if self.training:
            raise ValueError("dropout is on: call eval() before generate()")
        states: States | None = None
        found: list[Tensor] = []
        for part in prompt.split(chunk, dim=1):
            logits, states = self.prefill(part, states)
        for _ in range(num):
            if found:
                logits, states = self.step(found[-1], states)
            if temperature == 0:
                found.append(logits.argmax(-1))
            else:
                found.append(torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0])
        return torch.stack(found, dim=1) if found else prompt[:, :0]

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed.weight)


class States:
    """The states of all layers of a language model. Index it by rows to shrink or reorder the batch."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers[0])

    def __getitem__(self, rows: Tensor | slice | list[int]) -> "States":
        return States([state[rows] for state in self.layers])

    def join(self, other: "States") -> "States":
        """The samples of both, one batch after the other; each may have seen its own number of tokens."""
        return States([own.join(theirs) for own, theirs in zip(self.layers, other.layers, strict=True)])


def _refuse_pretrained(name: str, pretrained: bool) -> None:
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights; train it with train.py")


@register_model
def sequence_classifier(pretrained: bool = False, **kwargs: Any) -> SequenceClassifier:
    """A classifier of tokens or signals, see `SequenceClassifier`."""
    _refuse_pretrained("sequence_classifier", pretrained)
    return SequenceClassifier(**_own(kwargs))


@register_model
def sequence_lm(pretrained: bool = False, **kwargs: Any) -> LanguageModel:
    """A causal language model, see `LanguageModel`."""
    _refuse_pretrained("sequence_lm", pretrained)
    return LanguageModel(**_own(kwargs))


def _own(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that timm gives to every model."""
    timms = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in kwargs.items() if key not in timms}
