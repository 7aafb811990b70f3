"""Exported files in real llama.cpp: the same tokens, the same greedy answers, nearly the same loss in fewer bits."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from firefly_lightning.export import export
from tests.conftest import ANSWERS, SPECIAL
from tests.gguf.test_words import BLOOM
from tests.support.choice import DIVIDED
from tests.support.helpers import one_line, run
from tests.support.llama import llama
from tests.support.pruning_fixtures import idioms, large_bloom, reviews

ODD = [
    "全角　空格，和\u00a0别的\u2003空白\r\n\r\n\t再来",
    "The quick brown fox doesn't JUMP; it's 12,345.67 metres away: WE'LL see",
    "🦄👩‍👩‍👧 e\u0301 é हिन्दी العربية ภาษาไทย",
    "<s>ordinary</s> text <pad>",
    " " * 50 + "x" + "\n" * 20,
    "（括号）(brackets)|[a|b]…。、",
    "毛泽东",
    "\x00\x01\x7f\ufffd",
]
"""Texts that rules are likely to cut differently."""


def of_rules(folder, rules):
    """A folder with a random model and a tokenizer with given rules, trained on real text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = rules, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(reviews()[:1000], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 2008, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 3}
    BloomForCausalLM(BloomConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with Bloom's own rules (heads that are no embeddings, rows to spare), and pruned with the demo's."""
    base = tmp_path_factory.mktemp("models")
    cut = pre_tokenizers.Split(Regex(BLOOM), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (base / "corpus.txt").write_text("\n".join(reviews()[:2000]), "utf-8")
    large = large_bloom(tmp_path_factory.getbasetemp())
    run("firefly", "prune", "--model", large, "--corpus", base / "corpus.txt", "--out", base / "pruned")
    bloom = of_rules(base / "bloom", pre_tokenizers.Sequence([cut, bytes_only]))
    return {"bloom": livened(bloom), "qwen35": livened(base / "pruned")}


def livened(folder):
    """The folder with larger weights: those that a Bloom begins with answer the same to everything."""
    torch.manual_seed(1)
    model = BloomForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rules", ["bloom", "qwen35"])
def test_texts_have_the_same_tokens(rules, folders, tmp_path):
    texts = [*reviews()[:3000], *(row["derivation"] for row in idioms()[:2000]), *ODD]
    (tmp_path / "texts.txt").write_text("\n".join(texts[:5000]), "utf-8")
    file = tmp_path / "model.gguf"
    told = run(
        "firefly", "export", "--checkpoint", folders[rules], "--gguf", file, "--verify", tmp_path / "texts.txt"
    ).stdout
    assert f"cut as {rules}; " in told
    assert "texts have the same" in told
    tokenizer = AutoTokenizer.from_pretrained(folders[rules]).backend_tokenizer
    tokenizer.encode_special_tokens = True
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    with llama(file) as ask:
        found = ask("tokenize", texts=texts, special=False)
    assert len(texts) >= 5000
    apart = [text for text, one, other in zip(texts, expected, found, strict=True) if one != other]
    assert not apart, f"{len(apart)} texts, such as {apart[0]!r}"


def greedy(model, prompt: list[int], most: int) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": most, "eos_token_id": 2, "pad_token_id": 3}
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **settings)
    return [token for token in answer[0, len(prompt) :].tolist() if token != 2]


@pytest.mark.parametrize("rules", ["bloom"] if DIVIDED else ["bloom", "qwen35"])
def test_greedy_answers_are_those_of_transformers(rules, folders, tmp_path):
    export(str(folders[rules]), gguf=str(tmp_path / "model.gguf"), gguf_type="f32")
    model = BloomForCausalLM.from_pretrained(folders[rules]).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[rules])
    prompts = [[1, *tokenizer(text[:60], add_special_tokens=False).input_ids, 2, 2] for text in reviews()[:50]]
    with llama(tmp_path / "model.gguf") as ask:
        answers = ask("answer", prompts=prompts, most=12)
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    apart = [parts for parts in zip(prompts, answers, expected, strict=True) if parts[1] != parts[2]]
    assert len(apart) <= 2
    assert all(undecided(model, *parts) for parts in apart)
    assert len({tuple(answer) for answer in answers}) > 10, "they are not all the same"


def undecided(model, prompt: list[int], answer: list[int], expected: list[int]) -> bool:
    """Whether the two best tokens where answers part are nearer than llama.cpp's GELU, a table of float16, is exact."""
    same = next(at for at, (one, other) in enumerate(zip(answer, expected, strict=False)) if one != other)
    with torch.no_grad():
        best = model(torch.tensor([[*prompt, *expected[:same]]])).logits[0, -1].topk(2)
    return set(best.indices.tolist()) == {answer[same], expected[same]} and float(best.values.diff().abs()) < 5e-3


@pytest.fixture(scope="module")
def rows(fluent_folder):
    """What the fluent model knows by heart, as token ids, and where its answers begin."""
    encode = partial(AutoTokenizer.from_pretrained(fluent_folder).encode, add_special_tokens=False)
    prompts = [[1, *encode(question), 2, 2] for question in ANSWERS]
    answers = [[*encode(answer), 2] for answer in ANSWERS.values()]
    return [[*one, *other] for one, other in zip(prompts, answers, strict=True)], [len(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "most"),
    [("f32", 1e-5), ("q8_0", 0.01), ("q4_0", 0.15)]
    + ([] if DIVIDED else [("f16", 1e-3), ("bf16", 0.01), ("q5_1", 0.1), ("q5_0", 0.1), ("q4_1", 0.15)]),
)
def test_fewer_bits_cost_little(kind, most, fluent_folder, rows, tmp_path):
    export(str(fluent_folder), gguf=str(tmp_path / "model.gguf"), gguf_type=kind)
    model = BloomForCausalLM.from_pretrained(fluent_folder).float().eval()
    total, count = 0.0, 0
    for row, start in zip(*rows, strict=True):
        losses = torch.nn.functional.cross_entropy(
            model(torch.tensor([row])).logits[0, start - 1 : -1], torch.tensor(row[start:]), reduction="sum"
        )
        total, count = total + float(losses.detach()), count + len(row) - start
    with llama(tmp_path / "model.gguf") as ask:
        found, of = ask("loss", rows=rows[0], starts=rows[1])
    assert of == count
    assert abs(found - total) / count < most, "perplexity is the exponential of the mean"


def test_the_file_says_what_the_folder_says(fluent_folder, tmp_path):
    run("firefly", "export", "--checkpoint", fluent_folder, "--gguf", tmp_path / "流萤.gguf")
    with llama(tmp_path / "流萤.gguf") as ask:
        about = ask("about")
        conversation = [{"role": "user", "content": question} for question in ANSWERS]
        tokenizer = AutoTokenizer.from_pretrained(fluent_folder)
        written = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
        (ids,) = ask("tokenize", texts=[written], special=True)
        (answer,) = ask("answer", prompts=[ids], most=30)
    assert ids == tokenizer(written, add_special_tokens=False).input_ids
    assert tokenizer.decode(answer) == next(iter(ANSWERS.values()))
    general, vocabulary = about["metadata"]["general"], about["metadata"]["tokenizer"]["ggml"]
    assert (general["name"], general["license"]) == ("流萤", "bigscience-bloom-rail-1.0")
    assert general["languages"] == ["zh", "en"]
    assert (about["bos"], about["eos"]) == (1, 2)
    assert not vocabulary["add_bos_token"]
    assert vocabulary["token_type"][:4] == [3, 3, 3, 3]
    assert vocabulary["token_type"][320:] == [5] * 8, "rows without tokens"
    assert "generation %}" not in about["template"].replace("add_generation_prompt", "")


def refused(*args) -> str:
    return one_line(run("firefly", "export", *args, check=False))


def test_what_cannot_be_written_is_told_and_leaves_nothing(fluent_folder, model_folder, tmp_path):
    file = tmp_path / "model.gguf"
    given = ["--checkpoint", fluent_folder, "--gguf"]
    assert refused("--checkpoint", fluent_folder).startswith("--out, --gguf: neither is given")
    assert refused(*given, file, "--out", tmp_path / "x").endswith("leave --out out, or copy it")
    assert refused(*given, fluent_folder / "x.gguf").startswith(f"{fluent_folder / 'x.gguf'}: lies in {fluent_folder}")
    assert refused(*given, tmp_path) == f"{tmp_path}: is a folder; name a file"
    assert refused(*given, file, "--adapter").startswith("--adapter, --gguf: a GGUF is of the whole model; export it")
    assert refused(*given, file, "--dtype", "float16").startswith("--dtype: is of the folder")
    assert refused(*given[:2], "--out", tmp_path / "x", "--verify", "x").endswith("leave --out out, or copy it")
    (tmp_path / "empty.txt").write_text("")
    assert "has no text to verify with" in refused(*given, file, "--verify", tmp_path / "empty.txt")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    assert refused(*given, tmp_path / "there.gguf").startswith(f"{tmp_path / 'there.gguf'}: is there already")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "there.gguf"]


