"""Any network as the operators it runs: a PyTorch module, an ONNX file, a name.

A module runs on the meta device (shapes without values, no weights in memory) in eval mode, and
each operator that PyTorch's dispatcher sees is one of the network. Parts of a map, and maps turned
round, are kept as views; views that only rename axes are not. ONNX files come through the layers
of `benchmarks.graph`. `python -m litezoo.benchmarks.tracing` writes networks.json anew.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import (
    CheckFailed,
    LitezooError,
    UsageError,
    first_line,
    require,
    unknown_name,
)

from .network import (
    PART,
    ConvShape,
    GraphForm,
    Network,
    Op,
    OpKind,
    Window,
    catalogue_network,
    list_networks,
    scale,
    write_networks,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from torch import Tensor, nn

    from .graph import Layer

__all__ = ["find_network", "trace", "trace_onnx"]


def _kinds(words: Mapping[OpKind, str]) -> Mapping[str, OpKind]:
    return {name: kind for kind, names in words.items() for name in names.split()}


#: What PyTorch's operators do, by their names without underscores at the ends.
_KINDS = _kinds(
    {
        "conv": "convolution convolution_overrideable cudnn_convolution mkldnn_convolution",
        "matmul": "mm addmm bmm baddbmm mv addmv linear scaled_dot_product_efficient_attention "
        "scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu "
        "scaled_dot_product_cudnn_attention",
        "norm": "native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training "
        "batch_norm_impl_index batch_norm_with_update batch_norm_no_update cudnn_batch_norm "
        "native_layer_norm native_group_norm instance_norm fused_rms_norm rms_norm",
        "activation": "abs celu clamp clamp_min clamp_max clip cos elu erf exp floor gelu "
        "hardshrink hardsigmoid hardswish hardtanh leaky_relu log log1p log_sigmoid_forward "
        "logical_not mish neg pow prelu prelu_kernel reciprocal relu relu6 round rrelu rsqrt selu "
        "sigmoid sign silu sin softplus sqrt square tanh threshold",
        "add": "add",
        "mul": "addcdiv addcmul atan2 bitwise_and bitwise_or div eq fmod ge gt le lerp "
        "logical_and logical_or lt maximum minimum mul ne remainder rsub sub where",
        "pool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d "
        "max_pool1d max_pool2d max_pool2d_with_indices mkldnn_max_pool2d",
        "reduce": "all amax amin any argmax argmin cumsum linalg_vector_norm logsumexp max mean "
        "min norm prod std std_mean sum topk var var_mean",
        "concat": "cat stack",
        "copy": "channel_shuffle clone contiguous constant_pad_nd col2im copy flip gather im2col "
        "index index_select native_channel_shuffle pixel_shuffle pixel_unshuffle reflection_pad2d "
        "repeat replication_pad2d roll to_copy tril triu unfold_copy embedding",
        "softmax": "softmax log_softmax safe_softmax",
        "resize": "upsample_nearest1d upsample_nearest2d upsample_nearest_exact2d "
        "upsample_bilinear2d upsample_bilinear2d_aa upsample_bicubic2d upsample_bicubic2d_aa "
        "grid_sampler_2d",
    }
)
#: Arithmetic whose result is of another type.
_COMPARISONS = frozenset("eq ge gt le logical_and logical_not logical_or lt ne where".split())
#: What needs its input in one piece of memory, in the order of its axes.
_DENSE = frozenset(("native_layer_norm", "native_group_norm", "fused_rms_norm"))
#: Views that take a part of a tensor or turn its axes; any other view renames axes.
_VIEWS = frozenset(
    "as_strided chunk movedim narrow permute select slice split split_with_sizes swapaxes "
    "tensor_split transpose unbind unfold unsafe_chunk unsafe_split".split()
)
#: What makes a tensor in the shape of another and does not read it.
_FACTORIES = frozenset(
    "bernoulli empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros "
    "ones_like rand_like randn_like zeros_like sym_size sym_stride sym_numel sym_storage_offset "
    "prim_layout device".split()
)
#: What runs in float32 under autocast (ATen/autocast_mode.h), beside norms, softmax and resizing.
_SENSITIVE = frozenset(
    "cumsum exp linalg_vector_norm log log1p logsumexp norm pow prod reciprocal rsqrt softplus "
    "sum".split()
)
#: Writes that do not read what was there.
_OVERWRITES = frozenset(("copy", "fill", "zero"))
_PREFIXES = ("timm:", "torchvision:")


def trace(
    module: nn.Module, *, name: str, resolution: tuple[int, int, int] = (3, 224, 224)
) -> Network:
    """Return the operators that a network runs in eval mode for one image (C, H, W).

    The module is left as it is, in any mode and on any device: a twin without weights runs.
    UsageError where it does not take such an image.

    >>> import torch
    >>> with torch.device("meta"):
    ...     network = trace(torch.nn.Conv2d(3, 8, 3, padding=1), name="conv")
    >>> network.macs == 3 * 8 * 9 * 224**2, [op.name for op in network.ops]
    (True, ['convolution'])
    """
    return _trace_twin(_meta_twin(module), name, resolution)


def _meta_twin(module: nn.Module) -> nn.Module:
    """Return a copy with every parameter and buffer on the meta device."""
    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo).eval()


def _trace_twin(module: nn.Module, name: str, resolution: tuple[int, int, int]) -> Network:
    """Trace a module on the meta device that may be changed."""
    params = sum(parameter.numel() for parameter in module.parameters())
    ops, outputs = _record(module.eval(), name, (1, *resolution))
    if any(not op.inputs for op in ops):  # what is kept from the first call on costs once
        ops, outputs = _record(module, name, (1, *resolution))
    return Network(name=name, resolution=resolution, ops=ops, outputs=outputs, params=params)


def _record(
    module: nn.Module, name: str, shape: tuple[int, int, int, int]
) -> tuple[tuple[Op, ...], tuple[int, ...]]:
    """Run a module on the meta device; return its operators, for one image, and its results."""
    import torch
    from torch.utils._pytree import tree_leaves

    recorder = _recorder_type()(module, shape[0])
    images = torch.empty(shape, device="meta")
    recorder.know(images, -1)
    try:
        with torch.no_grad(), torch.device("meta"), _module_names(recorder):
            with _attention_type()(), recorder:
                result = module(images)
    except LitezooError:
        raise
    except Exception as error:  # whatever a module's code raises
        raise UsageError(
            f"{name} does not run on an image of {'x'.join(map(str, shape[1:]))}: "
            f"{first_line(error) or type(error).__name__}; choose another resolution"
        ) from error
    outputs = [
        value
        for leaf in tree_leaves(result)
        if isinstance(leaf, torch.Tensor)
        for value in recorder.sources(leaf)
    ]
    return tuple(recorder.ops), tuple(dict.fromkeys(value for value in outputs if value >= 0))


@contextmanager
def _module_names(recorder: Any) -> Iterator[None]:
    """Keep the name of the module that runs at the top of the recorder's stack."""
    from torch.nn.modules import module as hooks

    def enter(module: nn.Module, args: object) -> None:
        recorder.stack.append(recorder.names.get(id(module), recorder.stack[-1]))

    def leave(module: nn.Module, args: object, result: object) -> None:
        recorder.stack.pop()

    before = hooks.register_module_forward_pre_hook(enter)
    after = hooks.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@cache
