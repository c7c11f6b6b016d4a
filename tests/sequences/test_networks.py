"""Networks for sequences: padding, causality, generation, and what timm asks of a model."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import refused, relative_error
from torch import Tensor, nn

import sgconvnext  # noqa: F401  registers the networks
from sgconvnext.sequences.attention import Attention
from sgconvnext.sequences.local_convolution import LocalConvolution
from sgconvnext.sequences.mixer import SGConvMixer
from sgconvnext.sequences.networks import LanguageModel, SequenceClassifier

CLASSIFIER: dict[str, Any] = {"num_classes": 5, "vocabulary": 9, "pad_token": 0, "length": 40, "dim": 16}
LM: dict[str, Any] = {"num_classes": 11, "length": 60, "dim": 16, "sgconv": {"scale_dim": 4}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lively(model: Any) -> Any:
    """With weights so large that layers change their inputs visibly, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
    return model.eval()


def test_features_and_head_make_the_logits_of_padded_tokens_too() -> None:
    model = lively(SequenceClassifier(layers="CA", **CLASSIFIER))
    tokens = torch.randint(1, 9, (3, 40))
    tokens[0, 20:] = 0
    with torch.no_grad():
        features = model.forward_features(tokens)
        assert relative_error(model.forward_head(features), model(tokens)) <= 1e-6
        assert relative_error(features[0, 20:], features[0, :20].mean(0).expand(20, -1)) <= 1e-6


def test_pooling_in_half_precision_counts_in_full() -> None:
    model = SequenceClassifier(in_chans=1, length=70000, dim=8, layers="L").half()
    pooled = model.forward_head(torch.full((1, 66000, 8), 0.5, dtype=torch.float16), pre_logits=True)
    assert relative_error(pooled, torch.full((1, 8), 0.5)) <= 1e-3


def test_failed_step_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(LanguageModel(layers="CAC", **LM))
    tokens = torch.randint(0, 11, (2, 20))
    _, states = model.prefill(tokens[:, :10])
    with monkeypatch.context() as patched:
        patched.setattr(model.layers[2].mixer, "_project", lambda y: 1 / 0)
        for how, more in (("step", tokens[:, 10]), ("prefill", tokens[:, 10:15])):
            with pytest.raises(ZeroDivisionError):
                getattr(model, how)(more, states)
    assert [state.count for state in states.layers] == [10, 10, 10]
    with torch.no_grad():
        want = model(tokens)
    assert relative_error(model.step(tokens[:, 10], states)[0], want[:, 10]) <= 5e-6


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("layers", ["C", "A", "L", "CAL"])
def test_classifier_does_not_see_what_fills_a_sequence_up(layers: str, post_norm: bool) -> None:
    model = lively(SequenceClassifier(layers=layers, post_norm=post_norm, mlp_ratio=2, **CLASSIFIER))
    tokens = torch.randint(1, 9, (3, 30))
    with torch.no_grad():
        want = model(tokens)
        assert relative_error(model(F.pad(tokens, (0, 10))), want) <= 2e-6
        assert relative_error(model(torch.cat([tokens[:, :15], tokens[:, 16:]], dim=1)), want) >= 1e-3


