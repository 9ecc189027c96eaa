"""Adapters (LoRA) in the weights of a model: what each file adds to which tensor, and the sums.

    W + scale * b @ a                       LoRA; scale = weight * alpha / rank
    m * V / |V|,  V = W + scale * b @ a     DoRA
    W + weight * diff                       differences of weights, biases, norms and modulations
    value                                   set_weight

Several adapters add up, each relative to the weight without any. `LoraTensors` gives the sums as the tensors of a
checkpoint, so that whatever reads them (quantizing, verifying, the eager model) knows nothing of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from turbocompile.errors import EngineError, RecipeError
from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.weights import AddDiff, AddLora, Cast, Dora, Expr, Load, Reshape
from turbocompile.recipe.schema import LoraSpec
from turbocompile.wan.lora_branch import BranchTensors, Factors
from turbocompile.wan.lora_file import LoraFile, count, listed, number, open_lora
from turbocompile.wan.lora_keys import HIGH, LOW, Names
from turbocompile.wan.transformer import TransformerSource

EXPERTS = {HIGH: "transformer", LOW: "transformer_2"}
Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor.

    kind: "lora" (leaves: a (rank, columns) and b (rows, rank)), "dora" (a, b and the magnitude, (rows, 1) or
    (1, columns)), "diff" or "set" (the value, whose axes of one element may be left out). scale: of b @ a, or of the
    difference. share: how much of what a DoRA makes of the weight is taken; with 1 all of it. beside: it stays beside
    its linear (lora_branch.py).
    """

    kind: str
    leaves: tuple[Expr, ...]
    scale: float = 1.0
    share: float = 1.0
    beside: bool = False


@dataclass(frozen=True)
class Changes:
    """What some adapters do to one model: tensor -> changes. leaves: the source of the tensors that these read."""

    of: Mapping[str, Sequence[Change]]
    leaves: TensorSource

    def apart(self) -> tuple[Changes, dict[str, list[Factors]]]:
        """The changes of weights, and the factors that stay beside their linears, by the linears' names."""
        inside = {name: [c for c in changes if not c.beside] for name, changes in self.of.items()}
        beside = {
            name.rpartition(".")[0]: [(c.leaves[0], c.leaves[1], c.scale) for c in changes if c.beside]
            for name, changes in self.of.items()
            if any(c.beside for c in changes)
        }
        return Changes({name: changes for name, changes in inside.items() if changes}, self.leaves), beside

    def expression(self, name: str, weight: Expr) -> Expr:
        """The tensor `name` with all that is added to it. weight: the tensor itself, in float32 or wider."""
        changes = self.of[name]
        base = next((_as(c.leaves[0], weight) for c in changes if c.kind == "set"), weight)
        factors = any(c.kind in ("lora", "dora") for c in changes)
        flat = base if not factors or len(base.shape) == 2 else Reshape(base, (base.shape[0], _columns(base.shape)))
        total: Expr = flat
        others = [c for c in changes if c.kind != "set"]
        for change in others:
            total = _added(total, flat, change, alone=len(others) == 1)
        return total if total.shape == weight.shape else Reshape(total, weight.shape)


def _as(leaf: Expr, weight: Expr) -> Expr:
    """A leaf in the shape and dtype of a weight."""
    shaped = leaf if leaf.shape == weight.shape else Reshape(leaf, weight.shape)
    return shaped if shaped.dtype == weight.dtype else Cast(shaped, weight.dtype)


