"""Rows that are answered together get the answers of Hugging Face's generation, and nothing is computed in vain."""

import random

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig

from firefly_lightning.evaluation.rows_in_flight import Row, RowsInFlight
from firefly_lightning.evaluation.token_choice import TokenChoice
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.key_value_cache import KeyValueCache

EOS, PAD, WORDS = 2, 3, 60
LONG = 1100
"""Tokens of a prompt that is computed in several pieces, in places that have to grow."""

CHOICES = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.7},
    "not too short": {"min_new_tokens": 9, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module", params=[8, 6], ids=["8 heads", "6 heads"])
def model(request):
    """Random, with logits so far apart that rounding decides nothing, and answers of many lengths."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 48, "n_layer": 3, "n_head": request.param, "bos_token_id": 1}
    config = BloomConfig(**sizes, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False)
    model = BloomForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
        model.lm_head.weight[EOS] *= 2.5
    return model


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    lengths = [1, LONG, 2, 700, *(draw.randrange(1, 40) for _ in range(20))]
    return [[draw.randrange(4, WORDS) for _ in range(length)] for length in lengths]


def config(**settings):
    return GenerationConfig(
        **{"max_new_tokens": 30, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD, **settings}
    )


def stock(model, prompts, settings):
    """Answers of Hugging Face's own generation, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answer = output[0, len(prompt) :].tolist()
        found.append(answer[: answer.index(EOS)] if EOS in answer else answer)
    return found


def answered(model, prompts, settings, places, seeds=None):
    in_flight = RowsInFlight(FastBloom(model), TokenChoice.of(settings), EOS, places)
    rows = [Row(prompt, seed=seed) for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True)]
    in_flight.add(rows[:5])
    early = list(in_flight.answered(rest=False))
    in_flight.add(rows[5:])
    done = [*early, *in_flight.answered(rest=True)]
    assert len(done) == len(rows)
    assert {id(row) for row in done} == {id(row) for row in rows}
    return [row.answer for row in rows]


@pytest.mark.parametrize("choice", CHOICES)
def test_greedy_answers_are_those_of_stock_generation(model, prompts, choice):
    expected = stock(model, prompts, config(**CHOICES[choice]))
    assert len({len(answer) for answer in expected}) > 4
    for places in (1, 4, len(prompts)):
        assert answered(model, prompts, config(**CHOICES[choice]), places) == expected


def test_nothing_is_computed_for_rows_that_are_done(model, prompts, monkeypatch):
    computed, step = [], KeyValueCache.step

    def counted(self, ids, positions):
        computed.append(len(ids))
        return step(self, ids, positions)

    monkeypatch.setattr(KeyValueCache, "step", counted)
    answers = answered(model, prompts, config(), places=4)
    # The first token follows from the prompt; one that ends the answer is the last to be computed.
    assert sum(computed) == sum(min(len(answer), 29) for answer in answers)
    assert max(computed) == 4


def test_a_sampled_answer_depends_on_its_seed_alone(model, prompts):
    settings = config(do_sample=True, temperature=4.0, top_p=0.9, repetition_penalty=1.2)
    seeds = list(range(len(prompts)))
    alone, together = (answered(model, prompts, settings, places, seeds) for places in (1, 7))
    assert alone == together
    other = answered(model, prompts, settings, 7, [seed + 100 for seed in seeds])
    assert sum(one != two for one, two in zip(alone, other, strict=True)) > len(prompts) / 2


SAMPLING = [
    {},
    {"temperature": 3.0, "top_k": 0},
    {"temperature": 0.5, "top_k": 7},
    {"top_p": 0.6, "top_k": 0},
    {"top_p": 0.35, "top_k": 5, "temperature": 2.0},
    {"top_p": 0.85, "temperature": 1.7, "repetition_penalty": 1.4},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("words", [WORDS, 3000], ids=["few tokens", "more than are looked at first"])
@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_tokens_are_drawn_with_the_probabilities_of_stock_generation(settings, words):
    """Draws in equal steps from 0 up to 1 take each token as often as its probability says."""
    torch.manual_seed(1)
    small = BloomForCausalLM(BloomConfig(vocab_size=words, hidden_size=16, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        small.transformer.word_embeddings.weight.mul_(20)
    sampling = GenerationConfig(max_new_tokens=1, do_sample=True, pad_token_id=PAD, **settings)
    ids = torch.tensor([[5, 9, 9, 11]])
    stock = small.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=sampling, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = stock.scores[0][0].softmax(-1)
    count = 20_000
    with torch.inference_mode():
        logits = small(ids).logits[0, -1:].expand(count, -1)
    choice = TokenChoice.of(sampling)
    chosen = choice.choose(logits, ids.expand(count, -1), (torch.arange(count) + 0.5) / count)
    shares = torch.bincount(chosen, minlength=words) / count
    assert torch.allclose(shares, expected, rtol=0, atol=2 / count)
    assert torch.equal(shares > 0, expected > 1 / count) or (expected[shares > 0] > 0).all()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_outermost_draws_take_tokens_that_are_likely_enough(draw):
    choice = TokenChoice(max_new_tokens=1, do_sample=True, top_k=0, top_p=0.5)
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 2.9, 1.0]])
    assert int(choice.choose(logits, torch.zeros(1, 1, dtype=torch.long), torch.tensor([draw]))) in (1, 3)


@pytest.mark.parametrize(
    "others",
    [
        {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[7]]}, {"typical_p": 0.5}, {"min_p": 0.1},
        {"penalty_alpha": 0.6, "top_k": 4}, {"suppress_tokens": [5]}, {"max_new_tokens": None, "max_length": 20},
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_are_left_to_stock_generation(others):
    assert TokenChoice.of(config(**others)) is None
    without = {"num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "use_cache": True}
    assert TokenChoice.of(config(**without, do_sample=True, top_p=0.85, temperature=0.35)) is not None
