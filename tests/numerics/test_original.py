"""The module itself is the first truth: how it is called, what it keeps, what wraps it, and how it is left."""

from __future__ import annotations

import argparse
import collections
import contextvars
import dataclasses
import functools
import logging
import random
import sys
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import turbocompile
import turbocompile.capture.export as capturing
from turbocompile.build import from_module
from turbocompile.build.measure import measured
from turbocompile.capture.isolation import State
from turbocompile.errors import CaptureError, VerificationError

OFF = {"passes": "off"}  # what is tested stands before any pass


def compiled(model, args=(), kwargs=None, **options):
    torch.manual_seed(0)
    return turbocompile.optimize(model, args, kwargs, **{"recipe": OFF, **options})


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


def x8(*shape):
    return torch.randn(*(shape or (2,)), 8)


# ---------------------------------------------------------------------------------------------------- how it is called


def scale_of_keywords(forward):
    """As diffusers' scale of a LoRA: it looks among the keywords, whatever is given by position."""

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * kwargs.get("scale", 1.0)

    return wrapped


class Decorated(Linear):
    @scale_of_keywords
    def forward(self, x, scale=1.0):
        return self.linear(x)


class Counting(Linear):
    """How many arguments there are by position, and which by name."""

    def forward(self, x, *more, gain=1.0, **named):
        y = self.linear(x) * gain * (1 + len(more)) + 10 * len(named)
        for value in (*more, *named.values()):
            y = y + (value if isinstance(value, torch.Tensor) else 0)
        return y


class Settings(collections.OrderedDict):
    pass


class Told(Linear):
    def forward(self, x, settings=None, size=None):
        assert settings is None or isinstance(settings, Settings)
        assert size is None or size._fields == ("height", "width")
        return self.linear(x) * (settings["gain"] if settings else 1.0) + (size.height if size else 0)


Size = collections.namedtuple("Size", "height width")


def hooked(seen_by_name):
    model = Linear()

    def hook(module, args, kwargs):
        if seen_by_name != ("x" in kwargs):
            return (args, kwargs)
        return (tuple(a * 3 for a in args), {k: v * 3 for k, v in kwargs.items()})

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("model", "args", "kwargs"),
    [
        (Decorated(), (), {"x": x8(), "scale": 0.5}),
        (Decorated(), (x8(), 0.5), {}),
        (Decorated(), (x8(),), {"scale": 0.25}),
        (Counting(), (x8(), x8(), 3), {"gain": 2.0, "other": x8(), "flag": True}),
        (Counting(), (x8(),), {}),
        (Told(), (x8(),), {"settings": Settings(gain=0.5), "size": Size(4, 5)}),
        (hooked(True), (), {"x": x8()}),
        (hooked(True), (x8(),), {}),
        (hooked(False), (x8(),), {}),
    ],
)
def test_a_call_is_captured_as_its_user_writes_it(model, args, kwargs):
    engine = compiled(model.eval(), args, kwargs)
    assert torch.equal(engine(*args, **kwargs), model(*args, **kwargs))


def test_a_users_dictionary_is_not_emptied():
    class Popping(Linear):
        def forward(self, x, options):
            return self.linear(x) * options.pop("scale")

    model, options = Popping().eval(), {"scale": 0.5}
    engine = compiled(model, (x8(),), {"options": options})
    assert options == {"scale": 0.5}
    x = x8()
    assert torch.equal(engine(x, {"scale": 0.5}), model.linear(x) * 0.5)


# --------------------------------------------------------------------------- plain arguments, each Program with its own


class Options(Linear):
    """Sizes as integers and lists, flags, names, as LTX, Qwen-Image and SD3 take them."""

    def forward(self, x, height=None, sizes=None, skip=False, mode="sum"):
        y = x if skip else self.linear(x)
        if height is not None:
            y = y.unflatten(1, (height, -1)).flip(1).flatten(1, 2)
        for i, (a, b) in enumerate(sizes or ()):
            y = y + i * a * b
        return y.sum(1) if mode == "sum" else y


CALLS = [
    ((x8(1, 4),), {"height": 2, "sizes": [(2, 2), (1, 4)]}),
    ((x8(1, 6),), {"height": 3, "sizes": [(3, 2)]}),
    ((x8(1, 6),), {"height": 2, "sizes": [(3, 2)]}),
    ((x8(1, 6),), {"skip": True, "mode": "all"}),
    ((x8(1, 6),), {}),
]


