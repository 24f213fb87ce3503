"""The kernels that a runtime makes of a network, by one of three policies. No torch.

    eager      PyTorch as it is: each operator a kernel; views are free, concat and shuffles copy
    compiled   torch.compile: a convolution or matrix product is a kernel, and so is what lies
               between: point-wise operators with the copies, pools and means among them
    fused      TensorRT, OpenVINO, ONNX Runtime, ncnn: as `benchmarks.graph` does with ONNX files:
               convolution + BatchNorm + activation + one residual addition; a chain of
               element-wise operators; split and transpose are copies, as these have no strides

All counts are elements for one image, but weights, which a batch reads once. What they are in
bytes depends on the precision; under autocast some tensors stay in float32 (`amp=True`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from litezoo.models.errors import UsageError, unknown_name

from .network import PART, WEIGHTED, ConvShape, Network, Op, OpKind

if TYPE_CHECKING:
    from .graph import Kind

__all__ = ["Kernel", "Policy", "make_kernels"]

Policy = Literal["eager", "compiled", "fused"]

#: As in benchmarks.graph: most operators between two points at which a kernel may end.
_LONGEST = 16
#: Copies that only lay a tensor out anew: PyTorch makes them where a view has strides.
_LAYOUTS = frozenset(("clone", PART))
#: Most terms of a sum that generated code writes out.
_MOST_TERMS = 8
#: Most parts of a concatenation that generated code reads where they are.
_MOST_PARTS = 8
#: PyTorch's pool writes the place of each element it takes as well: 8 bytes.
_WITH_PLACES = "max_pool2d_with_indices"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What runs at once: elements that one image costs, and weights, read once per batch.

    `name` is the first operator's module, `ops` and `kinds` are those of its operators. Under
    autocast `full_read_elements` and `full_write_elements` are the part of what it reads and writes
    that is float32, `cast_elements` the weights that are cast before it, in `casts` kernels of
    their own. `sensitive` kernels compute in float32.
    """

    kind: Kind
    name: str
    ops: tuple[str, ...]
    kinds: tuple[OpKind, ...]
    macs: int
    weight_elements: int
    read_elements: int
    write_elements: int
    conv: ConvShape | None
    out_shape: tuple[int, ...]
    sensitive: bool = False
    full_read_elements: int = 0
    full_write_elements: int = 0
    cast_elements: int = 0
    casts: int = 0

    @property
    def elements(self) -> int:
        """All that it reads and writes for one image."""
        return self.weight_elements + self.read_elements + self.write_elements


def make_kernels(
    network: Network,
    policy: Policy,
    *,
    batch: int = 1,
    amp: bool = False,
    bias_apart: bool = False,
) -> tuple[Kernel, ...]:
    """Return the kernels that a runtime of this policy makes, in an order they can run in.

    `batch`: of several images PyTorch copies the part of a map's channels that a convolution or a
    pool reads; a single image's are one piece of memory. What a kernel costs is for one image.
    `amp`: of eager and compiled, as torch.autocast runs them. `bias_apart`: as PyTorch does on
    CUDA, where a convolution's bias is an addition of its own (eager: but for depthwise ones), and
    generated code may read the parts of a concatenation; on CPUs it lays weights out anew.
    """
    if policy not in get_args(Policy):
        raise unknown_name("policy", policy, get_args(Policy))
    if policy == "fused":
        if amp or bias_apart:
            raise UsageError("amp and bias_apart are of PyTorch; leave them out for fused kernels")
        return _Plan(network, free=_is_layout, amp=False, cuda=False).kernels(_Fusing)
    if bias_apart:
        network = _peel_bias(network, depthwise=policy == "compiled")
    if policy == "compiled":
        return _Plan(network, free=_is_view, amp=amp, cuda=bias_apart).kernels(_Compiling)
    free = _is_view_or_part if batch == 1 else _is_view
    return _Plan(network, free=free, amp=amp, cuda=bias_apart).kernels(_Eager)


def _is_view(op: Op) -> bool:
    return op.kind == "view"


def _is_part(op: Op) -> bool:
    return op.kind == "copy" and op.name == PART


def _is_unrolled(op: Op) -> bool:
    """Whether generated code adds the few terms of a sum one by one."""
    return op.kind == "reduce" and op.in_elements <= _MOST_TERMS * op.out_elements