def test_weights_that_are_not_finite_are_named(fluent_bloom, fluent_folder, tmp_path):
    folder = shutil.copytree(fluent_folder, tmp_path / "folder")
    broken = copy.deepcopy(fluent_bloom)
    broken.transformer.h[1].mlp.dense_4h_to_h.weight.data[3, 3] = torch.inf
    broken.save_pretrained(folder)
    line = refused("--checkpoint", folder, "--gguf", tmp_path / "model.gguf")
    assert line.startswith(f"{folder}: transformer.h.1.mlp.dense_4h_to_h.weight has numbers that are not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_residual_behind_the_norm_is_refused(fluent_folder, tmp_path):
    folder = copied(fluent_folder, tmp_path / "folder", {"apply_residual_connection_post_layernorm": True})
    line = refused("--checkpoint", folder, "--gguf", tmp_path / "model.gguf")
    assert line == f"{folder}: apply_residual_connection_post_layernorm is not in llama.cpp; no GGUF can be made"


def copied(folder, out, config=(), tokenizer=(), generation=None):
    """A copy of a model's folder with other fields in some of its files."""
    shutil.copytree(folder, out)
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        fields = json.loads((out / name).read_text("utf-8")) | dict(changes)
        (out / name).write_text(json.dumps(fields), "utf-8")
    if generation is not None:
        (out / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return out


def test_answers_end_where_those_of_transformers_do(fluent_folder, tmp_path):
    """Other names, other numbers, and two tokens that end an answer, the settings of generation before all others."""
    spec = json.loads((fluent_folder / "tokenizer.json").read_text("utf-8"))
    text = json.dumps(spec, ensure_ascii=False).replace('"<s>"', '"[开始]"').replace('"</s>"', '"[结束]"')
    named = {"bos_token": "[开始]", "eos_token": "[结束]"}
    renamed = copied(fluent_folder, tmp_path / "renamed", tokenizer=named, generation={})
    (renamed / "tokenizer.json").write_text(text, "utf-8")
    two = copied(fluent_folder, tmp_path / "two", generation={"eos_token_id": [2, 5]})
    other = copied(fluent_folder, tmp_path / "other", config={"eos_token_id": 3, "pad_token_id": 2}, generation={})
    found = {}
    for folder in (renamed, two, other):
        export(str(folder), gguf=str(tmp_path / f"{folder.name}.gguf"))
        with llama(tmp_path / f"{folder.name}.gguf") as ask:
            numbers = ask("about")["metadata"]["tokenizer"]["ggml"]
        found[folder.name] = [numbers.get(f"{name}_token_id") for name in ("bos", "eos", "eot", "padding")]
    assert found == {"renamed": [1, 2, None, 3], "two": [1, 2, 5, 3], "other": [1, 3, None, 2]}


def test_added_tokens_are_found_as_the_model_finds_them(fluent_folder, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(fluent_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(fluent_folder)
    tokenizer.add_tokens([AddedToken("好评", normalized=False), AddedToken("<extra>", normalized=False)])
    tokenizer.save_pretrained(folder)
    texts = ["这条好评吗", "a<extra>b好评", "好 评"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), "utf-8")
    file = tmp_path / "model.gguf"
    export(str(folder), gguf=str(file), verify=str(tmp_path / "texts.txt"))
    with llama(file) as ask:
        found = ask("tokenize", texts=texts, special=False)
    assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def saved(bloom, folder, out, change):
    """A folder with the weights of a model after a change."""
    shutil.copytree(folder, out)
    model = copy.deepcopy(bloom)
    change(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    if model.lm_head.weight is model.transformer.word_embeddings.weight:
        del weights["lm_head.weight"]
    return out, weights


def test_weights_that_no_file_can_have_are_named(fluent_bloom, fluent_folder, tmp_path):
    def large(model):
        model.transformer.h[0].mlp.dense_h_to_4h.weight.data[0, 0] = 1e6

    out, weights = saved(fluent_bloom, fluent_folder, tmp_path / "large", large)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    line = refused("--checkpoint", out, "--gguf", tmp_path / "x.gguf", "--gguf_type", "f16")
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    assert line == f"{out}: {name} has numbers too large for f16; take bf16 or f32"
    del weights[name]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    line = refused("--checkpoint", out, "--gguf", tmp_path / "x.gguf")
    assert line == f"{out}: the weights lack {name}, unlike config.json; fetch both again"
    out, weights = saved(fluent_bloom, fluent_folder, tmp_path / "tied", lambda model: None)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"] + 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    line = refused("--checkpoint", out, "--gguf", tmp_path / "x.gguf")
    assert line.startswith(f"{out}: config.json says tie_word_embeddings is true, but the weights hold another lm_head")
    assert not list(tmp_path.glob("*x.gguf*"))


def test_further_mistakes_are_told(fluent_folder, tmp_path):
    given = ["--checkpoint", fluent_folder, "--gguf", tmp_path / "x.gguf"]
    assert refused(*given, "--verify", tmp_path).startswith(f"{tmp_path}: is a folder; name a file of rows")
    (tmp_path / "x.gguf").symlink_to(tmp_path / "nowhere")
    assert refused(*given).startswith(f"{tmp_path / 'x.gguf'}: is there already")
    (tmp_path / "x.gguf").unlink()
    slow = copied(fluent_folder, tmp_path / "slow", {"slow_but_exact": True, "pretraining_tp": 2})
    assert refused("--checkpoint", slow, *given[2:]).startswith(
        f"{slow}: slow_but_exact with pretraining_tp 2 is not in"
    )
    many = copied(fluent_folder, tmp_path / "many", generation={"eos_token_id": [2, 5, 6]})
    assert refused("--checkpoint", many, *given[2:]).startswith("eos_token_id [2, 5, 6]: llama.cpp ends answers at two")
    assert not (tmp_path / "x.gguf").exists()
