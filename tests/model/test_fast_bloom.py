"""The fast Bloom gives the loss and the gradients of Hugging Face's, in whatever form the rows come."""

import copy
import gc
import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from firefly_lightning import FireflyError, FireflyModule
from firefly_lightning.data.batches import collate
from firefly_lightning.data.tokenized_rows import TokenizedRow
from firefly_lightning.model import attention, loss
from firefly_lightning.model.attention import AlibiBias, alibi_slopes
from firefly_lightning.model.fast_bloom import FastBloom, takes_fast_pass
from tests.support.helpers import FORKS, anonymous_memory, give_memory_back
from tests.support.reference import backward, labelled


@pytest.fixture(scope="module")
def stock(model_folder) -> BloomForCausalLM:
    """Two blocks, six heads of eight: no power of two."""
    return BloomForCausalLM.from_pretrained(model_folder).float().train()


@pytest.fixture(scope="module")
def batches(model_folder, rows_file) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Real rows as ids and labels."""
    rows = labelled(model_folder, rows_file)
    long = [token for ids, _ in rows for token in ids][:512]
    only_last = [-100] * 511
    return {
        "right-padded": rows[:7],
        "of one length": [rows[3]] * 3,
        "a single row": rows[4:5],
        "512 tokens": [(long, only_last[:300] + long[300:])],
        "one target": [(long, [*only_last, long[-1]])],
        "one target beside others": [(rows[5][0], [-100] * (len(rows[5][0]) - 1) + rows[5][0][-1:]), *rows[6:8]],
    }


def as_batch(rows):
    return collate([TokenizedRow(np.array(ids, np.int32), np.array(labels) != -100) for ids, labels in rows], pad_id=3)


def trained(model: BloomForCausalLM, batch, dtype: torch.dtype, **options) -> tuple[float, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = FastBloom(model, **options).target_loss(batch) / len(batch["target_ids"])
    value.backward()
    return float(value), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rows", ["right-padded", "of one length", "a single row", "512 tokens", "one target",
                                  "one target beside others"])  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_stock_bloom(rows, dtype, tolerance, stock, batches, monkeypatch):
    """Row by row with stock logits, in float32; recomputed or kept, with and without the fused loss, in many chunks."""
    expected = copy.deepcopy(stock)
    value = backward(expected, batches[rows])
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    batch = as_batch(batches[rows])
    monkeypatch.setattr(loss, "SUMMED_ROWS", 100)  # a few of the vocabulary at a time, and a rest
    for recompute, whole, chunk in product((False, True), (False, True), (1000, 5)):
        monkeypatch.setattr(loss, "chunk_size", lambda *_, size=chunk: size)
        model = copy.deepcopy(stock)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found, found_grads = trained(model, batch, dtype, whole_weights=whole)
        assert found == pytest.approx(value, rel=tolerance)
        for name, grad in grads.items():
            apart = float((found_grads[name].float() - grad).norm() / grad.norm())
            assert apart <= tolerance * (3 if dtype == torch.bfloat16 else 1), (name, apart)


def test_recomputing_keeps_nothing_of_a_block_but_its_input(stock, batches):
    """In no release of transformers: each recomputes at another place, and the losses are the same without.

    What Python holds counts too: hooks could hold what autograd does not.
    """
    hidden, shapes = stock.config.hidden_size, {}
    for recompute in (False, True):
        model = copy.deepcopy(stock)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, to=kept: to.append(tensor) or tensor, lambda t: t):
            value = FastBloom(model).target_loss(as_batch(batches["right-padded"]))
        gc.collect()
        kept += [found for found in gc.get_objects() if type(found) is torch.Tensor]
        shapes[recompute] = {tuple(tensor.shape) for tensor in kept if tensor.dim() == 2}
        value.backward()
    tokens = sum(len(ids) for ids, _ in batches["right-padded"])
    assert (tokens, 4 * hidden) in shapes[False]
    assert (tokens, 4 * hidden) not in shapes[True]
    assert (tokens, hidden) in shapes[True]


def test_a_head_of_its_own(stock, batches):
    config = copy.deepcopy(stock.config)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = BloomForCausalLM(config)
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight
    expected = copy.deepcopy(model)
    value = backward(expected, batches["right-padded"])
    found, grads = trained(model, as_batch(batches["right-padded"]), torch.float32)
    assert found == pytest.approx(value, rel=1e-5)
    for name, parameter in expected.named_parameters():
        assert float((grads[name] - parameter.grad).norm() / parameter.grad.norm()) <= 1e-5, name


def test_the_residual_behind_the_norm(stock, batches):
    config = copy.deepcopy(stock.config)
    config.apply_residual_connection_post_layernorm = True
    model = BloomForCausalLM(config)
    model.load_state_dict(stock.state_dict())
    value = backward(copy.deepcopy(model), batches["right-padded"])
    assert trained(model, as_batch(batches["right-padded"]), torch.float32)[0] == pytest.approx(value, rel=1e-5)


def test_rows_without_a_target_give_no_loss_and_no_gradient(stock):
    model = copy.deepcopy(stock)
    value = FastBloom(model).target_loss(collate([], pad_id=3))
    value.backward()
    assert float(value) == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 25, 32])
def test_slopes_are_those_of_hugging_face(heads):
    """Its tensor holds a slope times a position, and position 1 has the slope itself."""
    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(alibi_slopes(heads), expected, rtol=1e-6)


def test_the_bias_of_a_shorter_row_is_a_part_of_that_of_a_longer_one():
    bias = AlibiBias(6, slice(2, 4))
    short = bias(5, torch.zeros(1)).clone()
    assert torch.equal(bias(9, torch.zeros(1))[..., :5, :5], short)
    assert torch.equal(short, AlibiBias(6)(5, torch.zeros(1))[:, 2:4])
    assert torch.isinf(short[0, 0]).tolist() == [[column > row for column in range(5)] for row in range(5)]


@pytest.mark.parametrize("length", [1, 8, 9, 511])
def test_a_gpu_need_not_copy_a_bias(length):
    """Its kernels take one whose strides are multiples of eight (``preprocess_mask`` in ATen's attention.cpp)."""
    bias = AlibiBias(6)(length, torch.zeros(1, dtype=torch.bfloat16))
    assert bias.shape[-2:] == (length, length)
    assert bias.stride()[-1] == 1
    assert not any(stride % 8 for stride in bias.stride()[:-1])


def test_the_way_of_gpus_is_the_same_on_a_processor(stock, batches, monkeypatch):
    batch = as_batch(batches["right-padded"])
    value, grads = trained(copy.deepcopy(stock), batch, torch.float32)

    def padded(split, lengths, bias, scores, kept):
        rows = attention.PackedRows(lengths, batch["token_positions"], batch["packed_targets"])
        return attention._attend_padded(split, rows, bias, scores)

    def join(contexts, dtype):
        return attention._join_padded(contexts, batch["token_positions"]).to(dtype)

    monkeypatch.setattr(attention, "_attend_row_by_row", padded)
    monkeypatch.setattr(attention, "_join_rows", join)
    found, found_grads = trained(copy.deepcopy(stock), batch, torch.float32)
    assert found == pytest.approx(value, rel=1e-6)
    assert all(torch.allclose(found_grads[name], grad, atol=1e-6) for name, grad in grads.items())


def test_stock_calls_still_work(stock):
    """Generation, and whatever else calls the model as Hugging Face does."""
    model = copy.deepcopy(stock).eval()
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
        FastBloom(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert torch.equal(model(ids, output_attentions=True).logits, expected)
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_a_cache_gives_the_scores_of_stock_bloom(stock, batches, dtype):
    """Greedy, padded on the left, so that every token's scores depend on those before."""
    prompts = [ids[: 4 + 3 * index] for index, (ids, _) in enumerate(batches["right-padded"])]
    width = max(map(len, prompts))
    ids = torch.tensor([[3] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    model = copy.deepcopy(stock).eval().to(dtype)
    expected = model.generate(ids, attention_mask=mask, **options)
    FastBloom(model)
    kernel, calls = F.scaled_dot_product_attention, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
        found = model.generate(ids, attention_mask=mask, **options)
    assert len(calls) == 12 * 2, "once for each token in both blocks"
    if dtype == torch.float32:
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)
    else:  # a token that is as likely as another may differ, and all after it
        assert torch.allclose(found.logits[0], expected.logits[0], atol=2e-2)


def test_dropout_is_applied(stock, batches):
    config = copy.deepcopy(stock.config)
    config.hidden_dropout = config.attention_dropout = 0.2
    model = BloomForCausalLM(config)
    model.load_state_dict(stock.state_dict())
    run, batch = FastBloom(model.train()), as_batch(batches["right-padded"])
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(float(run.target_loss(batch)))
    assert values[0] == values[1] != values[2]
    model.eval()
    expected = backward(copy.deepcopy(stock), batches["right-padded"]) * len(batch["target_ids"])
    assert float(run.target_loss(batch)) == pytest.approx(expected, rel=1e-5)


def test_little_memory_whatever_the_vocabulary():
    """A chunk of logits at a time: 4,000 targets of 50,000 tokens would be 800 MB of logits, and thrice that."""
    with FORKS.Pool(1) as pool:  # what other tests have left in this process would count
        taken, weight = pool.apply(memory_of_loss)
    most = 2.1 * (84 * 50_000 * 4) + 2 * (84 * 50_000 * 4) + 3 * weight
    assert taken <= most, "logits of 84 targets and their logarithms, and gradients of the logits of 168"


def memory_of_loss() -> tuple[int, int]:
    """Bytes that loss and gradients take where logits have just become scores, and bytes of the head."""
    hidden, weight = torch.randn(4000, 16, requires_grad=True), torch.randn(50_000, 16, requires_grad=True)
    ids = torch.arange(4000)
    give_memory_back()
    before, most = anonymous_memory(), 0
    log_softmax = loss.F.log_softmax

    def measured(*args, **kwargs):
        nonlocal most
        result = log_softmax(*args, **kwargs)
        most = max(most, anonymous_memory() - before)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.F, "log_softmax", measured)
        loss.fused_target_cross_entropy(hidden, weight, ids).backward()
    return most, weight.nbytes


class Recorded(TorchDispatchMode):
    """Names of the operations that compute something, all of which must run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {
            value.device.type for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)
        }
        assert devices <= {"meta"}, (func, devices)
        if not func.is_view:
            self.names.append(str(func))
        return result


def test_a_step_runs_where_there_are_no_values(model_folder, batches):
    """On the meta device nothing can wait for a value or be tied to a processor; what runs is the same for any rows."""
    module = FireflyModule(str(model_folder))
    module.configure_model()
    module.to("meta")
    module.model.tie_weights()  # a move to the meta device makes new parameters
    recorded = []
    for rows in (batches["right-padded"], batches["right-padded"][:2], batches["one target beside others"]):
        batch = as_batch(rows) | {"step_micro_batches": 1, "step_target_tokens": 9}
        batch = module.transfer_batch_to_device(batch, torch.device("meta"), 0)
        module.training_step(batch, 0).backward()  # what is kept for all rows, such as the bias of ALiBi, is made once
        with Recorded() as operations:
            module.training_step(batch, 0).backward()
        recorded.append(operations.names)
    assert recorded[0] == recorded[1] == recorded[2]
    assert len(recorded[0]) > 50
    assert not [name for name in recorded[0] if "nonzero" in name or "_local_scalar_dense" in name]


def outputs_of(model: BloomForCausalLM, watch, ids: torch.Tensor) -> list:
    """What a forward hook sees while two tokens are generated with a cache, in eager's own form."""
    seen: list = []
    handles = watch(model, lambda module, given, output: seen.append(output))
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2)
    for handle in handles:
        handle.remove()
    return seen


def on_attention(model: BloomForCausalLM, hook) -> list:
    return [block.self_attention.register_forward_hook(hook) for block in model.transformer.h]


WATCHED = {
    "attention": on_attention,
    "blocks": lambda model, hook: [block.register_forward_hook(hook) for block in model.transformer.h],
    "everything": lambda model, hook: [torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, output: hook(module, given, output) if type(module).__name__ == "BloomAttention" else None
    )],
}  # fmt: skip


