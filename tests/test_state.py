"""State outside the state dicts: settings as plain numbers, and a training that ends on the same bits whatever its
parts remember for themselves."""
import itertools
import random
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lap_nb.data import digits
from lap_nb.depth import RandomDepth
from lap_nb.dynamics import Flow, ResidualNet
from lap_nb.ensembles import fit_many
from lap_nb.files import digest, load_checkpoint, save_checkpoint
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net
from lap_nb.state import Memory, capture, restore
from lap_nb.training import Checkpoints, TrainConfig, Training, fit

SPLIT = digits().split(60)
GLOBAL = torch.Generator()   # of a script or notebook
GLOBAL_NUMPY = np.random.default_rng(0)


# Settings

NUMBERS = [
    np.float32, np.float64, np.float16, Fraction, Decimal, torch.tensor, np.array,
    lambda v: torch.tensor(v, dtype=torch.float64), np.longdouble]

@pytest.mark.parametrize("of", NUMBERS)
@pytest.mark.parametrize("name, value", [("lr", .25), ("weight_decay", .5), ("label_smoothing", .125), ("momentum", .5), ("gamma", .5), ("warmup", .25), ("clip", 2.)])
def test_numbers_of_any_library_are_settings(name, value, of):
    found = getattr(TrainConfig(**{name: of(value)}), name)
    assert type(found) is float and found == value


@pytest.mark.parametrize("of", [int, float, np.int64, np.uint8, np.float32, Fraction, Decimal, torch.tensor, np.array])
@pytest.mark.parametrize("name", ["epochs", "batch_size", "eval_every", "patience", "check_every", "crop"])
def test_whole_numbers_of_any_library_are_settings(name, of):
    found = getattr(TrainConfig(**{name: of(3)}), name)
    assert type(found) is int and found == 3


@pytest.mark.parametrize("name", ["flip", "channels_last", "compile"])
@pytest.mark.parametrize("value", [np.True_, torch.tensor(True), np.array(True), 1])
def test_truths_of_any_library_are_settings(name, value): assert getattr(TrainConfig(**{name: value}), name) is True


@pytest.mark.parametrize("value", [np.array([.25, .5]), torch.tensor([.25, .5]), [np.float32(.25), Fraction(1, 2)], iter([.25, .5])])
def test_milestones_of_any_kind(value): assert TrainConfig(milestones=value).milestones == (.25, .5)


class Word(str, Enum): SGD = "sgd"

@pytest.mark.parametrize("value", [np.str_("sgd"), Word.SGD])
def test_words_are_plain(value):
    assert type(TrainConfig(optimizer=value).optimizer) is str and TrainConfig(optimizer=value).optimizer == "sgd"


CANNOT = [
    True, np.True_, "1", b"1", 1j,
    np.complex64(1),
    float("nan"),
    np.float32("inf"),
    Decimal("NaN"),
    Decimal("sNaN"),
    Fraction(10 ** 400),
    np.ones(1),
    np.ones(2),
    torch.ones(3), [1.], {},
    object(),
    np.datetime64("2020"),
    torch.ones((), device="meta")]

@pytest.mark.parametrize("name", ["lr", "weight_decay", "label_smoothing", "momentum", "gamma", "warmup", "clip"])
def test_what_cannot_be_meant_by_a_number_is_refused(name):
    for value in CANNOT:
        with pytest.raises(ValueError, match=f"{name} is .*, expected"): TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "eval_every", "patience", "check_every", "crop"])
def test_what_cannot_be_meant_by_a_whole_number_is_refused(name):
    for value in [*CANNOT, 2.5, np.float32(2.5), Fraction(1, 2), -1, 2 ** 63]:
        with pytest.raises(ValueError, match=f"{name} is .*expected"): TrainConfig(**{name: value})


@pytest.mark.parametrize("name, value", [("flip", 2), ("flip", "no"), ("channels_last", .5), ("channels_last", None), ("compile", "nonsense"), ("compile", print),
                                         ("milestones", "0.5"), ("milestones", {.5: 1}), ("milestones", [[.5]]), ("milestones", None), ("optimizer", None), ("schedule", 3), ("gamma", 1e300)])
