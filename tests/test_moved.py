"""Names that modules had before they lay in packages go on working, and say what to write now."""

import inspect
import pickle
import subprocess
import sys
from importlib import import_module

import pytest
import yaml

from firefly_lightning.moved import MOVED
from tests.support.helpers import fit

# As `git show` has the modules of the last commit before the move.
NAMES = {
    "bloom": "AlibiBias FastBloom Keeping PackedRows alibi_slopes",
    "callbacks": "BestCheckpoint EndOnSignals LastCheckpoint PredictionWriter",
    "chat": "chat",
    "checkpoint": "MANIFEST TRAINER_FILE WRITER_KEY find_checkpoint load_file whole_file whole_folder",
    "checkpoint_io": "AtomicCheckpointIO",
    "cli": "FireflyCLI main",
    "configuration": "CONFIGURATION_KEY differences read_configuration",
    "data.batches": "EpochSampler MicroBatch PlanLoader PlannedBatches closing_targets collate data_parallel_share",
    "data.build": "BadRows ChunkBuilder build",
    "data.clean": "Findings clean",
    "data.columns": "Columns read_assignments",
    "data.datamodule": "FireflyDataModule Source",
    "data.duplicates": "Duplicate jaccard normalise shingles",
    "data.figures": "draw_lengths draw_tasks find_font",
    "data.json_arrays": "read_json_array",
    "data.mixing": "Share mix repeated_rows",
    "data.parallel": "end_with_parent map_in_order usable_cores",
    "data.plan": "Rows StepPlan WeightedRows apportion permutation",
    "data.prompt": "PRESETS PromptEncoder PromptFormat SPECIAL_TOKENS Turn check_special_tokens prompt_format",
    "data.records": "FILE_SUFFIXES find_sources is_file load_hub_dataset read_records",
    "data.resumable": "ResumableFile code_digest",
    "data.row_arrays": "RowArrays TooLong cut_rows join_rows",
    "data.row_checks": "kind_of texts_of what_is_wrong",
    "preparation.duplicates": "Duplicate jaccard normalise shingles",
    "preparation.row_checks": "kind_of texts_of what_is_wrong",
    "data.rows": "Row RowFormat TURN_SEPARATOR read_rows",
    "data.stats": "describe stats",
    "data.tables": "HEADINGS counts_table render",
    "data.template_files": "TEMPLATE_FOLDER load_templates",
    "data.template_views": "Listing Template ValueMap plain_text",
    "data.templates": "TemplateGroup Templates UnusableRowError",
    "data.tokenized": "COUNTED Counts TokenizedRow TokenizedRows WHOLE default_cache_dir tokenize",
    "direct_io": "FileRange read_rows write_file",
    "errors": "FireflyError describe_os_error one_line_errors",
    "export": "export",
    "folders": "check_new_folder new_file new_folder",
    "generation": "Decoding answer_prompts change_decoding default_decoding generate_stream",
    "huggingface": "describe load_bloom load_prompt_format load_tokenizer random_bloom write_description",
    "loss": "TargetScores fused_target_cross_entropy target_cross_entropy target_scores",
    "metrics": "TargetMetrics",
    "module": "FireflyModule",
    "parsing": "OneLineErrors explain known_keys",
    "planning.activations": "activations working_set",
    "planning.command": "plan",
    "planning.comparing": "compare",
    "planning.configuration": "TrainingRows devices_of model_size read_fit strategy_of training_rows",
    "planning.measuring": "MemoryMeter measure_run",
    "planning.memory": "Estimate Parts estimate",
    "planning.report": "Planned draw grid_table parts_table report",
    "planning.runs": "Load ModelSize Run STRATEGIES check",
    "planning.settings": "Settings describe read_settings",
    "portable": "FileEntry MODEL_PREFIX PortableReader PortableWriter States WEIGHT finish",
    "portable_whole": "accept_names can_be_portable read_whole write_whole",
    "predictions": "Prediction PredictionFile predict",
    "progress": "fit_loop_state",
    "progress_bar": "RunProgressBar",
    "pruning": "prune",
    "pruning_tokenizer": "count_tokens load_bpe_tokenizer read_texts select_tokens write_pruned_tokenizer",
    "pruning_verify": "Verification verify_pruning",
    "pruning_weights": "Checkpoint StoredTensor count_parameters open_checkpoint",
    "pruning_writer": "CheckpointWriter",
    "reading": "corrections entities final_answer label",
    "report": "Report training_results",
    "run_figures": "Metrics draw_kinds draw_losses kind_perplexities read_metrics",
    "samples": "PROMPTS Samples prompt_batch",
    "schedule": "cosine_with_warmup",
    "scores": "AnswerScores CorpusScore RowMean Scores SetScore metrics_of",
    "settings": "OptimizerSettings",
    "signals": "Signals",
    "strategies": "FSDP2Strategy GeminiStrategy NativeTensorParallelStrategy TensorParallelStrategy ZeroStrategy",
    "strategies.agreement": "agreed",
    "strategies.booster": "BoosterStrategy",
    "strategies.booster_checkpoints": "BoosterCheckpoints read_weights",
    "strategies.colossalai": "GeminiStrategy TensorParallelStrategy",
    "strategies.colossalai_fixes": "FixedGeminiPlugin FixedHybridPlugin",
    "strategies.colossalai_portable": "read_gemini read_hybrid write_gemini write_hybrid",
    "strategies.deepspeed": "ZeroStrategy",
    "strategies.deepspeed_checkpoints": "read_weights",
    "strategies.deepspeed_config": "read_config settle",
    "strategies.deepspeed_init": "sharded_hugging_face",
    "strategies.deepspeed_machine": "cpu_adam require_deepspeed",
    "strategies.deepspeed_portable": "read_states write_states",
    "strategies.dtensors": "join norm part_like whole",
    "strategies.engine_precision": "EnginePrecision",
    "strategies.hooks": "StrategyHooks check_accumulation hooks_of",
    "strategies.native": "FSDP2Strategy NativeStrategy NativeTensorParallelStrategy",
    "strategies.native_checkpoints": "NativeCheckpoints read_weights",
    "strategies.native_model": "fill fully_shard split_tensors tie",
    "strategies.padded_vocabulary": "hide pad strip",
    "strategies.shards": "ShardedCheckpoints",
    "strategies.simulated_device": "NoActivations SimulatedAccelerator install",
    "throughput": "Throughput measure_peak training_flops",
    "tools": "COMMANDS main",
    "web": "Slider examples make_app serve sliders",
}