def _attention_type() -> Any:
    """Return the mode that makes attention the one kernel that it is on accelerators."""
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    class Attention(TorchFunctionMode):
        """On the meta device it would fall into its products and softmax."""

        def __torch_function__(
            self,
            func: Any,
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            if func is not F.scaled_dot_product_attention or args[0].dim() != 4:
                return func(*args, **kwargs)
            queries, keys, values = args[:3]
            heads = queries.shape[1]
            keys, values = (one.expand(-1, heads, -1, -1) for one in (keys, values))
            attention = torch.ops.aten._scaled_dot_product_efficient_attention
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return attention(queries, keys, values, mask, False)[0]

    return Attention


@cache
def _recorder_type() -> Any:
    """Return the mode that records; its base class is torch's."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    @cache
    def is_composite(func: Any) -> bool:
        """Whether an operator is made of others."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return bool(has_kernel(func.name(), "CompositeImplicitAutograd"))

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Takes each operator down: what it reads, what it writes, what it multiplies."""

        def __init__(self, module: nn.Module, batch: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.batch = batch
            self.ops: list[Op] = []
            self.names = {id(child): name for name, child in module.named_modules()}
            self.stack = [""]
            self.clock = 0
            #: Of each tensor that depends on the image: itself, its operator, when it was made.
            self.values: dict[int, tuple[Tensor, int, int]] = {}
            #: Of each memory: what was written into it, from element to element, when.
            self.written: dict[int, list[tuple[int, int, int, int]]] = {}
            #: Tensors that are some channels of another: of several images no piece of memory.
            self.parts: set[int] = set()
            self.alive: list[Tensor] = []  # so that nothing is known by another's id

        def __torch_dispatch__(
            self,
            func: Any,
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            if is_composite(func):
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            name = func.overloadpacket.__name__.strip("_")
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            self.alive += tensors
            if name in _DENSE or _KINDS.get(name) in ("conv", "pool", "resize"):
                args = (self.dense(args[0], name in _DENSE), *args[1:])
                tensors[0] = args[0]
            result = self.run(func, name, args, kwargs)
            self.clock += 1
            made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
            self.alive += made
            if name in _FACTORIES or not tensors or not made:
                return result
            macs = 0
            if (count := flop_registry.get(func.overloadpacket)) is not None:
                macs = count(*args, **kwargs, out_val=result) // 2
            self.note(func, name, args, tensors, made, macs)
            return result

        def dense(self, tensor: Tensor, is_norm: bool) -> Tensor:
            """Return an input as a library wants it: parts and turned maps are copied."""
            if not self.is_image(tensor):
                return tensor
            is_dense = tensor.is_contiguous()
            if not is_dense and not is_norm and tensor.dim() == 4:
                is_dense = tensor.is_contiguous(memory_format=torch.channels_last)
            if is_dense and id(tensor) not in self.parts:
                return tensor
            copied: Tensor
            if is_dense:
                copied = torch.empty_like(tensor)
                self.alive.append(copied)
                self.note(torch.ops.aten.clone.default, PART, (), [tensor], [copied], 0)
                return copied
            with self:
                copied = tensor.contiguous()
            if is_norm:
                self.ops[-1] = dataclasses.replace(self.ops[-1], sensitive=True)
            return copied

        def run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Run an operator; of those that keep a shape only that is worked out: it is quick."""
            kind, first = _KINDS.get(name), args[0] if args else None
            if isinstance(first, torch.Tensor) and not kwargs and first.is_floating_point():
                others = [one for one in args[1:] if isinstance(one, torch.Tensor)]
                if kind == "activation" or (
                    kind in ("add", "mul") and all(one.shape == first.shape for one in others)
                ):
                    if name not in _COMPARISONS and all(one.dtype == first.dtype for one in others):
                        return first if func._schema.is_mutable else torch.empty_like(first)
                if name == "native_batch_norm" and not _trains(name, args):
                    none = first.new_empty(0)
                    return torch.empty_like(first), none, none
            return func(*args, **kwargs)

        # --------------------------------------------------------------- tensors

        def know(self, tensor: Tensor, value: int) -> None:
            """Keep in mind which operator a tensor is from."""
            self.alive.append(tensor)
            self.values[id(tensor)] = (tensor, value, self.clock)

        def sources(self, tensor: Tensor) -> list[int]:
            """Return the operators that a tensor's content is from; [] where it is constant."""
            known = self.values.get(id(tensor))
            found, since = ([known[1]], known[2]) if known else ([], -1)
            low, high = _reach(tensor)
            for start, end, op, time in self.written.get(_memory(tensor), ()):
                if time > since and start < high and low < end:
                    covers = start <= low and high <= end
                    found = [op] if covers else [*found, op]
            return list(dict.fromkeys(found))

        def is_image(self, tensor: Tensor) -> bool:
            """Whether a tensor depends on the image."""
            return bool(self.sources(tensor))

        # --------------------------------------------------------------- operators

        def note(
            self,
            func: Any,
            name: str,
            args: tuple[Any, ...],
            tensors: Sequence[Tensor],
            made: Sequence[Tensor],
            macs: int,
        ) -> None:
            """Take one operator down."""
            into = [one for one in made if any(one is other for other in tensors)]
            into = into if func._schema.is_mutable else []
            if into and name in _VIEWS:
                return  # another order of the same elements
            if not into and any(_memory(made[0]) == _memory(one) for one in tensors):
                self.note_view(name, tensors[0], made)
                return
            reads: dict[tuple[object, ...], tuple[list[int], int]] = {}
            weights: dict[tuple[object, ...], int] = {}
            for tensor in tensors:
                if name in _OVERWRITES and any(tensor is one for one in into):
                    continue
                key = (_memory(tensor), *_reach(tensor), tuple(tensor.shape))
                if sources := self.sources(tensor):
                    reads.setdefault(key, (sources, _elements(tensor)))
                elif tensor.dim() and tensor.is_floating_point():  # no single number of the code
                    weights[key] = _elements(tensor)
            if not reads and not weights:
                return
            inputs: list[int] = []
            counts: list[int] = []
            for sources, elements in reads.values():
                inputs += sources
                counts += [elements // self.batch, *(0,) * (len(sources) - 1)]
            kind = _kind_of(name, inputs)
            on_weights = not inputs
            elements = sum(weights.values()) + on_weights * made[0].numel()
            bias = _bias_of(name, args)
            self.ops.append(
                Op(
                    kind="other" if on_weights else kind,
                    name=name,
                    module=self.stack[-1],
                    inputs=tuple(inputs),
                    reads=tuple(counts),
                    out_shape=() if on_weights else self.shape(made[0]),
                    out_elements=0 if on_weights else made[0].numel() // self.batch,
                    weight_elements=elements,
                    bias_elements=0 if bias is None or self.is_image(bias) else bias.numel(),
                    macs=macs // self.batch,
                    conv=_conv_shape(args, made[0]) if kind == "conv" else None,
                    window=_window(name, args) if kind == "pool" else None,
                    sensitive=not on_weights and _is_sensitive(kind, name, args),
                )
            )
            if on_weights:
                return
            place = len(self.ops) - 1
            for tensor in into or made:
                self.know(tensor, place)
                low, high = _reach(tensor)
                if into:
                    self.written.setdefault(_memory(tensor), []).append(
                        (low, high, place, self.clock)
                    )

        def note_view(self, name: str, base: Tensor, made: Sequence[Tensor]) -> None:
            """Take a view of the image's values down, where it is more than other axes."""
            sources = self.sources(base)
            if not sources:
                return
            whole = base.numel() == made[0].numel()
            same_order = made[0].is_contiguous() and base.is_contiguous()
            if name not in _VIEWS or (whole and same_order):
                for tensor in made:
                    self.pass_on(base, tensor)
                return
            if not whole:
                self.parts.update(map(id, made))
            elements = sum(tensor.numel() for tensor in made) // self.batch
            place = len(self.ops)
            self.ops.append(
                Op(
                    kind="view",
                    name=name,
                    module=self.stack[-1],
                    inputs=tuple(sources),
                    reads=(elements, *(0,) * (len(sources) - 1)),
                    out_shape=self.shape(made[0]),
                    out_elements=elements,
                )
            )
            for tensor in made:
                self.know(tensor, place)

        def pass_on(self, base: Tensor, view: Tensor) -> None:
            """Make a view that costs nothing stand for what its base does."""
            known = self.values.get(id(base))
            if id(base) in self.parts:
                self.parts.add(id(view))
            self.values[id(view)] = (
                (view, *known[1:]) if known else (view, self.sources(base)[-1], self.clock)
            )

        def shape(self, tensor: Tensor) -> tuple[int, ...]:
            """Return a tensor's sizes without the batch."""
            sizes = tuple(tensor.shape)
            return sizes[1:] if sizes and sizes[0] == self.batch else sizes

    return Recorder


def _memory(tensor: Tensor) -> int:
    """Return what tells one piece of memory from another while both are alive."""
    return int(tensor.untyped_storage()._cdata)


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Return the first element of its memory that a tensor uses, and the one behind its last."""
    low = int(tensor.storage_offset())
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return low, low + last + 1


def _elements(tensor: Tensor) -> int:
    """Return how many different elements a tensor has: what is expanded counts once."""
    count = math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )
    low, high = _reach(tensor)
    return min(count, high - low)


def _kind_of(name: str, inputs: Sequence[int]) -> OpKind:
    if name == "pow" and len(inputs) > 1:
        return "mul"
    return _KINDS.get(name, "other")


def _is_sensitive(kind: OpKind, name: str, args: tuple[Any, ...]) -> bool:
    """Whether autocast runs an operator in float32, or it needs the map as a whole."""
    if kind == "norm":
        return "batch_norm" not in name or _trains(name, args)
    return kind in ("softmax", "resize") or name in _SENSITIVE


def _trains(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a BatchNorm works with the batch's own mean and variance."""
    return name in ("native_batch_norm", "native_batch_norm_legit", "cudnn_batch_norm") and any(
        argument is True for argument in args[3:6]
    )


def _bias_of(name: str, args: tuple[Any, ...]) -> Tensor | None:
    if name in ("addmm", "baddbmm", "addmv"):
        bias: Tensor = args[0]
        return bias
    return args[2] if name in ("convolution", "linear") and len(args) > 2 else None


def _two(values: Sequence[int], default: int) -> tuple[int, int]:
    """Return (height, width) of a list of one number for each axis, or one for all."""
    numbers = [int(value) for value in values]
    if len(numbers) == 1:
        return (default, numbers[0])
    return (numbers[-2], numbers[-1])


def _conv_shape(args: tuple[Any, ...], result: Tensor) -> ConvShape:
    images, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
    axes = images.dim() - 2

    def two(values: Sequence[int], default: int) -> tuple[int, int]:
        return _two(list(values) * (axes if len(values) == 1 else 1), default)

    down, across = two(padding, 0)
    return ConvShape(
        in_channels=images.shape[1],
        out_channels=result.shape[1],
        groups=groups,
        kernel=two(weight.shape[2:], 1),
        stride=two(stride, 1),
        out=two(result.shape[2:], 1),
        padding=(2 * down, 2 * across),
        dilation=two(dilation, 1),
        transposed=bool(transposed),
    )


def _window(name: str, args: tuple[Any, ...]) -> Window | None:
    """Return the window of a pool; None where it adapts to the map."""
    if "adaptive" in name:
        return None
    _, kernel, *more = args
    stride = more[0] if more and more[0] else kernel
    rest = more[1:]
    dilation: Sequence[int] = (1, 1)
    padding = rest[0] if rest else (0, 0)
    if name.startswith("max") or name.startswith("mkldnn"):
        dilation = rest[1] if len(rest) > 1 else dilation
        ceil_mode = rest[2] if len(rest) > 2 else False
    else:
        ceil_mode = rest[1] if len(rest) > 1 else False

    def square(values: Sequence[int] | int) -> tuple[int, int]:
        numbers = [values] if isinstance(values, int) else list(values)
        return (numbers[0], numbers[-1])

    down, across = square(padding)
    return Window(
        kernel=square(kernel),
        stride=square(stride),
        padding=(2 * down, 2 * across),
        dilation=square(dilation),
        ceil_mode=bool(ceil_mode),
    )


# ------------------------------------------------------------------- ONNX files

_ONNX_KINDS = _kinds(
    {
        "conv": "Conv ConvTranspose ConvInteger QLinearConv",
        "matmul": "Gemm MatMul MatMulInteger QLinearMatMul",
        "norm": "BatchNormalization InstanceNormalization GroupNormalization LayerNormalization "
        "LRN LpNormalization RMSNormalization",
        "add": "Add Sum",
        "pool": "AveragePool MaxPool LpPool",
        "reduce": "GlobalAveragePool GlobalLpPool GlobalMaxPool ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
        "ArgMax ArgMin TopK",
        "softmax": "Softmax LogSoftmax Hardmax",
        "concat": "Concat",
        "resize": "Resize Upsample",
        "view": "Split Slice Transpose",
    }
)
_CASTS = frozenset(("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"))


def trace_onnx(
    model: str | Path | ModelProto, *, name: str, resolution: int | None = None
) -> Network:
    """Return an ONNX model's operators for one image, as `benchmarks.graph` counts them.

    `resolution` is the side of images where the file leaves it open. Changes of type (Q/DQ pairs,
    casts) are no operators. UsageError for files that are no whole models of one image input.
    """
    onnx = require("onnx", purpose="reading ONNX files", extra="export")
    from .graph import fix_input, read_costs

    if isinstance(model, (str, Path)):
        try:
            proto = onnx.load(model)
            onnx.checker.check_model(proto)
        except Exception as error:  # protobuf's errors have no common type
            raise UsageError(f"{model} is not a whole ONNX model: {first_line(error)}") from error
    else:
        proto = model
    sides = None if resolution is None else (resolution, resolution)
    fixed, shape = fix_input(proto, batch=None, sides=sides, name=name)
    cost = read_costs(fixed, name=name)
    batch = shape[0]
    nodes = {node.name or node.output[0]: node for node in fixed.graph.node}
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    sizes = {
        value.name: math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim) // batch
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    ops: list[Op] = []
    place: dict[str, int] = {}
    for layer in cost.unfused:
        inputs = tuple(place.get(tensor, -1) for tensor in layer.reads)
        if layer.operators[0] in _CASTS:
            place |= dict.fromkeys(layer.writes, inputs[0] if inputs else -1)
            continue
        reads = [sizes[tensor] for tensor in layer.reads]
        ops.append(_onnx_op(layer, nodes[layer.nodes[0]], inputs, reads, batch))
        place |= dict.fromkeys(layer.writes, len(ops) - 1)
    outputs = tuple(
        dict.fromkeys(
            place[tensor]
            for tensor in _last_tensors(fixed, cost.unfused)
            if place.get(tensor, -1) >= 0
        )
    )
    return Network(
        name=name,
        resolution=(shape[1], shape[2], shape[3]),
        ops=tuple(ops),
        outputs=outputs,
        params=cost.params,
    )


def _last_tensors(proto: ModelProto, layers: Iterable[Layer]) -> list[str]:
    """Return the tensors of layers that a graph's outputs are, through reshapes and the like."""
    made = {tensor for layer in layers for tensor in layer.writes}
    maker = {tensor: node for node in proto.graph.node for tensor in node.output}
    found = []
    for value in proto.graph.output:
        tensor = value.name
        while tensor not in made and tensor in maker and maker[tensor].input:
            tensor = maker[tensor].input[0]
        found.append(tensor)
    return found


def _onnx_op(
    layer: Layer, node: NodeProto, inputs: tuple[int, ...], reads: Sequence[int], batch: int
) -> Op:
    operator = layer.operators[0]
    kind = _ONNX_KINDS.get(operator)
    if kind is None:
        by_layer: dict[str, OpKind] = {"elementwise": "mul" if len(inputs) > 1 else "activation"}
        kind = by_layer.get(layer.kind, "copy")
    made = layer.activations // batch
    if operator in ("Slice", "Gather", "GatherElements", "GatherND"):
        reads = [min(count, made) for count in reads]
    weights = layer.params * (2 if operator == "BatchNormalization" else 1)
    conv = _onnx_conv(layer, node) if layer.convolution is not None else None
    bias = 0
    if conv is not None:
        bias = weights - conv.in_channels * conv.out_channels // conv.groups * math.prod(
            conv.kernel
        )
    return Op(
        kind=kind,
        name=operator,
        module=layer.module or layer.name,
        inputs=inputs,
        reads=tuple(reads),
        out_shape=layer.out_shape[1:] if layer.out_shape[:1] == (batch,) else layer.out_shape,
        out_elements=made,
        weight_elements=weights,
        bias_elements=max(0, bias),
        macs=layer.macs // batch,
        conv=conv,
        window=_onnx_window(node) if kind == "pool" else None,
        sensitive=kind in ("softmax", "resize")
        or (kind == "norm" and operator != "BatchNormalization"),
    )


def _attributes(node: NodeProto) -> dict[str, list[int]]:
    return {one.name: list(one.ints) for one in node.attribute}


def _onnx_window(node: NodeProto) -> Window | None:
    numbers = _attributes(node)
    axes = len(numbers.get("kernel_shape", ()))
    if axes not in (1, 2):
        return None
    down, across = _onnx_padding(numbers.get("pads", [0] * 2 * axes))
    return Window(
        kernel=_two(numbers["kernel_shape"], 1),
        stride=_two(numbers.get("strides") or [1] * axes, 1),
        padding=(down, across),
        dilation=_two(numbers.get("dilations") or [1] * axes, 1),
        ceil_mode=any(one.name == "ceil_mode" and one.i for one in node.attribute),
    )


def _onnx_padding(pads: Sequence[int]) -> tuple[int, int]:
    """Return what is padded on both sides together: ONNX lists all begins, then all ends."""
    axes = len(pads) // 2
    return _two([pads[axis] + pads[axis + axes] for axis in range(axes)], 0)


def _onnx_conv(layer: Layer, node: NodeProto) -> ConvShape:
    shape = layer.convolution
    assert shape is not None
    numbers, axes = _attributes(node), len(shape.window)
    return ConvShape(
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        groups=shape.groups,
        kernel=_two(shape.window, 1),
        stride=_two(numbers.get("strides") or [1] * axes, 1),
        out=_two(layer.out_shape[2:], 1),
        padding=_onnx_padding(numbers.get("pads") or [0] * 2 * axes),
        dilation=_two(numbers.get("dilations") or [1] * axes, 1),
        transposed=node.op_type == "ConvTranspose",
    )


# ------------------------------------------------------------------- names


def find_network(
    model: str | Path | nn.Module,
    *,
    graph_form: GraphForm = "deploy",
    resolution: int | None = None,
) -> Network:
    """Return the operators of whatever stands for a network.

    Args:
        model: a name of `list_models` (needs no torch), "timm:NAME", "torchvision:NAME", a path of
            an ONNX file, or a network.
        graph_form: "deploy" is what `fuse` makes, of timm what it reparameterizes; "train" is the
            network as built. An ONNX file has its own form only.
        resolution: height and width; default the model's own, 224, or what an ONNX file fixes.

    UsageError for unknown names and sizes that cannot be; MissingError for a library that is not
    installed.

    >>> find_network("repvgg_a9")
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: unknown model 'repvgg_a9'; did you mean 'repvgg_a2'? (see: litezoo list)
    """  # noqa: E501
    if graph_form not in get_args(GraphForm):
        raise unknown_name("graph form", graph_form, get_args(GraphForm))
    if resolution is not None and resolution < 1:
        raise UsageError(f"resolution is {resolution}; give 1 or more")
    if not isinstance(model, (str, Path)):
        return _of_module(model, graph_form, resolution)
    name = str(model)
    if isinstance(model, Path) or name.endswith(".onnx"):
        if not Path(name).is_file():
            raise UsageError(f"{name} is not there; give an ONNX file or a name of: litezoo list")
        return trace_onnx(name, name=Path(name).name, resolution=resolution)
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _of_library(name, graph_form, resolution)
    spec = get_spec(name)
    if name not in list_networks():  # a model of another package
        return _of_zoo(name, resolution or spec.resolution)[graph_form == "train"]
    network = catalogue_network(name, graph_form)
    side = resolution or spec.resolution
    return scale(network, (network.resolution[0], side, side))


def _of_module(module: nn.Module, graph_form: GraphForm, resolution: int | None) -> Network:
    from torch import nn

    from litezoo.models.fuse import fuse
    from litezoo.models.fuse import graph_form as form_of

    twin = _meta_twin(module)
    if graph_form == "deploy" and form_of(twin) == "train":
        twin = fuse(twin)
    first = next((one for one in twin.modules() if isinstance(one, nn.Conv2d)), None)
    side = resolution or 224
    channels = 3 if first is None else first.in_channels
    return _trace_twin(twin, type(module).__name__, (channels, side, side))


def _of_zoo(name: str, side: int) -> tuple[Network, Network]:
    """Build a model of the zoo and return (deploy form, train form)."""
    import torch

    from litezoo.models.fuse import fuse, graph_form

    with torch.device("meta"):
        train = get_spec(name).build().eval()
        deploy = fuse(train) if graph_form(train) == "train" else train
    shape = (3, side, side)
    return _trace_twin(deploy, name, shape), _trace_twin(train, name, shape)


def _of_library(name: str, graph_form: GraphForm, resolution: int | None) -> Network:
    """Build a network of timm or torchvision without weights, and trace it."""
    library, _, model = name.partition(":")
    package = require(library, purpose=f"tracing {name}", extra="all")
    import torch

    if library == "timm":
        if not package.is_model(model.partition(".")[0]):
            known = package.list_models()
            raise unknown_name("timm model", model, known, see="timm.list_models()")
        network = _build_meta(lambda: package.create_model(model, pretrained=False))
        config: Mapping[str, Any] = getattr(network, "pretrained_cfg", {})
        own = tuple(config.get("input_size") or (3, 224, 224))
        if graph_form == "deploy":
            with torch.device("meta"):
                network = package.utils.reparameterize_model(network)
    else:
        known = package.models.list_models(module=package.models)
        if model not in known:
            see = "torchvision.models.list_models()"
            raise unknown_name("torchvision model", model, known, see=see)
        network = _build_meta(lambda: package.models.get_model(model, weights=None))
        own = (3, 299, 299) if model == "inception_v3" else (3, 224, 224)
    channels, *sides = own
    height, width = sides if resolution is None else (resolution, resolution)
    return _trace_twin(network, name, (channels, height, width))


def _build_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the meta device; where its code reads values, on the CPU before."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):
            return _meta_twin(build())


# ------------------------------------------------------------------- networks.json


def trace_model(name: str) -> tuple[Network, Network]:
    """Return (deploy form, train form) of a model of the zoo at its own resolution."""
    return _of_zoo(name, get_spec(name).resolution)


def check_networks() -> None:
    """Raise CheckFailed where networks.json is not what the code makes."""
    for name in list_models():
        if (catalogue_network(name), catalogue_network(name, "train")) != trace_model(name):
            raise CheckFailed(
                f"{name} in networks.json is not what the code makes of it; write the file anew: "
                "python -m litezoo.benchmarks.tracing"
            )


def main(words: Sequence[str] | None = None) -> int:
    """Write networks.json anew, or with --check compare it with the code."""
    parser = argparse.ArgumentParser(prog="python -m litezoo.benchmarks.tracing")
    parser.add_argument("--check", action="store_true", help="status 3 if it is not up to date")
    if parser.parse_args(words).check:
        try:
            check_networks()
        except LitezooError as error:
            print(error, file=sys.stderr)
            return error.exit_status
        return 0
    from litezoo.models.files import write_whole

    file = Path(__file__).with_name("networks.json")
    write_whole(file, write_networks(map(trace_model, list_models())))
    print(f"{file}: {len(list_models())} models, {file.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
