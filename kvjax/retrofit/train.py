"""The training loop of a retrofit.

What a step does is a function of the arguments, the step and the weights alone, and every few steps weights and the
optimiser's state are written. A run that was killed and started again with the same command ends with the same
weights, bit for bit on the same machine.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from kvjax.checkpoint import hf, orbax, shipped
from kvjax.checkpoint.identity import fingerprint
from kvjax.errors import InputError
from kvjax.generation.model import load, load_from
from kvjax.parallel import mesh
from kvjax.parallel.collectives import DATA
from kvjax.retrofit import data, objective, weights
from kvjax.retrofit.data import DocumentStream
from kvjax.retrofit.objective import Losses, PackedBatch, Relax
from kvjax.retrofit.options import Options
from kvjax.retrofit.schedule import Schedule
from kvjax.retrofit.weights import Params
from kvjax.spec import GateSpec, ModelSpec
from kvjax.training import runs

RUN = "run"  # folder of the run, in that of the checkpoint
MEASURED = 16  # sequences that a checkpoint's rate is measured on
CLOSE = 1.01  # a measured rate is the target's up to so much
LARGEST_STEP = 1e4  # of a gate's offset


class TrainState(NamedTuple):
    """What a step changes."""

    params: Params
    opt: optax.OptState


class Progress(NamedTuple):
    """What is shown and logged after some steps; means over them."""

    step: int
    stage: str
    target: float  # tokens per slot
    rate: float  # of the decisions that were made, with noise
    loss: float
    text: float
    penalty: float
    tokens: int  # read by then
    seconds: float  # of these steps


def optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW with clipping for a learning rate of 1: steps are scaled by theirs."""
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    adam = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=options.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(options.clip), adam)


class Step:
    """The compiled update; one program while the coordinate fades, one for what follows."""

    def __init__(self, options: Options, source: ModelSpec, teacher: tuple[ModelSpec, Params] | None):
        self._options, self._source = options, source
        self._teacher, self._base = (source, None) if teacher is None else teacher
        self.gated = dataclasses.replace(source, gate=options.gate)
        self.optimize = optimizer(options)
        self._run = jax.jit(self._update, static_argnames="fading", donate_argnames=("params", "opt"))
        self._merged = jax.jit(self._measure, static_argnames="spec")

    def __call__(self, state: TrainState, batch: PackedBatch, step: int) -> tuple[TrainState, Losses]:
        """One step."""
        schedule = self._options.schedule
        numbers = (schedule.target(step), schedule.learning_rate(step), schedule.keep(step))
        key = jax.random.fold_in(jax.random.key(self._options.seed), step)
        fading = schedule.stage(step)[0] == "fade"
        with mesh.on(mesh.of(state.params)):
            params, opt, losses = self._run(
                state.params, state.opt, self._base, batch, key, *map(np.float32, numbers), fading=fading
            )
        return TrainState(params, opt), losses

    def _update(
        self, params: Params, opt: Any, base: Params | None, batch: PackedBatch, key: Array, target: Array,
        learning_rate: Array, keep: Array, *, fading: bool,
    ) -> tuple[Params, Any, Losses]:  # fmt: skip
        options, gate = self._options, self._options.gate
        names = [name for name in params if fading or weights.trained(name, gate)]
        frozen = {name: leaf for name, leaf in params.items() if name not in names}
        teacher = None if base is None else weights.to_model(base, self._teacher, options.dtype)

        def loss(trained: Params, batch: PackedBatch, key: Array) -> tuple[Array, Losses]:
            spec = self._source if fading else self.gated
            model = weights.to_model(frozen | trained, spec, options.dtype)
            relax = Relax(key, options.temperature)
            found = objective.losses(
                model, batch, target, relax, base=teacher, weight=options.penalty, remat=options.remat,
                fading=(gate, keep) if fading else None, kernels=options.kernels,
            )  # fmt: skip
            return found.total, found

        trained = {name: params[name] for name in names}
        some = lambda x: x.reshape(-1, options.together, *x.shape[1:])
        batches = mesh.constrain(jax.tree.map(some, batch), mesh.STEPS)
        keys = jax.random.split(key, batches.ids.shape[0])

        def add(total: Any, one: tuple[PackedBatch, Array]) -> tuple[Any, None]:
            (_, found), grads = jax.value_and_grad(loss, has_aux=True)(trained, *one)
            return jax.tree.map(jnp.add, total, (grads, found)), None

        shapes = jax.eval_shape(
            jax.value_and_grad(loss, has_aux=True), trained, jax.tree.map(lambda x: x[0], batches), key
        )
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[1], shapes[0][1]))
        total, _ = jax.lax.scan(add, zero, (batches, keys))
        grads, found = jax.tree.map(lambda x: x / batches.ids.shape[0], total)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt = self.optimize.update(grads, opt, trained)
        trained = jax.tree.map(jnp.add, trained, jax.tree.map(lambda x: learning_rate * x, updates))
        trained = {name: mesh.constrain(leaf, mesh.weight_spec(name, leaf.shape)) for name, leaf in trained.items()}
        return frozen | trained, opt, found

    def measure(self, params: Params, batches: Sequence[PackedBatch], offset: float) -> Float[np.ndarray, "L K"]:
        """Share of the tokens that take no slot of their own, without noise."""
        spec = dataclasses.replace(self.gated, gate=dataclasses.replace(self._options.gate, offset=offset))
        with mesh.on(mesh.of(params)):
            return np.mean([mesh.read(self._merged(params, batch, spec=spec)) for batch in batches], axis=0)

    def _measure(self, params: Params, batch: PackedBatch, *, spec: ModelSpec) -> Array:
        return objective.run(weights.to_model(params, spec, self._options.dtype), batch, None)[1].mean(axis=1)

    def begin(self, state: TrainState, step: int) -> TrainState:
        """The state with which a step begins: in the first of a stage the optimiser starts anew, and gates are made."""
        schedule = self._options.schedule
        if not schedule.begins(step):
            return state
        params = state.params
        if step == schedule.fade and self._source.gate is None:
            params = weights.begin_gates(params, self.gated)
        fading = schedule.stage(step)[0] == "fade"
        names = [name for name in params if fading or weights.trained(name, self._options.gate)]
        return TrainState(params, self.optimize.init({name: params[name] for name in names}))