@pytest.mark.parametrize("lazy", [False, True])
def test_each_program_has_its_own_plain_arguments(lazy, tmp_path):
    model = Options().eval()
    engine = turbocompile.optimize(model, None if lazy else CALLS, recipe=OFF)
    for args, kwargs in (*CALLS, *CALLS):
        assert torch.equal(engine(*args, **kwargs), model(*args, **kwargs))
    assert len((engine.engine if lazy else engine).programs) == len(CALLS)
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    for args, kwargs in CALLS:
        assert torch.equal(loaded(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip": True}, "captured with height=3, and got None"),
        ({"height": 3, "sizes": [(3, 3)]}, r"captured with sizes\.0\.1=2, and got 3; compile it for that value"),
        ({"height": 3, "sizes": [(3, 2), (1, 1)]}, r"captured with sizes=\[\(3, 2\)\], and got \[\(3, 2\), \(1, 1\)\]"),
        ({"height": 3, "sizes": ((3, 2),)}, r"captured with sizes=\[\(3, 2\)\], and got \(\(3, 2\),\)"),
        ({"height": True, "sizes": [(3, 2)]}, r"captured with height=3, and got True"),
    ],
)
def test_a_message_shows_values_as_the_user_wrote_them(given, message):
    engine = compiled(Options().eval(), CALLS[:2])
    with pytest.raises(CaptureError, match=message) as caught:
        engine(x8(1, 6), **given)
    assert "container" not in str(caught.value)


class Gained(Linear):
    """Numbers that the graph can take, and one that Python decides by."""

    def forward(self, x, gain=1.0, limit=None, options=None):
        y = self.linear(x) * gain * (options["scale"] if options else 1.0)
        return y if limit is None or limit > 10 else y.clamp(max=limit)


def test_a_number_that_changes_is_an_input_where_the_graph_allows_it(tmp_path):
    model, x = Gained().eval(), x8()
    lazy = turbocompile.optimize(model, recipe=OFF)
    for gain in (0.5, 2.0, -1.0, 3):
        assert torch.allclose(lazy(x, gain=gain), model(x, gain=gain), atol=1e-6)
    assert len(lazy.engine.programs) == 1
    loaded = turbocompile.load(lazy.save(tmp_path / "engine"))
    assert torch.allclose(loaded(x, gain=0.3), model(x, gain=0.3), atol=1e-6)
    for scale in (0.5, 0.25, 0.125):  # in a container: fixed until it changes
        given = {"options": {"scale": scale}}
        assert torch.allclose(lazy(x, gain=1.5, **given), model(x, gain=1.5, **given), atol=1e-6)
    assert len(lazy.engine.programs) == 3  # one for the first value, and one for all others
    for limit in (0.1, 20.0):  # Python compares it, so that each value is a Program
        assert torch.allclose(lazy(x, 0.5, limit), model(x, 0.5, limit), atol=1e-6)
    with pytest.raises(CaptureError, match="with a number for 'gain', and got a tensor"):
        compiled(model, (x,), {"gain": 0.5})(x, gain=torch.tensor(0.5))


def test_a_bf16_model_that_computes_with_integer_timesteps_has_its_own_rounding():
    class Timed(Linear):
        def forward(self, x, timestep):
            return self.linear(x) + (timestep[:, None] * torch.arange(8).to(x.dtype) * 0.1).sin()

    model, args = Timed().eval().to(torch.bfloat16), (x8().bfloat16(), torch.tensor([997, 3]))
    engine = compiled(model, args)
    assert torch.equal(engine(*args), model(*args))


# ------------------------------------------------------------------------------------------------------- what it keeps


class Kept(Linear):
    """Every `period`-th call computes; the others give what was kept."""

    period = 2

    def __init__(self):
        super().__init__()
        self.step, self.last = 0, None

    def forward(self, x):
        if self.step % self.period == 0:
            self.last = self.linear(x)
        self.step += 1
        return x + self.last


class EveryThird(Kept):
    def forward(self, x):
        self.step += 1
        return self.linear(x) * (2.0 if self.step % 3 == 0 else 1.0)


class OfDictionary(Linear):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, x):
        if x.shape not in self.seen:
            self.seen[x.shape] = self.linear(x)
        return x + self.seen[x.shape]


def closed():
    model, step = Linear(), 0
    inner = model.forward

    def forward(x):
        nonlocal step
        step += 1
        return inner(x) * step

    model.forward = forward
    return model