@pytest.mark.parametrize("where", WATCHED)
def test_a_hook_sees_in_generation_what_stock_bloom_gives(stock, where):
    """The second output of attention: its weights in transformers 5, the cache in 4."""
    model, ids = copy.deepcopy(stock).eval(), torch.arange(4, 24).view(2, 10)
    expected = outputs_of(model, WATCHED[where], ids)
    FastBloom(model)
    found = outputs_of(model, WATCHED[where], ids)
    assert len(found) == len(expected) == 2 * 2
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        for value, wanted in zip(one, other, strict=True):
            assert type(value) is type(wanted)
            if isinstance(wanted, torch.Tensor):
                assert value.shape == wanted.shape
                assert torch.allclose(value, wanted, atol=1e-6)


def test_an_engines_hooks_leave_generation_fast(stock):
    model, ids, calls = copy.deepcopy(stock).eval(), torch.arange(4, 24).view(2, 10), []
    FastBloom(model)

    def hook(module, given, output):
        calls.append(output[1])

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    outputs_of(model, lambda model, seen: on_attention(model, hook), ids)
    assert len(calls) == 4
    assert not any(isinstance(second, torch.Tensor) for second in calls), "no weights were computed"


@pytest.fixture(scope="module")
def in_parts(model_folder, tmp_path_factory):
    """The model's folder, asking for sums in parts, as two processes of pretraining made them."""
    folder = tmp_path_factory.mktemp("in-parts") / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"slow_but_exact": True, "pretraining_tp": 2}))
    return folder


