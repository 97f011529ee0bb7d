# SPDX-License-Identifier: Apache-2.0
"""What a person passes by mistake in the first hour: each message says what to give."""

import pathlib
import signal

import numpy as np
import pytest

from mpi_ckpt import (
    IO,
    ArrayState,
    CheckpointError,
    ElasticSampler,
    KeepBest,
    KeepEvery,
    KeepLast,
    ModuleState,
    ObjectState,
    OptimizerState,
    Options,
    SchedulerState,
    State,
    StopWhen,
    TrainState,
)
from mpi_ckpt.engine.registry import require_names, require_state, require_states
from mpi_ckpt.errors import OptionsError, RegistrationError

torch = pytest.importorskip("torch")


def model():
    return torch.nn.Linear(2, 2)


def sgd(module=None):
    return torch.optim.SGD((module or model()).parameters(), lr=0.1)


def step_lr():
    return torch.optim.lr_scheduler.StepLR(sgd(), 1)


class Nameless(State):
    def __init__(self):
        pass


NO_STATES = {
    "a module": (model, "a Linear is not a State", "TrainState(module=...)"),
    "an optimizer": (sgd, "a SGD is not a State", "TrainState(module=..., optimizer=...)"),
    "a scheduler": (step_lr, "a StepLR is not", "scheduler=...", "its optimizer"),
    "a scaler": (
        lambda: torch.amp.GradScaler(enabled=False),
        "GradScaler",
        "scaler=...",
        "the module",
    ),
    "a state_dict": (lambda: model().state_dict(), "state_dict()", "give the model itself"),
    "an array": (lambda: np.ones(3), "a ndarray", "ArrayState('its name', {'x': array})"),
    "a tensor": (lambda: torch.ones(3), "a Tensor", "ObjectState('its name'"),
    "a number": (lambda: 3, "3 is not a State", "ObjectState('its name', value)"),
    "a dict": (lambda: {"epoch": 1}, "a dict", "ObjectState('its name', value)"),
    "a text": (lambda: "model", "'model' is not", "the directory is the first argument"),
    "a loader": (
        lambda: torch.utils.data.DataLoader([1]),
        *("a DataLoader", "ElasticSampler(len(dataset), batch_size)", "batch_sampler="),
    ),
    "a sampler": (
        lambda: torch.utils.data.RandomSampler([1]),
        *("a RandomSampler", "ElasticSampler(len(dataset), batch_size)"),
    ),
    "a torch generator": (torch.Generator, "a Generator", "RNGState(generators="),
    "a NumPy generator": (np.random.default_rng, "a Generator", "RNGState(generators="),
    "a class": (lambda: ObjectState, "the class ObjectState", "make an object of it"),
    "a function": (lambda: model, "a function", "derive its class from State"),
}


@pytest.mark.parametrize(("make", "what", "advice"), [
    pytest.param(make, texts[0], texts[1:], id=name)
    for name, (make, *texts) in NO_STATES.items()
])  # fmt: skip
def test_what_is_no_state(make, what, advice):
    with pytest.raises(RegistrationError) as caught:
        require_state(make())
    text = str(caught.value)
    assert what in text
    assert "is not a State" in text
    assert all(part in text for part in advice), text
    assert len(text) < 300  # a model has a thousand lines of its own


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: ObjectState("a", 1), ["one ObjectState", "[state]"]),
        (lambda: {"a": ObjectState("a", 1)}, ["a dict", "give a list of states"]),
        (model, ["a Linear, not a list of states", "TrainState(module=...)"]),
        (lambda: np.ones(2), ["a ndarray, not a list of states", "ArrayState"]),
        (lambda: model().state_dict(), ["give the model itself"]),
        (lambda: "run", ["'run'", "not a list of states"]),
        (lambda: 3, ["3, not a list of states"]),
        (lambda: None, ["None, not a list of states"]),
    ],
)
def test_states_that_are_no_list(make, texts):
    with pytest.raises(RegistrationError) as caught:
        require_states(make())
    assert all(text in str(caught.value) for text in texts), caught.value