STEPS = {"n": 0}


class OfFile(Linear):
    def forward(self, x):
        STEPS["n"] += 1
        return self.linear(x) * STEPS["n"]


class OfClass(Linear):
    steps = 0

    def forward(self, x):
        type(self).steps += 1
        return self.linear(x) * self.steps


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Kept, "step"),
        (EveryThird, "step"),
        (OfDictionary, "seen"),
        (closed, "step"),
        (OfFile, "STEPS"),
        (OfClass, "steps"),
    ],
)
def test_a_model_that_keeps_something_between_calls_is_refused_and_left(make, named):
    model = make().eval()
    state = dict(vars(model))
    with pytest.raises(CaptureError, match=f"(call .*than its graph.*{named}|computes the tensor)"):
        compiled(model, (x8(),))
    assert vars(model) == state
    assert STEPS == {"n": 0}
    assert OfClass.steps == 0
    for module in model.modules():
        assert not any(isinstance(t, FakeTensor) for t in vars(module).values())


class InArray(Linear):
    """A step counter in a numpy array, and one in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.steps, self.table = numpy.zeros(1), [torch.zeros(1)]

    def forward(self, x):
        self.steps += 1
        return self.linear(x) * float(self.steps[0])


class InTensor(InArray):
    def forward(self, x):
        self.table[0].add_(1)
        return self.linear(x) * self.table[0]


@pytest.mark.parametrize(
    ("make", "message"), [(InArray, "keeps something.*steps"), (InTensor, "writes to a tensor that")]
)
def test_what_is_counted_in_place_is_refused_and_put_back(make, message):
    model = make().eval()
    with pytest.raises(CaptureError, match=message):
        compiled(model, (x8(),))
    assert model.steps[0] == model.table[0] == 0


class Dropping(Linear):
    """LayerDrop: Python's random numbers decide."""

    def forward(self, x):
        return self.linear(x) if random.random() < 0.5 else x


def test_a_model_that_pythons_random_numbers_decide_for_is_refused():
    state = random.getstate()
    with pytest.raises(CaptureError, match=r"draws random numbers \(Python's random"):
        compiled(Dropping().eval(), (x8(),))
    assert random.getstate() == state


def test_a_lazy_module_is_called_first():
    with pytest.raises(CaptureError, match=r"without a shape yet \(weight\); call it once first"):
        compiled(nn.LazyLinear(8), (x8(),))


def test_a_counter_that_nothing_depends_on_is_said_and_no_more():
    class Counted(Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    model, x = Counted().eval(), x8()
    engine = compiled(model, (x,))
    assert torch.equal(engine(x), model(x))
    assert any("changes calls with each call" in w for w in engine.report.warnings)
    assert model.calls == 1


class Noisy(Linear):
    def forward(self, x):
        return self.linear(x) + torch.randn_like(x)


class AlwaysDropped(Linear):
    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5)


@pytest.mark.parametrize(("make", "named"), [(Noisy, "aten.randn_like"), (AlwaysDropped, "aten.dropout")])
def test_a_model_that_draws_random_numbers_is_refused_by_that(make, named):
    model, state = make().eval(), torch.get_rng_state()
    with pytest.raises(CaptureError, match=f"draws random numbers .{named}"):
        turbocompile.optimize(model, (torch.ones(2, 8),), recipe=OFF)
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------------- what wraps it


class Dropped(Linear):
    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


def wrapped(model):
    inner = model.forward
    model.forward = lambda *a, **k: inner(*a, **k)
    return model


def partly(model):
    model.forward = functools.partial(lambda self, f, x: f(x), model, model.forward)
    return model


def method(model):
    inner = type(model).forward
    model.forward = types.MethodType(lambda self, x: inner(self, x) + 1, model)
    return model


def child(model):
    inner = model.linear.forward
    model.linear.forward = functools.wraps(inner)(lambda x: inner(x) * 2)
    return model


def closed_hook(model):
    model.register_forward_hook(lambda m, a, out: out * model.linear.weight.sum())
    return model


def child_hook(model):
    model.linear.register_forward_pre_hook(lambda m, a: (a[0] + model.linear.bias,))
    return model