@pytest.mark.parametrize("layers", ["C", "A", "L", "AAC ACC"])
def test_language_model_sees_no_later_token_and_every_earlier_one_it_can(layers: str) -> None:
    model = lively(LanguageModel(layers=layers, **LM))
    tokens = torch.randint(0, 11, (1, 60))
    changed = tokens.clone()
    changed[0, 30] = (tokens[0, 30] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert relative_error(after[:, :30], before[:, :30]) <= 2e-6
    moved = (after - before)[0].abs().amax(-1) > 1e-7
    assert moved[30]
    assert bool(moved[59]) == (layers != "L")  # 7 taps do not reach so far


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("layers", ["CC", "AA", "AC CA"])
def test_generation_token_by_token_and_by_chunks_is_the_parallel_form(layers: str, post_norm: bool) -> None:
    model = lively(LanguageModel(layers=layers, post_norm=post_norm, **LM))
    tokens = torch.randint(0, 11, (2, 60))
    with torch.no_grad():
        want = model(tokens)
    states, steps = None, []
    for token in tokens.unbind(1):
        logits, states = model.step(token, states)
        steps.append(logits)
    assert relative_error(torch.stack(steps, dim=1), want) <= 5e-6
    states = None
    for part in tokens.split(17, dim=1):
        logits, states = model.prefill(part, states)
    assert relative_error(logits, want[:, -1]) <= 5e-6


def test_batch_of_a_language_model_shrinks_and_grows() -> None:
    model = lively(LanguageModel(layers="AC", **LM))
    tokens = torch.randint(0, 11, (3, 60))
    with torch.no_grad():
        want = model(tokens)
    _, old = model.prefill(tokens[:, :30])
    _, young = model.prefill(tokens[1:2, :12])
    states = old[[2, 0]].join(young)
    assert len(states) == 3
    for i in range(3):  # attention's positions are each sample's own
        logits, states = model.step(torch.cat([tokens[[2, 0], 30 + i], tokens[1:2, 12 + i]]), states)
        assert relative_error(logits, torch.cat([want[[2, 0], 30 + i], want[1:2, 12 + i]])) <= 5e-6
    logits, _ = model.prefill(tokens[1:2, 15:20], states[[2]])
    assert relative_error(logits, want[1:2, 19]) <= 5e-6


def test_generated_tokens_are_the_likeliest_ones_and_do_not_depend_on_chunks() -> None:
    model = lively(LanguageModel(layers="CA", **LM))
    prompt = torch.randint(0, 11, (2, 20))
    found = model.generate(prompt, 10, temperature=0)
    assert torch.equal(model.generate(prompt, 10, temperature=0, chunk=7), found)
    with torch.no_grad():
        logits = model(torch.cat([prompt, found], dim=1))
    assert torch.equal(logits[:, 19:-1].argmax(-1), found)
    assert model.generate(prompt, 0).shape == (2, 0)
    torch.manual_seed(1)
    assert model.generate(prompt, 40).unique().numel() > 3


@pytest.mark.parametrize("signal", [False, True])
def test_classifier_is_a_model_of_timm(signal: bool) -> None:
    options = CLASSIFIER | ({"vocabulary": 0, "in_chans": 2} if signal else {})
    options.pop("pad_token")
    model: Any = timm.create_model("sequence_classifier", layers="CC", drop_rate=0.1, drop_path_rate=0.1, **options)
    x = torch.randn(2, 2, 40) if signal else torch.randint(1, 9, (2, 40))
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert features.shape == (2, 40, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert relative_error(model.forward_head(features), model(x)) <= 1e-6
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    assert isinstance(model.get_classifier(), nn.Identity)


def test_checkpointed_layers_have_the_same_gradients() -> None:
    model = LanguageModel(layers="CA", **LM)
    tokens = torch.randint(0, 11, (2, 20))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(tokens).square().sum(), list(model.parameters())))

    plain = gradients()
    model.set_grad_checkpointing()
    assert max(map(relative_error, gradients(), plain)) <= 1e-6