def test_every_module_that_moved_is_tried():
    assert NAMES.keys() >= MOVED.keys()


@pytest.mark.parametrize("old", NAMES)
def test_old_modules_have_what_they_had(old):
    module = import_module(f"firefly_lightning.{old}")
    for name in NAMES[old].split():
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__name__ == name
            assert value.__module__.startswith("firefly_lightning."), name
    with pytest.raises(AttributeError, match=rf"module 'firefly_lightning.{old}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_name_that_moved_says_once_what_to_write_and_where(tmp_path):
    lines = [
        "from firefly_lightning.report import Report",
        "import firefly_lightning.report",
        "firefly_lightning.report.Report; from firefly_lightning.callbacks import PredictionWriter",
    ]
    # Elsewhere, since Lightning writes warnings of files in a folder that is called like it in a way of its own.
    how = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    result = subprocess.run([sys.executable, "-"], input="\n".join(lines), **how)
    told = [line for line in result.stderr.splitlines() if "FutureWarning" in line]
    assert told == [
        "<stdin>:1: FutureWarning: firefly_lightning.report.Report has moved: "
        "write firefly_lightning.callbacks.run_report.Report"
    ]


def test_modules_that_never_were_are_not_found():
    for name in ("firefly_lightning.nothing", "bloom", "other.bloom"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_objects_that_were_saved_by_an_old_name_are_loaded():
    from firefly_lightning import PromptFormat

    assert pickle.loads(b"cfirefly_lightning.data.prompt\nPromptFormat\n.") is PromptFormat


def test_old_configurations_are_read(model_folder, rows_file, tmp_path):
    callbacks = ["firefly_lightning.report.Report", "firefly_lightning.callbacks.PredictionWriter"]
    saved = {
        "model": {"class_path": "firefly_lightning.module.FireflyModule"},
        "data": {"class_path": "firefly_lightning.data.datamodule.FireflyDataModule"},
        "trainer": {"callbacks": [{"class_path": path} for path in callbacks], "max_steps": 1},
    }
    file = tmp_path / "saved.yaml"
    file.write_text(yaml.safe_dump(saved), "utf-8")
    fit(model_folder, rows_file, tmp_path, "--config", file)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert (folder / "report.md").is_file()
    trainer = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))["trainer"]
    assert [callback["class_path"] for callback in trainer["callbacks"]] == callbacks


def test_a_folder_that_is_left_of_an_old_version_hides_nothing(tmp_path):
    (tmp_path / "templates").mkdir()
    code = """if True:
        import sys
        import firefly_lightning.data
        firefly_lightning.data.__path__.append(sys.argv[1])
        from firefly_lightning.data.templates import Templates
        print(Templates.__module__)
    """
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "firefly_lightning.preparation.templates.fill"