@pytest.mark.parametrize("wrap", [wrapped, partly, method, child, closed_hook, child_hook])
def test_a_wrapped_forward_stays_within_the_module(wrap):
    model = wrap(Dropped().train())
    x, hooks = x8(), [dict(m._forward_hooks) for m in model.modules()]
    engine = compiled(model, (x,))
    assert model.training
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert len(engine.state_dict()) == 2  # weights by their names, no constants
    assert torch.equal(engine(x), engine(x))
    assert torch.equal(engine(x), model.eval()(x))


def test_parameters_go_by_their_own_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Halved(Linear):
        def state_dict(self, *args, **kwargs):
            return {n: t.half() for n, t in super().state_dict(*args, **kwargs).items()}

    class Renamed(Linear):
        def named_parameters(self, *args, **kwargs):
            return ((f"model.{n}", p) for n, p in super().named_parameters(*args, **kwargs))

    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    weighed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    for model in (Halved(), Renamed(), nn.Sequential(checkpoint_wrapper(nn.Linear(8, 8))), tied, weighed):
        x = x8()
        engine = compiled(model.eval(), (x,))
        assert torch.equal(engine(x), model(x))


# ----------------------------------------------------------------------------------------------------- how it is left


@functools.lru_cache
def cached_table(n):
    return torch.arange(n).float().cos()


class Cached(Linear):
    def forward(self, x):
        return self.linear(x) * cached_table(x.shape[-1])


TABLES: dict[int, torch.Tensor] = {}


def table(n, tables=TABLES):
    if n not in tables:
        tables[n] = torch.arange(n).float().cos()
    return tables[n]


class InFile(Linear):
    def forward(self, x):
        return self.linear(x) * table(x.shape[-1])


class InClass(Linear):
    tables: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def forward(self, x):
        return self.linear(x) * table(x.shape[-1], self.tables)


class InMethod(Linear):
    @functools.cache  # noqa: B019
    def table(self, n):
        return torch.arange(n).float().cos()

    def forward(self, x):
        return self.linear(x) * self.table(x.shape[-1])


class InProperty(Linear):
    @functools.cached_property
    def table(self):
        return torch.arange(8).float().cos()

    def forward(self, x):
        return self.linear(x) * self.table


class Helper:
    __slots__ = ("table",)

    def __init__(self):
        self.table = None


class InHelper(Linear):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        if self.helper.table is None:
            self.helper.table = torch.arange(8).float().cos()
        return self.linear(x) * self.helper.table


LOCAL, CONTEXT, WEAK = threading.local(), contextvars.ContextVar("table"), weakref.WeakKeyDictionary()


class InLocal(Linear):
    def forward(self, x):
        if not hasattr(LOCAL, "table"):
            LOCAL.table = torch.arange(8).float().cos()
        return self.linear(x) * LOCAL.table


class InContext(Linear):
    def forward(self, x):
        if CONTEXT.get(None) is None:
            CONTEXT.set(torch.arange(8).float().cos())
        return self.linear(x) * CONTEXT.get()


class InWeak(Linear):
    def forward(self, x):
        if self not in WEAK:
            WEAK[self] = torch.arange(8).float().cos()
        return self.linear(x) * WEAK[self]


@pytest.mark.parametrize("make", [Cached, InFile, InClass, InMethod, InProperty, InHelper, InLocal, InContext, InWeak])
def test_tables_that_are_kept_at_the_first_call_are_real_afterwards(make):
    model, x = make().eval(), x8()
    engine = compiled(model, (x,))
    found = model(x)
    assert type(found) is torch.Tensor
    assert torch.equal(engine(x), found)
    assert torch.equal(compiled(model, (x,))(x), found)  # and with the table there


def test_transforms_are_computed_and_leave_training_as_it_was():
    class Mapped(Linear):
        def forward(self, x):
            return torch.vmap(lambda t: t.softmax(-1))(self.linear(x))

    class Twice(Linear):
        def forward(self, x):
            return torch.vmap(torch.vmap(lambda t: t.cumsum(0) @ t))(self.linear(x)[None])

    class Tangent(Linear):
        def forward(self, x):
            return torch.func.jvp(lambda t: self.linear(t).sin(), (x,), (torch.ones_like(x),))[1]

    for model in (Mapped(), Twice(), Tangent()):
        x = x8()
        engine = compiled(model.eval().requires_grad_(False), (x,))
        assert torch.allclose(engine(x), model(x), atol=1e-6)
    model = nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    assert model.weight.grad is not None


