"""Every member as PyTorch's own tools see it: export, compile, number formats, layouts, pickles.

On the meta device where shapes are what matters; with numbers for the smallest of each family.
"""

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import images, relative_error
from test_models import NAMES, blank, create_on_meta, every_member, small, small_members
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export

import litezoo.models
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse, fuse_with_report

HALVES = [torch.float16, torch.bfloat16]
#: A network's sum of bfloat16's rounding (3 digits), in the root mean square over its logits.
BFLOAT16_BOUND = 0.1


# ----------------------------------------------------------------------- export


def structure(model):
    """Return what a network is made of, but for its widths: its modules, their place and flags."""
    return tuple(
        (
            name,
            type(module),
            *(getattr(module, key, None) for key in ("kernel_size", "stride", "padding")),
            getattr(module, "groups", 1) == 1,
            *(f"{k}={v}" for k, v in vars(module).items() if isinstance(v, (bool, str))),
        )
        for name, module in model.named_modules()
    )


@torch.no_grad()
def export_with_any_batch(model, *, strict):
    """Return the program of `model`, whose batch is a symbol in both input and output."""
    batch = Dim("batch", min=1)
    program = export(model, (blank(2, 3, 64, 64),), dynamic_shapes=({0: batch},), strict=strict)
    graph = program.graph
    (given,) = [n for n in graph.nodes if n.name in program.graph_signature.user_inputs]
    (made,) = [n for n in graph.nodes if n.name in program.graph_signature.user_outputs]
    symbol, shape = given.meta["val"].shape[0], made.meta["val"].shape
    assert isinstance(symbol, torch.SymInt) and symbol.node.expr.is_Symbol, "the batch is fixed"
    assert shape[0].node.expr == symbol.node.expr and tuple(shape[1:]) == (1000,)
    bounds = program.range_constraints[symbol.node.expr]
    assert bounds.lower <= 1 and bounds.upper > 2**30
    return program


EXPORTED = {}


@every_member
def test_it_is_exported_with_a_batch_of_any_size(name):
    """Networks that differ in their widths only are exported once; the shapes are symbolic."""
    model = create_on_meta(name)
    key = structure(model)
    if key not in EXPORTED:
        export_with_any_batch(model, strict=False)
        EXPORTED[key] = name


@small_members
def test_the_exported_program_runs_at_another_batch(name):
    """In strict mode, which reads the Python code, so that nothing in it can hang on the input."""
    program = export_with_any_batch(create_on_meta(name), strict=True)
    run = program.module()
    for batch in (1, 3):
        assert run(blank(batch, 3, 64, 64)).shape == (batch, 1000)
    with pytest.raises(AssertionError):
        run(blank(2, 3, 64, 32))


@small_members
def test_it_is_compiled_as_one_graph_for_batches_of_any_size(name):
    torch._dynamo.reset()
    model, counter = small(name), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.inference_mode():
        for batch in (2, 3, 5):
            x = images(batch, 3, 32, 32, seed=batch)
            expected = model(x)
            torch._dynamo.mark_dynamic(x, 0)
            assert relative_error(compiled(x), expected) <= 1e-6
    assert counter.frame_count == 1, "one compilation serves all batches"
    torch._dynamo.reset()


# ----------------------------------------------------------------------- memory layout


@small_members
@torch.inference_mode()
def test_channels_last_gives_the_same_output(name):
    plain, x = small(name), images(2, 3, 64, 64)
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    expected = plain.forward_features(x.clone()), plain(x.clone())
    x = x.contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip((model.forward_features(x), model(x)), expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@small_members
def test_channels_last_lasts_to_the_last_map(name):
    """A view that falls back to NCHW would cost a copy of every map behind it."""
    model = create_on_meta(name).to(memory_format=torch.channels_last)
    x = blank(2, 3, 64, 64).to(memory_format=torch.channels_last)
    features = shape_preserving(model.forward_features, x)
    assert features.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def shape_preserving(module, x):
    return module(x)


# ----------------------------------------------------------------------- number formats


@every_member
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_stays_half_precision(name, dtype):
    model = create_on_meta(name).to(dtype)
    with torch.inference_mode():
        features = model.forward_features(blank(2, 3, 32, 32).to(dtype))
        logits = model.forward_head(features)
    assert features.dtype == logits.dtype == dtype and logits.shape == (2, 1000)


@small_members
@torch.inference_mode()
def test_bfloat16_is_close_to_float32(name):
    model = calm(copy.deepcopy(small(name)))
    x = images(4, 3, 64, 64)
    expected = model(x)
    logits = model.to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error <= BFLOAT16_BOUND


def calm(model):
    return model


# ----------------------------------------------------------------------- copies


@every_member
def test_a_spec_survives_a_pickle_and_a_copy(name):
    spec = get_spec(name)
    for twin in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert twin == spec and twin is not spec
        assert twin.build.__func__ is spec.build.__func__


@every_member
def test_a_network_survives_a_pickle_and_a_copy(name):
    """As torch.save, multiprocessing and averages of weights do it."""
    model = create_on_meta(name)
    state = {k: v.shape for k, v in model.state_dict().items()}
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert {k: v.shape for k, v in twin.state_dict().items()} == state
        assert structure(twin) == structure(model)


# ----------------------------------------------------------------------- TorchScript

FAMILY_FILES = sorted(Path(litezoo.models.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.stem)
def test_no_network_is_written_for_torchscript(file):
    """It is deprecated: torch.export takes its place."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.jit", node.lineno
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("torch.jit") for alias in node.names), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not any(name.startswith("torch.jit") for name in names), node.lineno
