"""Where a resumed run stands, in Lightning's own terms."""

from typing import Any


def set_progress(checkpoint: dict[str, Any], batches: Any) -> None:
    """Puts a checkpoint's loops right after its last step, under the plan of the run that goes on from it.

    Args:
        checkpoint: Lightning's checkpoint; one without loops, or of no step, stays as it is.
        batches: The micro-batches that the run trains on; None where it has no plan.
    """
    if batches is not None and checkpoint["global_step"] and "loops" in checkpoint:
        state = fit_loop_state(checkpoint["global_step"], batches.steps_per_epoch, batches.micro_batches_per_step)
        checkpoint["loops"]["fit_loop"].update(state)


def fit_loop_state(step: int, steps_per_epoch: int, micro_batches: int) -> dict[str, Any]:
    """The progress of Lightning's fit loop, as it is right after an optimizer step.

    Lightning counts micro-batches and epochs, and its saved counts depend on when it saved them: in the middle of a
    step, at a validation, or when training ended, after which it takes an epoch that was cut short for a whole one. The
    plan's rows follow from the step alone, so a resumed run is given the counts that belong to its step.

    Args:
        step: Number of optimizer steps done, at least one.
        steps_per_epoch: Number of optimizer steps that count as an epoch.
        micro_batches: Number of micro-batches that a rank takes for a step.

    Returns:
        Entries that replace those of the same names in ``checkpoint["loops"]["fit_loop"]``.
    """
    epoch, last = divmod(step - 1, steps_per_epoch)

    def batches(ready: int) -> dict[str, int]:
        # Callbacks run before Lightning counts the micro-batch as completed.
        return {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}

    def steps(names: str, total: int, current: int) -> dict[str, dict[str, int]]:
        return {"total": dict.fromkeys(names.split(), total), "current": dict.fromkeys(names.split(), current)}

    epochs = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    return {
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1},
        "epoch_loop.batch_progress": {
            "total": batches(step * micro_batches),
            "current": batches((last + 1) * micro_batches),
            "is_last_batch": last + 1 == steps_per_epoch,
        },
        "epoch_loop.scheduler_progress": steps("ready completed", step, last + 1),
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": steps("ready completed", step, last + 1),
                "zero_grad": steps("ready started completed", step, last + 1),
            }
        },
        "epoch_loop.val_loop.batch_progress": {
            **steps("ready started processed completed", 0, 0),
            "is_last_batch": False,
        },
    }