def _columns(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _flat(leaf: Expr) -> Expr:
    return leaf if len(leaf.shape) == 2 else Reshape(leaf, (leaf.shape[0], _columns(leaf.shape)))


def _added(total: Expr, flat: Expr, change: Change, alone: bool) -> Expr:
    """The sum so far with one more change. flat: the weight without any."""
    if change.kind == "diff":
        return AddDiff(total, _as(change.leaves[0], flat), change.scale)
    if change.kind == "lora":
        a, b = change.leaves
        return AddLora(total, a, b, change.scale)
    a, b, magnitude = change.leaves
    made = Dora(flat, a, b, magnitude, change.scale)
    if alone and change.share == 1.0:
        return made
    return AddDiff(AddDiff(total, made, change.share), flat, -change.share)


class LoraTensors:
    """A checkpoint with adapters in its tensors. A sum is computed and given in float32, of float64 in float64.

    stored: how the checkpoint stores the quantized weights that no adapter changes.
    """

    def __init__(self, tensors: TensorSource, changes: Changes) -> None:
        self._tensors, self._changes = tensors, changes
        stored = getattr(tensors, "stored", {})  # in 8 bits, which no longer hold for what is changed
        self.stored = {name: how for name, how in stored.items() if name not in changes.of}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> Spec:
        shape, dtype = self._tensors.spec(name)
        return shape, torch.promote_types(dtype, torch.float32) if name in self._changes.of else dtype

    def get(self, name: str) -> torch.Tensor:
        if name not in self._changes.of:
            return self._tensors.get(name)
        shape, dtype = self.spec(name)
        joined = Joined(self._tensors, self._changes.leaves)
        return Evaluator(joined, {})(self._changes.expression(name, Load(name, shape, dtype)))


@dataclass(frozen=True)
class Joined:
    """The tensors of a checkpoint, and those of adapters, whose names begin with LEAF."""

    tensors: TensorSource
    leaves: TensorSource

    def keys(self) -> Iterable[str]:
        return [*self.tensors.keys(), *self.leaves.keys()]

    def spec(self, name: str) -> Spec:
        return (self.leaves if name.startswith(LEAF) else self.tensors).spec(name)

    def get(self, name: str) -> torch.Tensor:
        return (self.leaves if name.startswith(LEAF) else self.tensors).get(name)


LEAF = "lora:"  # the start of the names of adapters' tensors: lora:<number of the file>:<key>


class Leaves:
    """The tensors of some LoRA files, by `leaf_name`."""

    def __init__(self, files: Sequence[LoraFile]) -> None:
        self._files = files

    def keys(self) -> Iterable[str]:
        return [leaf_name(i, key) for i, file in enumerate(self._files) for key in file.tensors.keys()]  # noqa: SIM118

    def _of(self, name: str) -> tuple[TensorSource, str]:
        index, _, key = name.removeprefix(LEAF).partition(":")
        return self._files[int(index)].tensors, key

    def spec(self, name: str) -> Spec:
        tensors, key = self._of(name)
        return tensors.spec(key)

    def get(self, name: str) -> torch.Tensor:
        tensors, key = self._of(name)
        return tensors.get(key)


def leaf_name(file: int, key: str) -> str:
    """The name of a LoRA's tensor in an expression."""
    return f"{LEAF}{file}:{key}"


def changes_of(specs: Sequence[LoraSpec], models: Mapping[str, Mapping[str, Spec]]) -> dict[str, Changes]:
    """What the adapters do to each of the models that they change.

    models: "transformer" (and "transformer_2") -> its tensors' shapes and dtypes by name. A LoRA of weight 0 changes
    nothing. Raises RecipeError, UnsupportedError and EngineError, which list the keys that match no tensor and those of
    another shape.
    """
    files = [open_lora(spec.path) for spec in specs]
    leaves = Leaves(files)
    found: dict[str, dict[str, list[Change]]] = {name: {} for name in models}
    names = {name: Names(specs) for name, specs in models.items()}
    for index, (spec, file) in enumerate(zip(specs, files, strict=True)):
        for model in _models_of(spec, file, models):
            reader = _Reader(index, spec, file, models[model], names[model])
            for tensor, change in reader.changes(next(e for e, m in EXPERTS.items() if m == model)):
                if spec.weight != 0.0:
                    _take(found[model].setdefault(tensor, []), change, tensor, file.where)
    return {name: Changes(changes, leaves) for name, changes in found.items() if changes}


def _take(known: list[Change], change: Change, tensor: str, where: str) -> None:
    if change.kind == "set" and any(c.kind == "set" for c in known):
        raise EngineError(f"{where}: replaces {tensor} (set_weight), which another LoRA replaces too; keep one of them")
    known.append(change)


def _models_of(spec: LoraSpec, file: LoraFile, models: Mapping[str, object]) -> list[str]:
    """The names of the models that a LoRA is for."""
    wanted = [HIGH, LOW] if spec.expert == "both" else [spec.expert]
    held = {expert for expert, _ in file.modules}
    if spec.expert != "both" and EXPERTS[spec.expert] not in models:
        raise RecipeError(
            f"lora: {spec.path} is for the {spec.expert}-noise expert, and the model has one transformer; leave expert "
            "out"
        )
    if None not in held:
        wanted = [expert for expert in wanted if expert in held]
        lacking = next((e for e in wanted if EXPERTS[e] not in models), None)
        if lacking is not None or not wanted:
            has = " and ".join(sorted(str(e) for e in held))
            raise RecipeError(
                f"lora: {file.where} holds a LoRA for the {has}-noise expert, which does not fit "
                + (f"expert: {spec.expert}" if not wanted else f"a model without {EXPERTS[lacking or LOW]}")
                + "; `expert: high` or `expert: low` takes the one of that expert"
            )
    return [EXPERTS[expert] for expert in wanted if EXPERTS[expert] in models]


class _Reader:
    """Reads what one LoRA does to one model. Collects everything that is wrong before it raises."""

    def __init__(self, index: int, spec: LoraSpec, file: LoraFile, specs: Mapping[str, Spec], names: Names) -> None:
        self.index, self.weight, self.file, self.specs, self.names = index, spec.weight, file, specs, names
        self.branch = spec.mode == "branch"
        self.unknown: list[str] = []
        self.wrong: list[str] = []

    def changes(self, expert: str) -> list[tuple[str, Change]]:
        """(tensor, change) of all modules of an expert."""
        found: list[tuple[str, Change]] = []
        for (of, path), parts in self.file.modules.items():
            if of in (None, expert):
                found += self._module(path, dict(parts), of)
        where = self.file.where
        if self.unknown:
            raise EngineError(
                f"{where}: no tensor of the model matches {count(self.unknown, 'key')} of this LoRA, so it is of "
                f"another model: {listed(self.unknown)}"
            )
        if self.wrong:
            raise EngineError(f"{where}: this LoRA does not fit the model: {'; '.join(_some(self.wrong))}")
        return found

    def _load(self, key: str) -> Load:
        shape, dtype = self.file.tensors.spec(key)
        if not dtype.is_floating_point:
            self.wrong.append(f"{key} holds whole numbers ({dtype})")
        return Load(leaf_name(self.index, key), shape, dtype)

    def _module(self, path: str, parts: dict[str, str], of: str | None) -> list[tuple[str, Change]]:
        targets = {part: self.names.find(path, part) for part in parts}
        lost = [key for part, key in parts.items() if targets[part] is None]
        if lost:
            self.unknown += lost
            return []
        found = self._low_rank(path, parts, targets["down"] or "", of) if "down" in parts and "up" in parts else []
        left = {"down", "up", "alpha", "magnitude", "dora_scale", "up_bias"} & parts.keys() if not found else set()
        if left and not ("down" in parts and "up" in parts):
            self.wrong.append(
                f"{parts[min(left)]} is a part of a LoRA whose other parts (lora_A and lora_B) are missing"
            )
        for part in ("diff", "diff_b", "diff_m", "set", "set_b"):
            if part in parts:
                kind = "set" if part.startswith("set") else "diff"
                change = Change(kind, (self._load(parts[part]),), self.weight)
                found += self._fitting(parts[part], str(targets[part]), change)
        return found

    def _fitting(self, key: str, target: str, change: Change) -> list[tuple[str, Change]]:
        """The change of a whole tensor, where its shape fits; axes of one element may be left out."""
        has, wants = self.file.tensors.spec(key)[0], self.specs[target][0]
        same = [n for n in has if n != 1] == [n for n in wants if n != 1]
        linear = wants[:1] == has[:1] and len(has) == 2 and math.prod(has) == math.prod(wants)
        if not (same or linear):
            self.wrong.append(f"{key} has the shape {list(has)}, and {target} {list(wants)}")
            return []
        return [(target, change)]

    def _low_rank(self, path: str, parts: dict[str, str], target: str, of: str | None) -> list[tuple[str, Change]]:
        """LoRA or DoRA of a weight, and of its bias."""
        a, b = self._load(parts["down"]), self._load(parts["up"])
        wants, paths = self.specs[target][0], (path, target.rpartition(".")[0])
        rank, config = a.shape[0] if a.shape else 0, self.file.config(of)
        said = config.said_rank(paths)
        problem = None
        if len(a.shape) < 2 or len(b.shape) < 2 or _columns(b.shape) != rank:
            problem = f"the ranks of {parts['down']} {list(a.shape)} and {parts['up']} {list(b.shape)} differ"
        elif len(wants) < 2 or (b.shape[0], _columns(a.shape)) != (wants[0], _columns(wants)):
            problem = (
                f"{parts['up']} {list(b.shape)} and {parts['down']} {list(a.shape)} make no {target} {list(wants)}"
            )
        elif said is not None and said != rank:
            problem = f"{parts['down']} has the rank {rank}, and the configuration says {said}"
        if problem is not None:
            self.wrong.append(problem)
            return []
        scale = config.scale(paths, rank)
        if "alpha" in parts:
            scale = number(self.file.tensors, parts["alpha"], self.file.where) / rank
        return [*self._weight(parts, target, (_flat(a), _flat(b)), scale), *self._bias(path, parts, scale)]

    def _weight(
        self, parts: dict[str, str], target: str, factors: tuple[Expr, Expr], scale: float
    ) -> list[tuple[str, Change]]:
        """LoRA or DoRA of a weight."""
        key = parts.get("magnitude") or parts.get("dora_scale")
        if key is None:
            linear = len(self.specs[target][0]) == 2 and target.endswith(".weight")
            return [(target, Change("lora", factors, self.weight * scale, beside=self.branch and linear))]
        m, wants = self._load(key), self.specs[target][0]
        rows, columns, size = wants[0], _columns(wants), math.prod(m.shape)
        by_columns = "magnitude" not in parts and m.shape[:1] == (1,) and rows > 1 and size == columns
        if size != (columns if by_columns else rows):
            self.wrong.append(f"{key} has the shape {list(m.shape)}, and {target} {list(wants)}")
            return []
        leaves = (*factors, Reshape(m, (1, columns) if by_columns else (rows, 1)))
        if "magnitude" in parts:  # PEFT: the weight scales b @ a
            return [(target, Change("dora", leaves, self.weight * scale))]
        return [(target, Change("dora", leaves, scale, self.weight))]  # kohya: a share of the whole change

    def _bias(self, path: str, parts: dict[str, str], scale: float) -> list[tuple[str, Change]]:
        if "up_bias" not in parts:
            return []
        key = parts["up_bias"]
        change = Change("diff", (self._load(key),), self.weight * scale)
        return self._fitting(key, str(self.names.find(path, "up_bias")), change)


def _some(sentences: list[str]) -> list[str]:
    """Up to ten, and how many more there are."""
    more = [f"and {len(sentences) - 10} more"] if len(sentences) > 10 else []
    return [*sentences[:10], *more]


def with_loras(
    transformers: Mapping[str, TransformerSource], specs: Sequence[LoraSpec]
) -> dict[str, TransformerSource]:
    """The transformers of a model with adapters in their weights."""
    if not specs:
        return dict(transformers)
    models = {name: {n: t.tensors.spec(n) for n in t.tensors.keys()} for name, t in transformers.items()}  # noqa: SIM118
    changes = changes_of(specs, models)
    return {name: _with_changes(t, changes[name]) if name in changes else t for name, t in transformers.items()}


def _with_changes(transformer: TransformerSource, changes: Changes) -> TransformerSource:
    inside, beside = changes.apart()
    tensors: Any = LoraTensors(transformer.tensors, inside) if inside.of else transformer.tensors
    if not beside:
        return replace(transformer, tensors=tensors)
    branched = BranchTensors(tensors, beside, changes.leaves)
    return replace(transformer, tensors=branched, branches=branched.ranks)
