"""Optimizers and schedules that are stopped, saved and resumed as a run's are, without a run."""

import io
from types import SimpleNamespace

import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from firefly_lightning.optim import RunSettings

STEPS = 12

OPTIMIZERS = {
    "Adam's betas": lambda parameters: AdamW(parameters, 1e-3),
    "momentum": lambda parameters: SGD(parameters, 1e-3, momentum=0.9),
    "groups": lambda parameters: AdamW([{"params": parameters[:1], "lr": 1e-4}, {"params": parameters[1:]}], 1e-3),
}


class Run:
    """An optimizer and its schedule, as a module and Lightning hold them."""

    def __init__(self, optimizer, schedule, saved=None) -> None:
        self.parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(3, 3))]
        self.optimizer = optimizer(self.parameters)
        self.schedule = schedule(self.optimizer)
        configs = [SimpleNamespace(scheduler=self.schedule)]
        self.trainer = SimpleNamespace(optimizers=[self.optimizer], lr_scheduler_configs=configs)
        self.settings = RunSettings()
        self.settings.note(self.trainer)
        if saved is not None:
            saved = torch.load(io.BytesIO(saved), weights_only=True)
            self.settings.resume(saved["changed"], [saved["schedule"]])
            if "optimizer" in saved:
                self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
        self.settings.restore(self.trainer)

    def step(self, *metrics) -> list:
        """Makes a step; gives the settings that it was made with."""
        names = ("lr", "betas", "momentum")
        used = [[group.get(name) for name in names] for group in self.optimizer.param_groups]
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        self.optimizer.step()
        self.schedule.step(*metrics)
        return used

    def saved(self, portable: bool) -> bytes:
        """What a checkpoint has of it; a portable one has no settings of the optimizer."""
        contents = {"changed": self.settings.changed(self.trainer), "schedule": self.schedule.state_dict()}
        buffer = io.BytesIO()
        torch.save(contents if portable else contents | {"optimizer": self.optimizer.state_dict()}, buffer)
        return buffer.getvalue()


def assert_resumes(optimizer, schedule, metrics=()) -> None:
    """Stopped after any number of steps, with either kind of checkpoint; a value for each step, or none."""
    given = [(value,) for value in metrics] or [()] * STEPS
    whole = Run(optimizer, schedule)
    expected = [whole.step(*metric) for metric in given]
    assert len({str(used) for used in expected}) > 1, "the schedule changes something"
    for stop in range(1, STEPS):
        for portable in (True, False):
            first = Run(optimizer, schedule)
            for metric in given[:stop]:
                first.step(*metric)
            resumed = Run(optimizer, schedule, first.saved(portable))
            assert [resumed.step(*metric) for metric in given[stop:]] == expected[stop:], (stop, portable)