def test_weights_are_drawn_again_after_a_build_without_memory() -> None:
    with torch.device("meta"):
        model = LanguageModel(layers="CAL", **LM)
    model.to_empty(device="cpu").init_weights()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert float(model.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_classifier_takes_signals_at_half_the_rate() -> None:
    model = lively(SequenceClassifier(in_chans=1, length=400, dim=8, layers="CC", num_classes=3))
    half = SequenceClassifier(in_chans=1, length=400, dim=8, layers="CC", num_classes=3, subsample=2).eval()
    half.load_state_dict(model.state_dict())
    x = torch.sin(torch.arange(400) / 60)[None, None]
    with torch.no_grad():
        want, plain = model(x), model(x[..., ::2])
        assert relative_error(half(x[..., ::2]), want) < 0.5 * relative_error(plain, want)
    with refused("201 tokens", "length=200"):
        half(torch.zeros(1, 1, 201))


def test_glu_and_heads_reach_the_mixer() -> None:
    model = LanguageModel(layers="C", **(LM | {"sgconv": {"glu": True, "heads": 2, "scale_dim": 4}}))
    mixer: Any = model.layers[0]
    assert mixer.mixer.project.weight.shape == (32, 32)  # heads and channels to values and gates
    assert mixer.mixer.sgconv.heads == 2


def test_attention_is_softmax_of_turned_products() -> None:
    attention, x = Attention(8, 2, causal=True), torch.randn(1, 5, 8)
    query, key, value = attention.qkv(x)[0].unflatten(-1, (3, 2, 4)).unbind(1)  # each (L, heads, d)
    want = torch.zeros(5, 2, 4)
    for h in range(2):
        for t in range(5):
            scores = []
            for s in range(t + 1):
                q, k = (torch.complex(v[:2], v[2:]) for v in (query[t, h], key[s, h]))
                turn = torch.polar(torch.ones(2), (t - s) * torch.tensor([1.0, 0.01]))
                scores.append(float((q * turn * k.conj()).real.sum().detach()) / 2)
            want[t, h] = torch.tensor(scores).softmax(0) @ value[: t + 1, h]
    assert relative_error(attention(x)[0], attention.project(want.flatten(1))) <= 1e-5


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SequenceClassifier(layers="CX", **CLASSIFIER), ("layers='CX'", "A, C, L")),
        (lambda: SequenceClassifier(layers=" ", **CLASSIFIER), ("layers=' '",)),
        (lambda: SequenceClassifier(vocabulary=3, in_chans=2), ("vocabulary=3", "in_chans=2")),
        (lambda: SequenceClassifier(vocabulary=0), ("vocabulary=0", "in_chans=0")),
        (lambda: Attention(8, 3), ("8 channels", "3 heads")),
        (lambda: LocalConvolution(8, kernel_size=4), ("kernel_size=4", "odd")),
        (lambda: SGConvMixer(8, 10, dropout=1.0), ("dropout=1.0", "below 1")),
        (lambda: timm.create_model("sequence_lm", pretrained=True), ("sequence_lm", "no pretrained weights")),
        (lambda: SequenceClassifier(**CLASSIFIER)(torch.zeros(2, 40)), ("torch.float32", "(B, L)")),
        (lambda: SequenceClassifier(**CLASSIFIER)(torch.ones(2, 41, dtype=torch.long)), ("41", "length=40")),
        (lambda: SequenceClassifier(in_chans=2)(torch.zeros(2, 3, 9)), ("(2, 3, 9)", "(B, 2, L)")),
        (lambda: LanguageModel(**LM)(torch.zeros(2, 4, 1)), ("(2, 4, 1)", "(B, L)")),
        (lambda: LanguageModel(**LM).step(torch.ones(2, 1, dtype=torch.long)), ("(2, 1)", "(B)")),
        (lambda: LanguageModel(**LM).generate(torch.ones(1, 50, dtype=torch.long), 11), ("50 + 11", "60")),
        (
            lambda: LanguageModel(**LM).generate(torch.ones(1, 5, dtype=torch.long), 1, temperature=-1),
            ("temperature",),
        ),
        (lambda: LanguageModel(layers="L", **LM).step(torch.ones(1, dtype=torch.long)), ("letters A and C",)),
        (lambda: LanguageModel(**(LM | {"sgconv": {"bidirectional": True}})), ("'bidirectional'", "leave it out")),
        (lambda: LanguageModel(0), ("num_classes=0", "vocabulary")),
        (lambda: LanguageModel(drop_path_rate=1.5), ("drop_path_rate=1.5",)),
        (lambda: LanguageModel(length=0), ("length=0",)),
        (lambda: LanguageModel(**LM)(torch.ones(2, 4, dtype=torch.bool)), ("torch.bool", "int64")),
        (lambda: LanguageModel(**LM)(torch.ones(2, 0, dtype=torch.long)), ("(2, 0)",)),
        (lambda: LanguageModel(**LM).generate(torch.ones(1, 5, dtype=torch.long), 1), ("eval()",)),
        (lambda: LanguageModel(**LM).generate(torch.ones(1, 5, dtype=torch.long), -1), ("-1 tokens",)),
        (lambda: Attention(8, 2).step(torch.zeros(1, 8)), ("causal=True",)),
    ],
)
def test_what_cannot_be_is_refused(build: Any, words: tuple[str, ...]) -> None:
    with refused(*words):
        build()


def test_more_tokens_than_the_length_are_refused_in_generation() -> None:
    model = LanguageModel(layers="A", **LM)
    _, states = model.prefill(torch.ones(1, 60, dtype=torch.long))
    with refused("60", "length=60"):
        model.step(torch.ones(1, dtype=torch.long), states)


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["sequence_classifier", "sequence_lm"])
def test_network_is_compiled_and_exported(name: str) -> None:
    options = CLASSIFIER if name == "sequence_classifier" else LM
    model = lively(timm.create_model(name, **options, layers="CAL"))
    tokens = torch.randint(1, 9, (2, 40))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = list(model.parameters())
    found, want = (torch.autograd.grad(run(tokens).square().sum(), parameters) for run in (compiled, model))
    assert relative_error(*(torch.cat([each.flatten() for each in gradients]) for gradients in (found, want))) <= 1e-5
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({0: batch},))
    assert relative_error(program.module()(tokens[:1]), model(tokens[:1])) <= 1e-6