def test_a_transform_that_cannot_be_captured_is_refused_and_training_goes_on():
    class Gradient(Linear):
        def forward(self, x):
            return torch.func.grad(lambda t: self.linear(t).sin().sum())(x)

    model = Gradient().eval()
    try:
        assert torch.allclose(compiled(model, (x8(),))(x := x8()), model(x), atol=1e-6)
    except CaptureError as error:
        assert "cannot be captured" in str(error)  # noqa: PT017
    nn.Linear(2, 2)(torch.ones(2)).sum().backward()


def settings():
    loggers = [logging.getLogger(n).level for n in ("torch", "torch.export", "")]
    flags = torch.is_grad_enabled(), torch.compiler.is_exporting(), torch.compiler.is_compiling()
    modes = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()
    return loggers, flags, modes, sys.stderr, warnings.filters[:], torch.get_rng_state().tolist()


class Unruly(Linear):
    def forward(self, x):
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(3)
        if float(x.sum()) > 1e9:
            return x
        return self.linear(x)


def test_a_build_that_fails_leaves_the_process_and_the_model_as_they_were():
    model, x = Unruly().train(), x8()
    parameters, state, before = list(model.parameters()), dict(vars(model)), settings()
    with pytest.raises(CaptureError, match="decides by a tensor's value"):
        turbocompile.optimize(model, (x,), recipe=OFF)
    assert settings() == before
    assert vars(model) == state
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


def test_threads_compile_one_after_the_other():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).eval().requires_grad_(False)
    inputs = [x8(n) for n in (1, 2, 3, 4)]
    engine, before = turbocompile.optimize(model, recipe=OFF), settings()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, inputs))
    assert settings() == before
    for x, y in zip(inputs, found, strict=True):
        assert torch.allclose(y, model(x), atol=1e-6)
    assert len(engine.engine.programs) == 4


def test_threads_that_fail_and_threads_that_run_do_not_meet():
    good, bad = Cached().eval(), Unruly().eval()
    ready, x = compiled(Linear().eval(), (x8(),)), x8()
    expected, before = ready(x), settings()

    def build(model):
        try:
            return turbocompile.optimize(model, (x,), recipe=OFF)(x)
        except CaptureError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        built = [pool.submit(build, model) for model in (good, bad, good, bad)]
        ran = [pool.submit(ready, x) for _ in range(20)]
    assert settings() == before
    assert all(torch.equal(r.result(), expected) for r in ran)
    found = [b.result() for b in built]
    assert torch.equal(found[0], good(x))
    assert torch.equal(found[2], found[0])
    assert all("decides by a tensor's value" in f for f in (found[1], found[3]))


def test_state_is_named_and_put_back():
    model = Kept()
    model.helper, model.list = Helper(), [1, 2]
    state = State(model=model)
    model.step, model.helper.table, model.more = 5, 3, 1
    model.list.append(3)
    STEPS["n"] = 4
    assert {"model.step", "model.more", "model.list", "model.helper.table"} <= set(state.changed())
    state.restore()
    assert (model.step, model.helper.table, model.list) == (0, None, [1, 2])
    assert not hasattr(model, "more")
    assert not state.changed()
    STEPS["n"] = 0


# ------------------------------------------------------------------------------------------- what goes wrong at capture


def test_a_graph_that_is_not_the_module_is_refused_in_a_sentence(monkeypatch):
    """Whatever is wrong in a capture is on both sides of every later comparison."""
    right = capturing._operation

    def wrong(graph, node, env):
        made = right(graph, node, env)
        if made is not None and made.target is torch.ops.aten.sin.default:
            made.target = torch.ops.aten.cos.default
        return made

    class Waved(Linear):
        def forward(self, x):
            return self.linear(x).sin()

    monkeypatch.setattr(capturing, "_operation", wrong)
    with pytest.raises(CaptureError, match=r"Waved gives another result at its first call than its graph \(off by"):
        turbocompile.optimize(Waved().eval(), (x8(),), recipe=OFF)
    engine = turbocompile.optimize(Waved().eval(), (x8(),), recipe={**OFF, "verify": "off"})
    assert not engine.report.compared


def test_a_module_that_the_build_changes_is_said(monkeypatch):
    model = Linear().eval()

    def spoils(*args):
        with torch.no_grad():
            model.linear.weight.mul_(2.0)
        return measured(*args)

    monkeypatch.setattr(from_module, "measured", spoils)
    with pytest.raises(VerificationError, match="another result after the build than before"):
        compiled(model, (x8(),))