def _is_view_or_part(op: Op) -> bool:
    return _is_view(op) or _is_part(op)


def _is_layout(op: Op) -> bool:
    """Whether engines do without it: a layout, or what is made of weights alone."""
    return (op.kind == "copy" and op.name in _LAYOUTS) or not op.inputs


def _moved(op: Op, inputs: tuple[int, ...], weight_elements: int) -> Op:
    """Return an operator at another place; what of its weights is not kept was its bias.

    Written out, as `dataclasses.replace` takes twice as long and this runs ten thousand times.
    """
    return Op(
        kind=op.kind,
        name=op.name,
        module=op.module,
        inputs=inputs,
        reads=op.reads,
        out_shape=op.out_shape,
        out_elements=op.out_elements,
        weight_elements=weight_elements,
        bias_elements=op.bias_elements - (op.weight_elements - weight_elements),
        macs=op.macs,
        conv=op.conv,
        window=op.window,
        sensitive=op.sensitive,
    )


def _peel_bias(network: Network, *, depthwise: bool) -> Network:
    """Return the network with the biases of convolutions as additions of their own."""
    ops: list[Op] = []
    place = {-1: -1}
    for index, op in enumerate(network.ops):
        inputs = tuple(place[one] for one in op.inputs)
        bias = op.bias_elements if op.conv is not None and op.inputs else 0
        if op.conv is None or not bias or (op.conv.kind == "depthwise" and not depthwise):
            ops.append(op if inputs == op.inputs else _moved(op, inputs, op.weight_elements))
            place[index] = len(ops) - 1
            continue
        weight = op.weight_elements - bias
        ops.append(_moved(op, inputs, weight))
        ops.append(
            Op(
                kind="add",
                name="bias",
                module=op.module,
                inputs=(len(ops) - 1,),
                reads=(op.out_elements,),
                out_shape=op.out_shape,
                out_elements=op.out_elements,
                weight_elements=bias,
                bias_elements=bias,
            )
        )
        place[index] = len(ops) - 1
    outputs = tuple(place[one] for one in network.outputs)
    return dataclasses.replace(network, ops=tuple(ops), outputs=outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copy:
    """An input that is copied or cast before a kernel; -1 is the image."""

    value: int
    reads: int
    writes: int


class _Plan:
    """A network without what is free: each operator's inputs are values that lie in memory."""

    def __init__(
        self, network: Network, *, free: Callable[[Op], bool], amp: bool, cuda: bool
    ) -> None:
        self.ops = network.ops
        self.cuda = cuda
        self.amp = amp
        self.image = math.prod(network.resolution)
        memory: list[int] = []
        for index, op in enumerate(self.ops):
            is_free = free(op)
            memory.append(_memory_of(op, memory) if is_free and op.inputs else index)
        self.kept = [index for index, op in enumerate(self.ops) if not free(op)]
        at = [*memory, -1]  # so that at[-1] is the image
        self.inputs = [tuple(at[one] for one in op.inputs) for op in self.ops]
        self.results = {at[one] for one in network.outputs}
        self.readers: dict[int, list[int]] = {}
        for index in self.kept:
            for one in dict.fromkeys(self.inputs[index]):
                self.readers.setdefault(one, []).append(index)
        self.full = self._full_types() if amp else [False] * len(self.ops)

    def _full_types(self) -> list[bool]:
        """Tell which values are float32 under autocast; the image is."""
        full: list[bool] = []
        for op in self.ops:
            if op.kind in WEIGHTED:
                full.append(False)
            elif op.sensitive or (
                op.kind in ("add", "mul") and op.weight_elements > op.bias_elements
            ):
                full.append(True)  # a float32 weight promotes what it is added to
            else:
                full.append(any(one < 0 or full[one] for one in op.inputs))
        return full

    def is_full(self, value: int) -> bool:
        """Whether a value is float32 under autocast."""
        return self.amp and (value < 0 or self.full[value])

    def is_only_cast(self, value: int) -> bool:
        """Whether all that read a value want it as a half."""
        readers = self.readers.get(value, ())
        is_result = value in self.results
        return not is_result and all(self.ops[one].kind in WEIGHTED for one in readers)

    def size(self, value: int) -> int:
        """Return the elements of a value."""
        return self.image if value < 0 else self.ops[value].out_elements

    def kernels(self, grouping: type[_Rule]) -> tuple[Kernel, ...]:
        """Return the kernels of the groups, with the copies that are made before them."""
        rule = grouping(self)
        kernels: list[Kernel] = []
        for group in rule.groups():
            kernels += [self._copy(group[0], copy, rule) for copy in rule.copies(group[0])]
            if not rule.is_done_by_copies(group):
                kernels.append(self._kernel(group, rule))
        return tuple(kernels)

    def _copy(self, index: int, copy: _Copy, rule: _Rule) -> Kernel:
        """Return the kernel that copies an operator's input as that wants it."""
        op = self.ops[index]
        is_part = op.kind == "concat"
        is_cast = self.amp and not is_part
        writes_full = rule.stores_full(index) if is_part else op.kind not in WEIGHTED
        return Kernel(
            kind="elementwise" if is_cast else "move",
            name=op.module,
            ops=("cast" if is_cast else op.name if is_part else "layout",),
            kinds=("concat" if is_part else "copy",),
            macs=0,
            weight_elements=0,
            read_elements=copy.reads,
            write_elements=copy.writes,
            conv=None,
            out_shape=() if copy.value < 0 else self.ops[copy.value].out_shape,
            full_read_elements=copy.reads if self.is_full(copy.value) else 0,
            full_write_elements=copy.writes if self.amp and writes_full else 0,
        )

    def _written(self, group: Sequence[int]) -> Sequence[int]:
        """Return the values of a group that are needed outside, else its last."""
        inside = set(group)
        needed = [
            index
            for index in group
            if index in self.results
            or any(reader not in inside for reader in self.readers.get(index, ()))
        ]
        return needed or group[-1:]

    def _kernel(self, group: Sequence[int], rule: _Rule) -> Kernel:
        inside = set(group)
        ops = [self.ops[index] for index in group]
        first = ops[0]
        reads: dict[int, int] = {}
        for index in group:
            for value, elements in zip(self.inputs[index], self.ops[index].reads, strict=True):
                if value not in inside and not rule.is_in_place(index, value):
                    reads[value] = reads.get(value, 0) + elements
        if len(group) > 1:  # what several of them read is read once
            reads = {value: min(count, self.size(value)) for value, count in reads.items()}
        writes = group if len(group) == 1 else self._written(group)
        beside = sum(map(rule.written_beside, writes))
        full = [rule.written(index) for index in writes if self.amp and rule.stores_full(index)]
        full_reads = [
            count for value, count in reads.items() if self.amp and rule.reads_full(group[0], value)
        ]
        cast = rule.cast_elements(first)
        return Kernel(
            kind=rule.kind(ops),
            name=first.module or first.name,
            ops=tuple([op.name for op in ops]),
            kinds=tuple([op.kind for op in ops]),
            macs=sum([op.macs for op in ops]),
            weight_elements=sum([op.weight_elements for op in ops]),
            read_elements=sum(reads.values()),
            write_elements=sum(map(rule.written, writes)) + beside,
            conv=first.conv,
            out_shape=self.ops[writes[-1]].out_shape,
            sensitive=any([op.sensitive for op in ops]),
            full_read_elements=sum(full_reads),
            full_write_elements=sum(full) + (beside if self.amp else 0),
            cast_elements=cast,
            casts=(cast > 0) + (self.amp and cast > first.bias_elements > 0),
        )


def _is_cast_before(op: Op) -> bool:
    """Whether autocast makes an input float32 by a kernel; softmax and sums do it in their own."""
    return op.sensitive and op.kind not in ("softmax", "reduce")


def _memory_of(op: Op, memory: Sequence[int]) -> int:
    """Return the value that a free operator's result lies in."""
    first = op.inputs[0]
    return first if first < 0 else memory[first]


class _Rule:
    """What is one kernel, and what that reads and writes."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def groups(self) -> list[list[int]]:
        """Return the operators of each kernel, the kernels in an order they can run in."""
        raise NotImplementedError

    def kind(self, ops: Sequence[Op]) -> Kind:
        """Return what a kernel of these is."""
        return ops[0].kernel_kind

    def is_in_place(self, index: int, value: int) -> bool:
        """Whether an operator finds an input where it wants it, and reads nothing."""
        return False

    def written(self, index: int) -> int:
        """Return what is written of a value that others need."""
        return self.plan.ops[index].out_elements

    def written_beside(self, index: int) -> int:
        """Return what is written that nobody reads, in float32 elements."""
        return 0

    def copies(self, index: int) -> Iterable[_Copy]:
        """Return the inputs of a kernel that are copied or cast before it, and how much."""
        return ()

    def is_done_by_copies(self, group: Sequence[int]) -> bool:
        """Whether nothing is left to do after `copies`."""
        return False

    def cast_elements(self, first: Op) -> int:
        """Return how many weights are copied or cast before a kernel that begins with `first`."""
        if not self.plan.amp:
            return 0
        return first.weight_elements if first.kind in WEIGHTED else first.bias_elements

    def reads_full(self, index: int, value: int) -> bool:
        """Whether an operator reads a value as float32 under autocast."""
        return False

    def stores_full(self, value: int) -> bool:
        """Whether a value is written as float32 under autocast."""
        return False


class _Eager(_Rule):
    """PyTorch: each operator is a kernel."""

    def groups(self) -> list[list[int]]:
        """Return each operator alone."""
        return [[index] for index in self.plan.kept]

    def written_beside(self, index: int) -> int:
        """Return what the places of a pool's largest elements are, which are int64."""
        op = self.plan.ops[index]
        if op.name != _WITH_PLACES:
            return 0
        return op.out_elements * 2

    def copies(self, index: int) -> Iterable[_Copy]:
        """Return what autocast casts: float32 inputs of products, halves of what wants float32."""
        plan, op = self.plan, self.plan.ops[index]
        if not plan.amp or (op.kind not in WEIGHTED and not _is_cast_before(op)):
            return []
        return [
            _Copy(value=value, reads=elements, writes=elements)
            for value, elements in zip(plan.inputs[index], op.reads, strict=True)
            if plan.is_full(value) == (op.kind in WEIGHTED)
        ]

    def reads_full(self, index: int, value: int) -> bool:
        """Whether an operator reads a value as float32: after the casts of `casts`."""
        op = self.plan.ops[index]
        if op.kind in WEIGHTED or not self.plan.amp:
            return False
        return _is_cast_before(op) or self.plan.is_full(value)

    def stores_full(self, value: int) -> bool:
        """Whether a value is float32."""
        return self.plan.is_full(value)


class _Fusing(_Rule):
    """Engines: the rules of `benchmarks.graph`, on operators."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__(plan)
        self.taken: set[int] = set()

    def groups(self) -> list[list[int]]:
        """Return the operators of each kernel; convolutions come first and take what they can."""
        ops = self.plan.ops
        groups = [
            self._grow(index)
            for index in sorted(self.plan.kept, key=lambda one: ops[one].kind not in WEIGHTED)
            if index not in self.taken
        ]
        return sorted(groups, key=max)

    def _grow(self, first: int) -> list[int]:
        group, added = [first], set[int]()
        self.taken.add(first)
        end = first
        while self.plan.ops[first].is_pointwise or self.plan.ops[first].kind in WEIGHTED:
            members = self._following(first, end, added)
            if not members:
                break
            group += members
            self.taken.update(members)
            end = members[-1]
        return group

    def _following(self, first: int, end: int, added: set[int]) -> list[int]:
        """Return the fewest operators behind `end` with which the kernel ends in one value.

        `added` holds the residual that the kernel adds, if any, and is kept up to date.
        """
        members: list[int] = []
        inside, residuals = {end}, set(added)
        readers, results = self.plan.readers, self.plan.results
        while end not in results and len(members) < _LONGEST:
            waiting = sorted(
                reader
                for value in inside
                for reader in readers.get(value, ())
                if reader not in inside
            )
            if members:
                ends = [
                    value
                    for value in inside
                    if value in results or any(r not in inside for r in readers.get(value, ()))
                ]
                if ends == [members[-1]]:
                    added.update(residuals)
                    return members
            if not waiting:
                return []
            index = waiting[0]
            others = set(self.plan.inputs[index]) - inside
            if not self._fits(first, index, end, others, residuals):
                return []
            if self.plan.ops[first].kind in WEIGHTED:
                residuals |= others
            members.append(index)
            inside.add(index)
        return []

    def _fits(
        self, first: int, index: int, end: int, others: set[int], residuals: set[int]
    ) -> bool:
        """Whether a kernel that began with `first` can compute an operator at its end."""
        op, size = self.plan.ops[index], self.plan.size
        if index in self.taken or op.out_elements != size(end):
            return False
        if self.plan.ops[first].kind not in WEIGHTED or not others:
            return op.is_pointwise
        equal = all(size(one) == size(end) for one in others)
        return op.kind == "add" and equal and len(residuals | others) == 1


class _Compiling(_Rule):
    """torch.compile: what is point-wise joins its producers, unless a kernel lies between.

    These are the rules of inductor in channels-last layout. A mean over positions joins what only
    it reads; a pool and a resized map read a map that was written, and begin a kernel. The parts of
    a concatenation are written where they belong, once more where a library has read them before;
    what a library made is copied, or on CUDA read by what works on all parts.
    """

    def __init__(self, plan: _Plan) -> None:
        super().__init__(plan)
        self.group: dict[int, int] = {}
        self.members: dict[int, list[int]] = {}
        self.needs: dict[int, int] = {}  # groups that one waits for, as bits
        self.marks: dict[int, int] = {}  # the bits that stand for a group
        self.waited = 0  # all groups that some group waits for
        self.reduced: set[int] = set()  # what comes behind a reduction in its group

    def groups(self) -> list[list[int]]:
        """Return the operators of each kernel."""
        for index in self.plan.kept:
            self._place(index, self._joined(index))
        groups = [sorted(group) for group in self.members.values()]
        return sorted(groups, key=max)

    def is_done_by_copies(self, group: Sequence[int]) -> bool:
        """Whether a kernel is a concatenation: its parts are in place or copied there."""
        return len(group) == 1 and self.plan.ops[group[0]].kind == "concat"

    def _is_generated(self, value: int) -> bool:
        """Whether generated code makes a value, not a library."""
        if value < 0 or _is_part(self.plan.ops[value]):
            return False
        return self.plan.ops[value].kind not in (*WEIGHTED, "other", "concat")

    def is_in_place(self, index: int, value: int) -> bool:
        """Whether a concatenation's input is written where it belongs."""
        ops = self.plan.ops
        if ops[index].kind != "concat" or len(self.members[self.group[index]]) > 1:
            return False
        if not self._is_generated(value):
            return False
        before = [one for one in self.plan.readers[value] if one < index]
        return not any(ops[one].kind in (*WEIGHTED, "concat") for one in before)

    def _is_read_in_parts(self, index: int) -> bool:
        """Whether what works on a concatenation reads its parts."""
        plan = self.plan
        readers = plan.readers.get(index, ())
        return (
            plan.cuda
            and len(plan.inputs[index]) <= _MOST_PARTS
            and all(plan.ops[one].is_pointwise for one in readers)
            and not all(self.is_in_place(index, value) for value in plan.inputs[index])
        )

    def kind(self, ops: Sequence[Op]) -> Kind:
        """Return what a kernel of these is: a pool or mean if one is in it."""
        kinds = {op.kernel_kind for op in ops}
        if "pool" in kinds:
            return "pool"
        return "elementwise" if "elementwise" in kinds else ops[0].kernel_kind

    def copies(self, index: int) -> Iterable[_Copy]:
        """Return the image, which is laid out and cast, and the parts that are not in place."""
        plan, op = self.plan, self.plan.ops[index]
        if op.kind == "concat":
            if len(self.members[self.group[index]]) > 1:
                return []
            return [
                _Copy(value=value, reads=elements, writes=self._copied(value))
                for value, elements in dict(zip(plan.inputs[index], op.reads, strict=True)).items()
                if not self._is_generated(value) and self._is_first_copy(index, value)
            ]
        first = plan.readers.get(-1, (None,))[0]
        if index != first or not plan.is_only_cast(-1):
            return []
        return [_Copy(value=-1, reads=plan.image, writes=plan.image)]

    def _is_copied(self, index: int, value: int) -> bool:
        """Whether an operator is a concatenation that a value is copied into."""
        alone = self.plan.ops[index].kind == "concat" and len(self.members[self.group[index]]) == 1
        return alone and not self.is_in_place(index, value)

    def _is_first_copy(self, index: int, value: int) -> bool:
        """Whether a value is copied into a concatenation and into none before."""
        readers = self.plan.readers[value]
        return next((one for one in readers if self._is_copied(one, value)), None) == index

    def _copied(self, value: int) -> int:
        """Return how much is written of a value into all concatenations that it is copied into."""
        return sum(
            elements
            for one in self.plan.readers.get(value, ())
            if self._is_copied(one, value)
            for place, elements in zip(self.plan.inputs[one], self.plan.ops[one].reads, strict=True)
            if place == value
        )

    def written(self, index: int) -> int:
        """Return what is written of a value, and once more into concatenations."""
        again = self._copied(index) if self._is_generated(index) else 0
        return self.plan.ops[index].out_elements + again

    def cast_elements(self, first: Op) -> int:
        """Return the weights that autocast casts; on CPUs those that are laid out anew."""
        conv = first.conv
        if self.plan.amp or self.plan.cuda or conv is None:
            return super().cast_elements(first)
        flat = math.prod(conv.kernel) == 1 or conv.groups == conv.in_channels
        return 0 if flat else first.weight_elements - first.bias_elements

    def reads_full(self, index: int, value: int) -> bool:
        """Whether a value that was written as float32 is read."""
        return self.stores_full(value)

    def stores_full(self, value: int) -> bool:
        """Whether a value is written as float32: not where all that read it cast it."""
        return self.plan.is_full(value) and not self.plan.is_only_cast(value)

    def _joined(self, index: int) -> list[int]:
        """Return the groups that an operator joins."""
        plan, op = self.plan, self.plan.ops[index]
        if op.kind in (*WEIGHTED, "other", "pool", "resize", "concat") or not op.inputs:
            return []
        if _is_part(op):  # the library makes it
            return []
        chosen: list[int] = []
        values = sorted(set(plan.inputs[index]), reverse=True)
        sources = {self.group[value] for value in values if value >= 0}
        for value in values:
            if value < 0 or self.group[value] in chosen or not self._meets(index, value):
                continue
            candidate = self.group[value]
            marks = self.marks[candidate]
            for one in chosen:
                marks |= self.marks[one]
            own = {candidate, *chosen}
            # nothing that the joined group would wait for may wait for it
            if all(not self.needs[one] & marks & ~self.marks[one] for one in sources | own):
                chosen.append(candidate)
        return chosen

    def _meets(self, index: int, value: int) -> bool:
        """Whether an operator can be computed where one of its inputs is."""
        plan, op, source = self.plan, self.plan.ops[index], self.plan.ops[value]
        if source.kind in (*WEIGHTED, "other") or _is_part(source):
            return False
        if source.kind == "concat" and not (
            len(self.members[self.group[value]]) > 1 or self._is_read_in_parts(value)
        ):
            return False
        group = self.group[value]
        own = [one for one in plan.inputs[index] if one >= 0 and self.group[one] == group]
        reduces = op.kind == "reduce" and not _is_unrolled(op)
        size = op.in_elements if reduces or op.kind == "softmax" else op.out_elements
        for one in own:
            same = plan.size(one) == size
            if one in self.reduced and not same:
                return False
            if (reduces or op.kind in ("softmax", "norm")) and one in self.reduced:
                return False
            alone = len(plan.readers[one]) == 1 and one not in plan.results
            if not same and (reduces or op.kind in ("norm", "softmax") or not alone):
                return False
            over_positions = plan.ops[one].out_shape[:1] == (op.out_elements,)
            if reduces and over_positions and not alone:
                return False  # it goes through the map in another order
        return True

    def _place(self, index: int, joined: Sequence[int]) -> None:
        """Put an operator into the groups that it joins, which become one, or its own."""
        plan, op = self.plan, self.plan.ops[index]
        own = joined[0] if joined else index
        members = self.members.setdefault(own, [])
        mark = self.marks.setdefault(own, 1 << index)
        self.needs.setdefault(own, 0)
        for other in joined[1:]:
            members += self.members.pop(other)
            mark |= self.marks.pop(other)
            self.needs[own] |= self.needs.pop(other)
        members.append(index)
        for one in members:
            self.group[one] = own
        self.marks[own] = mark
        needs = self.needs[own]
        for value in plan.inputs[index]:
            if value >= 0 and self.group[value] != own:
                needs |= self.needs[self.group[value]] | self.marks[self.group[value]]
        self.needs[own] = needs
        self.waited |= needs
        if joined and self.waited & mark:
            for one, bits in self.needs.items():
                if bits & mark and one != own:
                    self.needs[one] = bits | mark | needs
        behind = any(value in self.reduced for value in plan.inputs[index] if value >= 0)
        if (op.kind == "reduce" and not _is_unrolled(op)) or (behind and joined):
            self.reduced.add(index)