def test_other_settings_that_cannot_be_meant(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*expected"): TrainConfig(**{name: value})


def test_a_training_with_settings_of_any_kind_resumes(tmp_path):
    settings = dict(lr=np.logspace(-3, -2, 2)[0], weight_decay=np.float32(.5), clip=Fraction(1, 2),
                    gamma=torch.tensor(.5), warmup=np.float64(.25), schedule=np.str_("multistep"),
                    milestones=np.array([.5, .75]), batch_size=np.int64(25), eval_every=torch.tensor(1), flip=np.False_,
                    seed=np.int64(3), epochs=np.float64(4))
    def run(**more):
        torch.manual_seed(0)
        return fit(dense_net(64, 10, 2, 8), SPLIT, **settings, **more)
    def cut(training):
        if training.epoch == 2: raise Stop
    with pytest.raises(Stop):
        run(checkpoints=Checkpoints(tmp_path / "a.pt", every=np.int32(2), rollback=np.int64(1)), callbacks=[cut])
    check_same(run(), run(checkpoints=Checkpoints(tmp_path / "a.pt", resume=np.True_)))
    plain = load_checkpoint(tmp_path / "a.pt")["config"]
    assert {type(v) for v in plain.values()} <= {int, float, str, bool, tuple, type(None)} and {
        type(m) for m in plain["milestones"]
    } == {float}


@pytest.mark.parametrize("seed", [1.5, "a", None, True, 2 ** 64, -2 ** 63 - 1, np.ones(2)])
def test_a_seed_that_cannot_be_meant(seed):
    with pytest.raises(ValueError, match="seed (is|has shape)"): fit(dense_net(64, 10, 2, 8), SPLIT, seed=seed)


# The same bits, whatever a part remembers

class Remembers(nn.Module):
    "A network whose forward pass depends on what `state` remembers, and moves it."
    def __init__(self, state=None, move=lambda self: 0.):
        super().__init__()
        velocity = lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
        self.net, self.state, self.move = (
            ResidualNet(Flow([velocity() for _ in range(2)]), nn.Linear(64, 10)),
            state,
            move,
        )
    def forward(self, x): return self.net(x) * (1 + .1 * self.moved())
    def moved(self): return self.move(self) if self.training else 0.


class Buffered(Remembers):
    def __init__(self, persistent=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=persistent)
    def moved(self):
        if self.training: self.mean += .01
        return self.mean


class Reassigned(Buffered):
    def moved(self):
        if self.training: self.mean = self.mean + .01
        return self.mean


def counts(self): self.state += 1; return self.state % 7 / 7
def tensor(self): self.state = self.state * .9 + .1; return self.state.item()
def inplace(self): self.state.mul_(.9).add_(.1); return self.state.item()
def array(self): self.state *= .9; self.state += .1; return float(self.state[0])
def listed(self): self.state.append(len(self.state)); return sum(self.state) % 5 / 5
def entries(self): self.state["n"] += 1; return self.state["n"] % 5 / 5
def fields(self): self.state.n += 1; return self.state.n % 5 / 5
def nested(self): self.state["a"][1].append(self.state["rng"].random()); return self.state["a"][1][-1]
def set_(self): self.state.add(len(self.state)); return len(self.state) % 5 / 5

class Phase(Enum): EVEN, ODD = 0, 1
def phase(self): self.state = Phase.ODD if self.state is Phase.EVEN else Phase.EVEN; return self.state.value


class Own:
    def __init__(self): self.n, self.rng = 0, random.Random(1)
    def draw(self): self.n += 1; return self.rng.random() / self.n


class WithProtocol:
    __slots__ = ("n",)   # nothing to be seen from outside
    def __init__(self): self.n = 0
    def draw(self): self.n += 1; return self.n % 5 / 5
    def state_dict(self): return {"n": self.n}
    def load_state_dict(self, state): self.n = state["n"]


def drawn_globally(self): return torch.rand((), generator=GLOBAL).item()
def drawn_from_numpy(self): return GLOBAL_NUMPY.random()
def cells():
    n, rng = 0, np.random.RandomState(2)
    def move(self):
        nonlocal n
        n += 1
        return rng.rand() / n
    return move


def hooked(hook):
    model = Remembers()
    model.net.flow.blocks[0].velocity.register_forward_hook(hook)
    return model

def hook_of(draw): return lambda module, args, out: out * (1 + .1 * draw()) if module.training else None

def gradient_noise():
    model, g = Remembers(), torch.Generator().manual_seed(2)
    model.net.head.weight.register_hook(lambda grad: grad + .01 * torch.randn(grad.shape, generator=g))
    return model

def at_random_depth(seed=3):
    model = dense_net(64, 10, 4, 8)
    RandomDepth(model, seed)
    return model

class Dropped(Remembers):
    "Numbers of the global generators of Python, NumPy and PyTorch."
    def moved(self): return random.random() + np.random.rand() + torch.rand(()).item() if self.training else 0.

def with_state(state, move): return lambda: Remembers(state(), move)

KINDS = {
    "nothing": Remembers,
    "global generators": Dropped,
    "buffer": Buffered,
    "buffer assigned anew": Reassigned,
    "random depth": at_random_depth,
    "counter": with_state(lambda: 0, counts),
    "torch generator": with_state(
        lambda: torch.Generator().manual_seed(1), lambda self: torch.rand((), generator=self.state).item()
    ),
    "python generator": with_state(lambda: random.Random(1), lambda self: self.state.random()),
    "numpy generator": with_state(lambda: np.random.default_rng(1), lambda self: self.state.random()),
    "numpy random state": with_state(lambda: np.random.RandomState(1), lambda self: self.state.randn()),
    "philox": with_state(lambda: np.random.Generator(np.random.Philox(1)), lambda self: self.state.random()),
    "mersenne": with_state(lambda: np.random.Generator(np.random.MT19937(1)), lambda self: self.state.normal()),
    "tensor": with_state(lambda: torch.zeros(()), tensor),
    "tensor in place": with_state(lambda: torch.zeros(()), inplace),
    "array": with_state(lambda: np.zeros(2), array),
    "list": with_state(list, listed),
    "deque": with_state(lambda: deque(maxlen=4), listed),
    "dict": with_state(lambda: {"n": 0}, entries),
    "counter of collections": with_state(Counter, entries),
    "defaultdict": with_state(lambda: defaultdict(int), entries),
    "ordered": with_state(lambda: OrderedDict(n=0), entries),
    "namespace": with_state(lambda: SimpleNamespace(n=0), fields),
    "set": with_state(set, set_),
    "enum": with_state(lambda: Phase.EVEN, phase),
    "nested": with_state(lambda: {"a": (1, []), "rng": random.Random(1)}, nested),
    "object": with_state(Own, lambda self: self.state.draw()),
    "protocol": with_state(WithProtocol, lambda self: self.state.draw()),
    "fraction": with_state(
        lambda: Fraction(1), lambda self: (setattr(self, "state", self.state / 2), float(self.state))[1]
    ),
    "numpy number": with_state(
        lambda: np.float32(1), lambda self: (setattr(self, "state", self.state * np.float32(0.9)), float(self.state))[1]
    ),
    "closure": lambda: Remembers(None, cells()),
    "method": lambda: Remembers(None, partial(lambda own, self: own.draw(), Own())),
    "global generator": lambda: (GLOBAL.manual_seed(4), Remembers(None, drawn_globally))[1],
    "global NumPy generator": lambda: (
        setattr(GLOBAL_NUMPY.bit_generator, "state", np.random.default_rng(4).bit_generator.state),
        Remembers(None, drawn_from_numpy),
    )[1],
    "hook of a closure": lambda: hooked(hook_of(np.random.default_rng(5).random)),
    "hook of an object": lambda: hooked(hook_of(Own().draw)),
    "hook with a protocol": lambda: hooked(hook_of(WithProtocol().draw)),
    "gradient hook": gradient_noise,
}


class Stop(Exception): "Ends a training between two steps."


def trained(make, path=None, stop=None, least_action=LeastAction, callbacks=lambda: [], seed=0, epochs=4, every=None, rollback=0, **settings):
    kept = path and Checkpoints(path, stop is None, every, rollback)
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    model = make()
    la, step, old = least_action and least_action(model), [0], Training.train_step
    def train_step(self, *args):
        if stop == step[0]: raise Stop
        step[0] += 1
        return old(self, *args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Training, "train_step", train_step)
        try:
            return fit(model, SPLIT, la, epochs=epochs, batch_size=25, eval_every=2, optimizer="sgd", lr=.05,
                       checkpoints=kept, callbacks=callbacks(), **settings)
        finally:
            m.undo()


def check_same(a, b):
    for name, p in a.model.state_dict().items(): assert torch.equal(p, b.model.state_dict()[name]), name
    assert a.curves.keys() == b.curves.keys()
    for name, curve in a.curves.items(): assert torch.equal(curve, b.curves[name]), name


def stopped_and_resumed(make, path, stop, **settings):
    with pytest.raises(Stop): trained(make, path, stop, every=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # nothing is left behind
        return trained(make, path, seed=9, every=1, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_resumes_whatever_its_parts_remember(tmp_path, kind):
    stop = random.Random(kind).randrange(1, 12)
    straight = trained(KINDS[kind])
    check_same(straight, stopped_and_resumed(KINDS[kind], tmp_path / "run.pt", stop))
    if kind != "nothing" and kind != "random depth":
        assert not all(
            torch.equal(a, b) for a, b in zip(straight.model.parameters(),
                                              trained(Remembers).model.parameters())), "the kind has an effect"


class Tightening(DualAscent):
    "A rule with a plain attribute that its steps change."
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); self.moves, self.rng = 0, random.Random(0)
    def _next(self, loss):
        self.moves += 1
        return {"lam": self.lam + loss / self.moves * self.rng.random()}


@pytest.mark.parametrize("stop", [1, 5, 10])
def test_a_controller_of_ones_own(tmp_path, stop):
    la = partial(LeastAction, controller=Tightening())
    check_same(trained(Remembers, least_action=la),
               stopped_and_resumed(Remembers, tmp_path / "run.pt", stop, least_action=la))


# Callbacks

def test_a_stop_by_a_callback_is_remembered(tmp_path):
    stop = lambda: [lambda t: t.epoch == 2]
    straight = trained(Remembers, callbacks=stop)
    trained(Remembers, tmp_path / "run.pt", callbacks=stop)
    with pytest.warns(UserWarning, match='a callback has stopped this training after epoch 2.*resume="force" goes on'):
        resumed = trained(Remembers, tmp_path / "run.pt", seed=9, callbacks=stop)
    check_same(straight, resumed)
    model = Remembers()
    assert fit(
        model,
        SPLIT,
        LeastAction(model),
        epochs=4,
        batch_size=25,
        eval_every=2,
        optimizer="sgd",
        checkpoints=Checkpoints(tmp_path / "run.pt", resume="force"),
    ).curves["epoch"].tolist() == [2, 4]


class Patience:
    "Stops when the loss has not fallen for a while."
    def __init__(self, most=2): self.best, self.wait, self.most = float("inf"), 0, most
    def __call__(self, training):
        loss = training.curves.points[-1]["train_loss"].item() + training.epoch   # rises in the end
        self.best, self.wait = min(self.best, loss), 0 if loss < self.best else self.wait + 1
        return self.wait >= self.most


class Kept(WithProtocol):
    __slots__ = ()
    def __call__(self, training): self.n += 1; return self.n == 3


def waiting(most):
    n, seen = 0, []
    def callback(training):
        nonlocal n
        n += 1; seen.append(training.epoch)
        return n >= most or len(seen) >= most
    return callback


def unfreeze(training): training.model.net.head.requires_grad_(training.epoch < 2)
def sleep(training):
    if training.epoch >= 2: training.model.drop.eval()
def turn(training):
    for group in training.descent.optimizer.param_groups: group["weight_decay"] = .1 * training.epoch
    training.least_action.controller.tau = 1 / training.epoch

class Dropping(Remembers):
    def __init__(self): super().__init__(); self.drop = nn.Dropout(.3)
    def forward(self, x): return super().forward(self.drop(x))


@pytest.mark.parametrize("callback", [Patience, Kept, lambda: Patience(most=1), lambda: waiting(3), lambda: unfreeze, lambda: sleep, lambda: turn, lambda: partial(lambda own, t: own(t), Patience())])
@pytest.mark.parametrize("stop", [4, 7, 10])
def test_callbacks_and_what_they_change_go_on(tmp_path, callback, stop):
    kinds = dict(callbacks=lambda: [callback()], epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a callback has stopped")
        straight = trained(Dropping, **kinds)
        try:
            with pytest.raises(Stop): trained(Dropping, tmp_path / "run.pt", stop, every=1, **kinds)
        except pytest.fail.Exception: pass   # it had stopped before
        check_same(straight, trained(Dropping, tmp_path / "run.pt", seed=9, every=1, **kinds))


def test_a_list_that_has_gone_on_is_left_and_said(tmp_path):
    "It may be somebody else's, too: nothing in it is lost."
    seen = []
    callbacks = lambda: [lambda t: seen.append(t.epoch)]
    trained(Remembers, tmp_path / "run.pt", epochs=2, callbacks=callbacks)
    seen.append("mine")
    with pytest.warns(UserWarning, match="seen stays as it is now"):
        trained(Remembers, tmp_path / "run.pt", callbacks=callbacks)
    assert seen == [2, "mine", 4]


@pytest.mark.parametrize("wrong", [None, 3, [3], print, {"a": 1}])
def test_callbacks_that_are_none(wrong):
    with pytest.raises(TypeError, match="callbacks is .*expected"): fit(Remembers(), SPLIT, epochs=1, callbacks=wrong)


# What cannot be kept, and what is a setting

@pytest.mark.parametrize("make, said", [
    (with_state(lambda: itertools.count(), lambda self: next(self.state) % 5 / 5), "model.state is an iterator"), (with_state(lambda: iter([.1] * 99), lambda self: next(self.state)), "model.state is an iterator"),
    (with_state(lambda: (x for x in [.1] * 99), lambda self: next(self.state)), "model.state is an iterator"), (with_state(random.SystemRandom, lambda self: self.state.random()), "model.state draws from the system"),
    (with_state(lambda: {"a": [random.SystemRandom()]}, lambda self: 0.), "model.state draws from the system"), (lambda: hooked(hook_of(random.SystemRandom().random)), "hook 0 of model.net.flow.blocks.0.velocity draws")])
def test_what_no_checkpoint_can_hold_is_refused_by_name_before_work(tmp_path, make, said):
    with pytest.raises(ValueError, match=f"{said}.*train without checkpoint"):
        trained(make, tmp_path / "run.pt", every=1)
    assert trained(make).curves["epoch"][-1] == 4


def test_a_callback_whose_state_no_checkpoint_can_hold_is_refused_by_name(tmp_path):
    class Holds(Kept):
        def state_dict(self): return {"n": self.n, "more": [object()]}
    for callback in (Holds(), (lambda it: lambda t: next(it) < 0)(itertools.count())):
        with pytest.raises(ValueError, match="callback 0, .*train without checkpoint"):
            trained(Remembers, tmp_path / "run.pt", every=1, callbacks=lambda: [callback])


def test_settings_of_a_module_are_those_that_are_given(tmp_path):
    def make(p=.5): return lambda: nn.Sequential(nn.Dropout(p), dense_net(64, 10, 2, 8))
    trained(make(), tmp_path / "run.pt", epochs=2)
    assert trained(make(.1), tmp_path / "run.pt").model[0].p == .1


def test_an_unclear_attribute_stays_and_is_named(tmp_path):
    make = lambda scale: lambda: Remembers(scale, lambda self: self.state)
    trained(make(1.), tmp_path / "run.pt", epochs=2)
    with pytest.warns(UserWarning, match="model.state stays as it is now"): run = trained(make(2.), tmp_path / "run.pt")
    assert run.model.state == 2.


ONCE = []

class Fails(Remembers):
    "Overflows at step 9, once."
    def __init__(self): super().__init__(0, counts); self.rng = random.Random(0)
    def forward(self, x):
        out = super().forward(x) * (1 + self.rng.random())
        return out * float("inf") if self.training and self.state == 9 and ONCE and ONCE.pop() else out


def test_roll_back_takes_what_parts_remember_back(tmp_path):
    "A counter and a generator stand where they would without the overflow."
    seen, ONCE[:] = [], [True]
    callbacks = lambda: [lambda t: seen.append((t.epoch, t.model.state, t.model.rng.getstate()))]
    with pytest.warns(UserWarning, match="Going on from there"):
        trained(Fails, tmp_path / "run.pt", callbacks=callbacks, rollback=1)
    trained(Fails, callbacks=callbacks)
    assert seen[:2] == seen[2:] and not ONCE


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_row_at_random_depth_resumes(tmp_path, mode):
    def run(folder=None, stop=None, resume=False):
        old, step = Training.train_step, [0]
        def train_step(self, *args):
            if stop == step[0]: raise Stop
            step[0] += 1
            return old(self, *args)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Training, "train_step", train_step)
            return fit_many(at_random_depth,
                            digits().splits(60, [0, 1]), epochs=4, batch_size=25, eval_every=2, mode=mode,
                            checkpoints=folder and Checkpoints(folder, resume, 1))
    straight = run()
    with pytest.raises(Stop): run(tmp_path / "row", 7)
    resumed = run(tmp_path / "row", resume=True)
    for name, curve in straight.curves.items(): assert torch.equal(curve, resumed.curves[name]), name


# Captured and put back

VALUES = [
    None, 1, 2 ** 200, 1.5, 1j, "a", b"b",
    np.float16(.5),
    np.arange(3),
    np.zeros((0, 2)),
    np.array(3),
    np.array(["a", "b"]),
    torch.arange(4.),
    torch.zeros(0), [1, [2, (3, None)]], {"a": {1: 2}, ("b", 1): [3]},
    deque([1, 2]), {1, 2},
    frozenset({3}),
    defaultdict(list, a=[1]),
    Fraction(1, 3),
    Decimal("0.1"), Phase.ODD,
    SimpleNamespace(a=1, b=[2])]

@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_what_is_captured_survives_a_file_and_comes_back(tmp_path, value):
    from copy import deepcopy
    save_checkpoint(tmp_path / "a.pt", {"it": capture(value)})
    found = restore(load_checkpoint(tmp_path / "a.pt")["it"], deepcopy(value))
    assert (
        type(found) is type(value) and digest(capture(found)) == digest(capture(value)) and repr(found) == repr(value)
    )


def test_containers_are_filled_in_place():
    for value, changed in ((deque([1], maxlen=2), deque([5, 6])), ({"a": 1}, {"b": 2}), ({1}, {7}), ([1], [2, 3])):
        saved = capture(value)
        other = changed
        assert restore(saved, other) is other and list(other) == list(value)


def test_what_goes_in_circles_ends():
    value = {"a": []}
    value["a"].append(value)
    own = SimpleNamespace(); own.self = own
    assert digest(capture(value)) and digest(capture(own))


def test_shared_configurations_are_looked_at_once():
    class Config: pass
    config = Config(); config.size = 3
    parts = nn.ModuleList(nn.Linear(1, 1) for _ in range(5))
    for part in parts: part.config = config
    config.size = 4
    assert sum("config" in name for name in Memory({"model": parts}).first) == 1


# One at a time

def test_one_network_is_trained_by_one_call_at_a_time():
    model, inside, done = Remembers(), threading.Event(), threading.Event()
    def wait(training): inside.set(); done.wait(60)
    thread = threading.Thread(target=lambda: fit(model, SPLIT, epochs=1, callbacks=[wait]))
    thread.start(); inside.wait(60)
    try:
        with pytest.raises(RuntimeError, match="is being trained by another call.*deepcopy"):
            fit(model, SPLIT, epochs=1)
        with pytest.raises(RuntimeError, match="is being trained by another call"):
            fit(nn.Sequential(model), SPLIT, epochs=1)
        fit(Remembers(), SPLIT, epochs=1)
    finally: done.set(); thread.join()
    assert fit(model, SPLIT, epochs=1).curves["epoch"].tolist() == [1]


def test_a_training_inside_a_training_is_refused_and_leaves_nothing():
    model = Remembers()
    with pytest.raises(RuntimeError, match="is being trained"):
        fit(model, SPLIT, epochs=1, callbacks=[lambda t: fit(model, SPLIT, epochs=1)])
    fit(model, SPLIT, epochs=1)


# Where callbacks keep their state

class Slotted:
    "Keeps its state in slots, one of them private, one set only in a call."
    __slots__ = ("count", "__seen", "late")
    def __init__(self): self.count, self.__seen = 0, []
    def __call__(self, training):
        self.count += 1; self.__seen.append(self.count); self.late = len(self.__seen)
        return self.late == 3


def on_itself():
    def callback(training):
        callback.calls = getattr(callback, "calls", 0) + 1
        return callback.calls == 3
    return callback


class Late:
    def __call__(self, training):
        self.seen = getattr(self, "seen", {}) | {training.epoch: [training.epoch]}
        return len(self.seen) == 3


class OfAll:
    calls = 0   # of all objects of the class
    def __init__(self): OfAll.calls = 0
    def __call__(self, training):
        OfAll.calls += 1
        return OfAll.calls == 3


STOPS = {
    "slots": Slotted, "a class's attribute": OfAll, "a function's attribute": on_itself, "set in a call": Late,
    "its method": lambda: Late().__call__, "default": lambda: lambda t, calls=[]:
    (calls.append(t.step), len(calls) == 3)[1],
    "keyword default": lambda: lambda t, *, rng=random.Random(0): rng.random() < .5}

@pytest.mark.parametrize("kind", STOPS)
def test_a_callback_stops_where_it_would_have_wherever_it_counts(tmp_path, kind):
    def callbacks(): return [STOPS[kind]()]
    def run(**more): return trained(Remembers, callbacks=callbacks, epochs=8, **more)
    straight = run()
    assert straight.curves["epoch"][-1] < 8, "it stops"
    with pytest.raises(Stop): run(path=tmp_path / "run.pt", stop=10, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(straight, run(path=tmp_path / "run.pt", seed=9, every=1))


class Counts(nn.Module):
    "Counts its calls, and keeps a scale, on the class."
    steps, scale = 0, None
    def __init__(self):
        super().__init__()
        self.net = dense_net(64, 10, K=1, hidden=4)
        Counts.steps, Counts.scale = 0, torch.ones(())
    def forward(self, x):
        if not self.training: return self.net(x)
        Counts.steps += 1
        Counts.scale = Counts.scale * 1.01
        return self.net(x * (1 + .01 * Counts.steps) * Counts.scale)


def test_what_a_class_keeps_goes_on_after_a_resume(tmp_path):
    def run(**more): return trained(Counts, **more)
    straight = run()
    with pytest.raises(Stop): run(path=tmp_path / "run.pt", stop=10, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(straight, run(path=tmp_path / "run.pt", seed=9, every=1))