def retrofit(options: Options, out: Path, show: Callable[[Progress, int], None] = lambda progress, steps: None) -> bool:
    """Retrofit a model into the folder `out`.

    Args:
      options: how.
      out: becomes a converted checkpoint; `out/run` holds the log and what is needed to continue, `out/rate...` the
        checkpoints that were asked for on the way.
      show: called every few steps with the progress and the steps in all.

    Returns:
      Whether it is complete; it is not when `options.minutes` were over.
    """
    options, source, spec, stream, src = _prepare(options)
    if out.resolve() == src.resolve():
        raise InputError(f"{out} is the model itself: choose another --out")
    schedule = options.schedule
    step = Step(options, spec, teacher(options, spec, source))
    given = options.identity() | {"data": stream.fingerprint, "weights": _fingerprints(options, src)}
    began = time.monotonic()
    with runs.begin(out / RUN, given, options.save_every, options.keep) as run:
        state, done = _resume(run, step, source, schedule)
        del source
        _check_exports(out, options, done)
        over = done == schedule.steps
        while not over:
            end = min((done // options.log_every + 1) * options.log_every, schedule.steps)
            block, since = range(done, end), time.monotonic()
            pending: list[Losses] = []
            for index in block:
                batch = data.batch(stream, options.seed, index, options.rows, options.length)
                state, losses = step(step.begin(state, index), batch, index)
                pending.append(losses)
                for rate in options.export:
                    if schedule.passes(index, rate):
                        runs.check_finite(run, index + 1, float(losses.total), state.params)
                        passed = dataclasses.replace(options.gate, rate=rate)
                        _export(out / f"rate{rate:g}", src, options, passed, step, state.params, stream)
            done = block.stop
            progress, merged = _summary(pending, done, options, since)
            over = done == schedule.steps or time.monotonic() - began >= 60 * options.minutes
            runs.record(run, progress._asdict() | {"merged": merged}, state, force=over)
            show(progress, schedule.steps)
        if done == schedule.steps:
            run.checkpoints.wait_until_finished()
            _export(out, src, options, options.gate, step, state.params, stream, into=True)
    return done == schedule.steps


def _prepare(options: Options) -> tuple[Options, Params, ModelSpec, DocumentStream, Path]:
    """The options, with the rate that the model has; its weights and shape, the data, and where the model came from."""
    model, src = load_from(options.model, dtype=jnp.float32, ignore_config=options.ignore, mesh=options.mesh)
    spec, gate = model.spec, options.gate
    if spec.gate is not None:
        options = continued(options, spec.gate, model.name)
    if spec.latent is not None:
        raise InputError(f"{model.name} has low-rank keys, which a gate of each head cannot merge or evict")
    if spec.weights is not None:
        raise InputError(f"{model.name} has weights in {spec.weights}: retrofit what they were made of")
    if spec.experts is not None:
        raise InputError(f"{model.name} has experts: retrofitting is for models whose layers have one MLP")
    if gate.neuron is not None and not -spec.head_dim <= gate.neuron < spec.head_dim:
        raise InputError(f"--neuron {gate.neuron}: heads of {model.name} have {spec.head_dim} coordinates")
    if options.together % mesh.shape_of(model.decoder)[DATA]:
        raise InputError(f"--micro-batch {options.together} cannot be split over the devices of --mesh {options.mesh}")
    if options.length > spec.max_position:
        raise InputError(f"--length {options.length} is more than the context limit ({spec.max_position})")
    stream = data.read(options.files, model, options.length)
    return options, weights.of_model(model.decoder), spec, stream, src


def _fingerprints(options: Options, src: Path) -> list[str]:
    """What tells the model, and a teacher that is another one, from others of their names."""
    name = shipped.find(options.teacher)
    others = [] if options.teacher is None else [Path(name) if orbax.is_orbax(Path(name)) else hf.resolve(str(name))]
    return [fingerprint(path) for path in (src, *others)]


def teacher(options: Options, spec: ModelSpec, source: Params) -> tuple[ModelSpec, Params] | None:
    """The model to be like, with weights of its own: those of the source are changed."""
    if not options.distill:
        return None
    if options.teacher is not None:
        model = load(options.teacher, dtype=jnp.float32, ignore_config=options.ignore, mesh=options.mesh)
        if model.spec.vocab_size != spec.vocab_size:
            raise InputError(
                f"--teacher {model.name} has {model.spec.vocab_size} tokens, the model {spec.vocab_size}: their"
                " vocabularies must be the same"
            )
        if model.spec.latent is not None:
            raise InputError(f"--teacher {model.name} has low-rank keys: give what it was made from")
        if model.spec.sinks:
            raise InputError(f"--teacher {model.name} has attention sinks, which retrofitting does not read")
        spec, source = model.spec, weights.of_model(model.decoder)
    return spec, {path: leaf.astype(options.dtype, copy=True) for path, leaf in source.items()}


def continued(options: Options, gate: GateSpec, name: str) -> Options:
    """The options for a model that is retrofitted already: it keeps its gate, and its rate grows from where it is."""
    for field in ("objective", "window", "neuron", "scale"):
        asked, found = getattr(options.gate, field), getattr(gate, field)
        if asked != found:
            raise InputError(f"{name} is retrofitted already, with {field} {found}, not {asked}: they must agree")
    if options.schedule.fade:
        raise InputError(f"{name} is retrofitted already, nothing is left to fade: give --fade-steps 0")
    least = min((options.gate.rate, *options.export))
    if least <= gate.rate:
        raise InputError(f"{name} has a rate of {gate.rate:g} already: ask for more than {least:g}")
    goes_on = dataclasses.replace(options.gate, offset=gate.offset)
    return dataclasses.replace(options, gate=goes_on, schedule=options.schedule._replace(start=gate.rate))


def _resume(run: runs.Run, step: Step, source: Params, schedule: Schedule) -> tuple[TrainState, int]:
    """The state of the newest checkpoint, or the first one."""
    state, done = TrainState(source, ()), run.checkpoints.latest_step() or 0
    if done:  # shapes only: the optimiser's state is twice as large as the weights
        state = jax.eval_shape(lambda params: step.begin(TrainState(params, ()), 0), source)
    if done > schedule.fade:
        state = jax.eval_shape(lambda state: step.begin(state, schedule.fade), state)
    one, where = jax.sharding.SingleDeviceSharding(jax.devices()[0]), mesh.of(source)

    def placed(path: Any, x: Any) -> Any:
        """The optimiser's state lies where the weight of the same name does."""
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        return x.update(sharding=one if where is None else mesh.weight(name, x.shape, where))

    return runs.resume(run, jax.tree.map_with_path(placed, state))


def _check_exports(out: Path, options: Options, done: int) -> None:
    """Raise `InputError` if a checkpoint that is to be written stands there already, or can no longer be made."""
    for rate in options.export:
        exists = orbax.is_orbax(out / f"rate{rate:g}")
        if exists and not done:
            raise InputError(f"{out / f'rate{rate:g}'} is of another run: remove it or choose another --out")
        if not exists and done and options.schedule.target(done) >= rate:
            raise InputError(f"--export {rate:g}: the run has passed that rate")
    if orbax.is_orbax(out) and done < options.schedule.steps:
        raise InputError(f"{out} is a checkpoint already: remove it or choose another --out")


def _summary(pending: Sequence[Losses], done: int, options: Options, since: float) -> tuple[Progress, list]:
    found = jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0, dtype=np.float64), *pending)
    stage, schedule = options.schedule.stage(done - 1)[0], options.schedule
    progress = Progress(
        step=done,
        stage=stage,
        target=round(schedule.target(done - 1), 4),
        rate=round(1 / max(1 - float(found.merged.mean()), 1e-6), 4),
        loss=round(float(found.total), 5),
        text=round(float(found.text), 5),
        penalty=round(float(found.penalty), 5),
        tokens=done * options.rows * options.length,
        seconds=round(time.monotonic() - since, 2),
    )
    return progress, np.round(found.merged, 3).tolist()