def test_sums_in_parts_are_those_of_stock_bloom(in_parts, batches):
    """They leave out biases, so that the fast pass would give another loss."""
    batch = as_batch(batches["right-padded"])
    module = FireflyModule(str(in_parts))
    module.configure_model()
    found = module._pass.target_loss(batch) / len(batch["target_ids"])
    found.backward()
    expected = BloomForCausalLM.from_pretrained(in_parts).float()
    value = backward(expected, batches["right-padded"])
    assert float(found) == pytest.approx(value, rel=1e-5)
    for (name, parameter), other in zip(module.model.named_parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(parameter.grad, other.grad, atol=1e-5), name
    wrong = FastBloom(copy.deepcopy(expected)).target_loss(batch) / len(batch["target_ids"])
    assert abs(float(wrong) / value - 1) > 1e-5


def test_sums_in_parts_are_no_fast_pass(in_parts):
    module = FireflyModule(str(in_parts), attention="sdpa")
    with pytest.raises(FireflyError, match="slow_but_exact with pretraining_tp 2 is computed by Hugging Face's own"):
        module.configure_model()
    config = BloomConfig(slow_but_exact=True, pretraining_tp=1)
    assert takes_fast_pass("auto", config)
    assert takes_fast_pass("sdpa", config)
    assert not takes_fast_pass("eager", config)