class Heavy(Linear):
    def __init__(self, failing):
        super().__init__()
        self.failing = failing

    def forward(self, x):
        if not torch.compiler.is_exporting():
            self.failing -= 1
            if self.failing == 0:
                raise torch.OutOfMemoryError("no room")
        return self.linear(x)


def test_a_module_that_has_no_room_to_run_is_compiled_and_said_not_to_be_compared():
    engine = compiled(Heavy(1).eval(), (x8(),))
    assert engine.report.compared == "not compared: the module needs more memory than there is"
    assert any("was not compared with Heavy itself" in w for w in engine.report.warnings)
    assert "calls of the module are those of its graph" in compiled(Heavy(2).eval(), (x8(),)).report.compared


def test_the_report_says_how_the_graph_stands_beside_the_module():
    engine = compiled(Linear().eval(), (x8(),))
    assert engine.report.compared.startswith("2 calls of the module are those of its graph (largest difference ")
    assert "the model itself" in repr(engine.report)


# ------------------------------------------------------------------------------------------------------------ around it


def test_a_default_device_is_the_modules_alone():
    """A build makes tensors of its own; on the meta device it could compare nothing."""

    class Made(Linear):
        def forward(self, x):
            return self.linear(x) * torch.ones(8, device=x.device) + torch.zeros(8, device=x.device)

    model, x = Made().eval(), x8()
    with torch.device("meta"):
        engine = compiled(model, (x,), recipe=None)
        found = engine(x)
    assert torch.allclose(found, model(x), atol=1e-6)
    assert engine.report.compared.startswith("2 calls")


class Copying(Linear):
    def forward(self, x, t):
        y = torch.tensor(t)
        y += 1
        return self.linear(x) * y + torch.as_tensor(t)


def test_a_tensor_made_of_a_tensor_is_a_copy():
    model, args = Copying().eval(), (x8(), torch.tensor(2.0))
    engine = compiled(model, args)
    assert torch.equal(engine(*args), model(*args))
    assert args[1] == 2.0


@dataclasses.dataclass
class Config:
    depth: int = 2


CONFIGS = [
    Config(),
    argparse.Namespace(depth=2),
    {"depth": 2},
    types.SimpleNamespace(depth=2),
    Size(2, 3),
    "two",
    None,
    7,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_configuration_may_be_anything(config, tmp_path):
    model, x = Linear().eval(), x8()
    model.config = config
    engine = compiled(model, (x,))
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    assert torch.equal(loaded(x), model(x))
    if hasattr(config, "depth") and config is not Config:
        assert engine.config.depth == loaded.config.depth == 2


def test_a_configuration_of_transformers_is_its_dictionary():
    from transformers import PretrainedConfig

    model = Linear().eval()
    model.config = PretrainedConfig(depth=2)
    assert compiled(model, (x8(),)).config["depth"] == 2


def test_the_default_dtype_of_the_process_does_not_matter(tmp_path):
    class Made(Linear):
        def forward(self, x, n):
            scale = torch.scalar_tensor(0.25) + torch.ones(8) + torch.linspace(0, 1, 8) + torch.arange(8) * 0.5
            y = self.linear(x) * scale + (n / 3)[:, None] + n.sin()[:, None] + torch.full((8,), 0.1)
            return torch.where(x > 0, y, torch.where(n[:, None] > 2, 0.5, -1.0)) + (n > 2)[:, None] * 0.3

    model, args = Made().eval(), (x8(), torch.tensor([2, 3]))
    engine = compiled(model, args, recipe=None)
    expected = model(*args)
    engine.save(tmp_path / "engine")
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(engine(*args), expected.float())
            assert torch.equal(turbocompile.load(tmp_path / "engine")(*args), engine(*args))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.allclose(engine(*args), expected, atol=1e-6)


def test_a_lazy_engine_stands_for_its_module():
    class Configured(Linear):
        config = types.SimpleNamespace(in_channels=8)
        device = torch.device("cpu")

        @property
        def dtype(self):
            return self.linear.weight.dtype

    model = Configured().eval()
    lazy = turbocompile.optimize(model, recipe=OFF)
    assert lazy.config.in_channels == 8
    assert lazy.dtype == torch.float32
    assert lazy.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        lazy.nothing_of_that_name  # noqa: B018
    x = x8()
    lazy(x)
    lazy.to(torch.float64)
    assert torch.equal(lazy(x.double()), model(x.double()))
    assert next(lazy.parameters()).dtype == torch.float64