def _rate(merged: Float[np.ndarray, "L K"]) -> float:
    """Tokens per slot."""
    return 1 / max(1 - float(merged.mean()), 1e-6)


def calibrated(
    measure: Callable[[float], Float[np.ndarray, "L K"]], gate: GateSpec
) -> tuple[float, Float[np.ndarray, "L K"]]:
    """The gate's offset, larger where its rate without noise is above the target, and what is merged with it.

    Training decides with noise and never punishes a rate that is too high. One that is too low stays as it is.

    Args:
      measure: `offset -> merged`, as in `Step.measure`.
      gate: as it was trained, with the target.
    """
    offset, step, merged = gate.offset, max(abs(gate.offset), 1.0) / 16, measure(gate.offset)
    low = high = offset
    while _rate(merged) > CLOSE * gate.rate and step < LARGEST_STEP:  # until it is on the other side
        low, high, step = high, high + step, 2 * step
        offset, merged = high, measure(high)
    while _rate(merged) < gate.rate / CLOSE and high - low > 1e-3 and high > gate.offset:
        middle = (low + high) / 2
        found = measure(middle)
        if _rate(found) > CLOSE * gate.rate:
            low = middle
        else:
            high = offset = middle
            merged = found
    return offset, merged


def _export(
    dst: Path, src: Path, options: Options, gate: GateSpec, step: Step, params: Params, stream: DocumentStream, *,
    into: bool = False,
) -> None:  # fmt: skip
    """Write a checkpoint that `generate` can use; `gate.rate` is the target."""
    mesh.meet(f"before {dst}")  # so that all see the same
    if orbax.is_orbax(dst):
        return
    count = -(-MEASURED // options.together)
    batches = [data.batch(stream, options.seed + 1, i, options.together, options.length) for i in range(count)]
    offset, merged = calibrated(lambda offset: step.measure(params, batches, offset), gate)
    gate = dataclasses.replace(gate, rate=round(_rate(merged), 3), offset=round(offset, 4))
    spec = dataclasses.replace(step.gated, gate=gate)
    about = weights.about(src.name, {*options.ignore, *orbax.ignored(src)}, spec, options.dtype, merged)
    save = orbax.save_into if into else orbax.save
    save(dst, src, weights.parts(params, spec, options.dtype), about)
    mesh.meet(f"after {dst}")