def test_names_that_are_no_list():
    assert require_names(None) is None
    assert require_names(("a", "b")) == ["a", "b"]
    for only, text in [
        ("model", "only='model' is a text, not a list of names of states: ['model']"),
        ([ObjectState("a", 1)], "only has an ObjectState: give names of states"),
        (3, "only is 3, not a list of names of states"),
    ]:
        with pytest.raises(RegistrationError) as caught:
            require_names(only)
        assert text in str(caught.value)


PARTS = {
    "a state_dict as module": (
        lambda: TrainState(module=model().state_dict()),
        *("of type OrderedDict", "state_dict(), give the module itself"),
    ),
    "a state_dict in a ModuleState": (
        lambda: ModuleState("m", dict(model().state_dict())),
        *("state 'm'", "give the module itself"),
    ),
    "a class as module": (
        lambda: TrainState(module=torch.nn.Linear),
        *("the class Linear", "give an object of it"),
    ),
    "an optimizer as module": (lambda: TrainState(module=sgd()), "not a torch.nn.Module"),
    "a name and a module": (
        lambda: TrainState("train", model()),
        *("not a torch.nn.Module but of type str",),
    ),
    "parameters as module": (
        lambda: TrainState(module=model().parameters()),
        "not a torch.nn.Module but of type generator",
    ),
    "a module where the name belongs": (
        lambda: ModuleState(model(), "m"),
        *("is not a string", "a state's first argument is its name"),
    ),
    "a state_dict as optimizer": (
        lambda: TrainState(module=model(), optimizer=sgd().state_dict()),
        *("a dict has no state_dict()", "give the object itself"),
    ),
    "a class as optimizer": (
        lambda: TrainState(module=model(), optimizer=torch.optim.SGD),
        "optimizer is the class SGD: give an object of it",
    ),
    "a scheduler as optimizer": (
        lambda: TrainState(module=model(), optimizer=step_lr()),
        "optimizer is of type StepLR: give it as scheduler=",
    ),
    "an optimizer as scheduler": (
        lambda: TrainState(module=model(), scheduler=sgd()),
        "scheduler is of type SGD: give it as optimizer=",
    ),
    "a function as scheduler": (
        lambda: TrainState(module=model(), scheduler=lambda epoch: 1),
        "a function has no state_dict()",
    ),
    "an optimizer state of a scheduler": (
        lambda: OptimizerState("o", step_lr()),
        "a StepLR is not an optimizer",
    ),
    "a scheduler state of a dict": (
        lambda: SchedulerState("s", {"lr": 1}),
        "give the object itself",
    ),
    "a class as scheduler": (
        lambda: SchedulerState("s", torch.optim.lr_scheduler.StepLR),
        "state 's': StepLR is a class: give an object of it",
    ),
    "a list of arrays": (
        lambda: ArrayState("a", [np.ones(2)]),
        *("of type list", "{'x': array}"),
    ),
    "an array without a name": (
        lambda: ArrayState("a", np.ones(2)),
        *("of type ndarray", "{'x': array}"),
    ),
    "no super().__init__": (
        lambda: Nameless().name,
        *("a Nameless has no name", "super().__init__(name)"),
    ),
    "a mode that is none": (
        lambda: ObjectState("a", 1, sync="roots"),
        *("'roots'", "'root', 'mean', 'check', 'none'"),
    ),
}


@pytest.mark.parametrize(
    ("make", "texts"),
    [pytest.param(make, texts, id=name) for name, (make, *texts) in PARTS.items()],
)
def test_parts_of_a_training_in_the_wrong_place(make, texts):
    with pytest.raises(RegistrationError) as caught:
        make()
    assert all(text in str(caught.value) for text in texts), caught.value


def test_parts_of_a_training_need_no_names():
    module = model()
    optimizer = sgd(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    captured = TrainState(module, optimizer, scheduler).capture()
    assert set(captured.structure) == {"module", "optimizer", "scheduler"}


VALUES = {
    "an interval as text": (
        lambda: Options(interval="500"),
        *("interval is '500'", "a number of steps (500)", "timedelta", "MPI_CKPT_INTERVAL"),
    ),
    "an interval in seconds": (
        lambda: Options(interval=600.0),
        *("interval is 600.0", "a time (timedelta(minutes=10))"),
    ),
    "an interval that is a flag": (lambda: Options(interval=True), "interval is True"),
    "no interval": (lambda: Options(interval=0), "interval is 0"),
    "a number as retention": (lambda: Options(retention=3), "such as KeepLast(3)"),
    "a deadline as text": (
        lambda: Options(deadline_seconds="600"),
        "deadline_seconds is '600': must be above 0",
    ),
    "one signal": (
        lambda: Options(preemption_signals=signal.SIGTERM),
        *("preemption_signals", "a tuple of signals, such as (signal.SIGTERM,)"),
    ),
    "a signal that nobody can answer": (
        lambda: Options(preemption_signals=(signal.SIGKILL,)),
        *("SIGKILL", "a tuple of signals"),
    ),
    "writers that are none": (lambda: Options(writers="nodes"), "root, node or all"),
    "a size as text": (lambda: IO(window_bytes="64M"), "window_bytes is '64M': at least 1"),
    "a margin as text": (lambda: StopWhen(margin_seconds="30"), "margin_seconds is '30'"),
    "a count as text": (lambda: KeepLast("3"), "KeepLast('3')", "a whole number"),
    "half a count": (lambda: KeepLast(3.5), "KeepLast(3.5)", "a whole number"),
    "no count": (lambda: KeepLast(0), "KeepLast(0)", "at least 1"),
    "steps as text": (lambda: KeepEvery("1000"), "KeepEvery('1000')", "a whole number"),
    "a mode in words": (
        lambda: KeepBest("loss", mode="minimum"),
        *("'minimum'", "mode is 'min' or 'max'"),
    ),
    "a value as metric": (lambda: KeepBest(0.5, mode="min"), "save(metrics={...})"),
    "a policy and a number": (
        lambda: KeepLast(3) | 3,
        *("KeepLast(count=3) | 3", "join policies"),
    ),
    "a dataset for its length": (
        lambda: ElasticSampler([1, 2], 2),
        *("length is of type list", "ElasticSampler(len(dataset), batch_size=256)"),
    ),
    "a batch size as text": (
        lambda: ElasticSampler(10, "2"),
        *("batch_size is of type str", "a number of samples"),
    ),
    "an empty dataset": (lambda: ElasticSampler(0, 2), "0 samples", "at least 1"),
    "an interval in the environment": (
        lambda: Options.from_env({"MPI_CKPT_INTERVAL": "10m"}),
        *("MPI_CKPT_INTERVAL='10m'", "steps (500), seconds (600s) or auto"),
    ),
    "a flag in the environment": (
        lambda: Options.from_env({"MPI_CKPT_REUSE": "yes"}),
        *("MPI_CKPT_REUSE='yes'", "0 or 1"),
    ),
}


@pytest.mark.parametrize(
    ("make", "texts"),
    [pytest.param(make, texts, id=name) for name, (make, *texts) in VALUES.items()],
)
def test_values_that_are_no_options(make, texts):
    with pytest.raises(OptionsError) as caught:
        make()
    assert all(text in str(caught.value) for text in texts), caught.value


def test_numbers_of_numpy_are_numbers():
    assert KeepLast(np.int64(3)).count == 3
    assert Options(deadline_seconds=np.float64(3)).deadline_seconds == 3
    assert len(ElasticSampler(np.int64(10), np.int32(2))) == 5


def test_a_sampler_that_knows_no_ranks():
    with pytest.raises(CheckpointError, match="pass it to a manager as a state"):
        next(iter(ElasticSampler(10, 2)))


def test_a_path_in_an_object_state():
    with pytest.raises(CheckpointError, match="no safe form on disk; use plain values"):
        ObjectState("a", {"p": pathlib.Path("x")}).capture()
