"""Every member as PyTorch's own tools see it: export, compile, memory layouts, dtypes, pickles.

On the meta device where shapes are what matters; with numbers for the smallest of each family.
"""

import ast
import copy
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import images, kinds_of_layers, relative_error, shallow, structure
from test_models import (
    blank,
    every_member,
    shallow_small,
    small,
    small_members,
    smallest_of_each_family,
    train_form,
)
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export

import litezoo.models
from litezoo.models.catalogue import get_spec

SMALL = frozenset(smallest_of_each_family())


def own_part(logits):
    """Return what is different between the images of a batch."""
    return logits - logits.mean(0)


@small_members
@torch.inference_mode()
def test_the_output_hangs_on_the_image(name):
    """What the comparisons below rest on."""
    logits = small(name)(images(4, 3, 64, 64))
    assert own_part(logits).std() > 0.01 * logits.std()


# ----------------------------------------------------------------------- export and compile


@cache
@torch.no_grad()
def program(name):
    """Return the train form as exported, its batch one symbol in both input and output.

    Its blocks are there once or twice: the further ones are exported as these are.
    """
    device = "cpu" if name in SMALL else "meta"
    with torch.device(device):
        model = shallow(get_spec(name)).build().eval()
    assert kinds_of_layers(model) == kinds_of_layers(train_form(name))
    exported = export(
        model,
        (torch.zeros(2, 3, 64, 64, device=device),),
        dynamic_shapes=({0: Dim("batch", min=1)},),
        strict=False,
    )
    signature, values = exported.graph_signature, {n.name: n.meta for n in exported.graph.nodes}
    (given,) = (values[name]["val"] for name in signature.user_inputs)
    (made,) = (values[name]["val"] for name in signature.user_outputs)
    batch = given.shape[0].node.expr
    assert batch.is_Symbol and made.shape[0].node.expr == batch
    assert tuple(given.shape[1:]) == (3, 64, 64) and tuple(made.shape[1:]) == (1000,)
    assert exported.range_constraints[batch].lower <= 1
    assert exported.range_constraints[batch].upper > 2**30
    return exported


EXPORTED = {}  # programs, by the kinds of layers in them


@every_member
def test_it_is_exported_for_a_batch_of_any_size(name):
    """Of networks made of the same kinds of layers, or of some of them, one is."""
    kinds = kinds_of_layers(train_form(name))
    if not any(kinds <= exported for exported in EXPORTED):
        EXPORTED[kinds] = program(name)


@small_members
def test_the_exported_program_runs_at_another_batch(name):
    run = program(name).module()
    for batch in (1, 3):
        assert run(images(batch, 3, 64, 64)).shape == (batch, 1000)
    with pytest.raises(AssertionError, match="64"):
        run(images(2, 3, 64, 32))


@small_members
@torch.inference_mode()
def test_it_is_compiled_once_as_one_graph_for_all_batches(name):
    torch.compiler.reset()
    model, compilations = shallow_small(name), CompileCounter()
    compiled = torch.compile(model, backend=compilations, fullgraph=True)
    for batch in (2, 3, 5):
        x = images(batch, 3, 32, 32, seed=batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert relative_error(compiled(x), model(x)) <= 1e-6
    assert compilations.frame_count == 1
    torch.compiler.reset()


# ----------------------------------------------------------------------- memory layout


@small_members
@torch.inference_mode()
def test_channels_last_gives_the_same_output(name):
    x = images(4, 3, 64, 64)
    expected = small(name)(x)
    model = copy.deepcopy(small(name)).to(memory_format=torch.channels_last)
    features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last), "a layer fell back to NCHW"
    logits = model.forward_head(features)
    assert relative_error(own_part(logits), own_part(expected)) <= 1e-4


# ----------------------------------------------------------------------- dtypes


@every_member
@torch.inference_mode()
def test_half_precision_stays_half_precision(name):
    model = copy.deepcopy(train_form(name)).bfloat16()
    features = model.forward_features(blank(2, 3, 32, 32).bfloat16())
    logits = model.forward_head(features)
    assert features.dtype == logits.dtype == torch.bfloat16 and logits.shape == (2, 1000)


@small_members
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param(torch.float16, 0.05, id="float16"),
        pytest.param(torch.bfloat16, 0.4, id="bfloat16"),
    ],
)
@torch.inference_mode()
def test_half_precision_gives_close_numbers(name, dtype, bound):
    """Dozens of layers of 11 or 8 bits; two independent networks would differ by 1.4."""
    x = images(2, 3, 64, 64)
    expected = small(name)(x)
    logits = copy.deepcopy(small(name)).to(dtype)(x.to(dtype)).float()
    assert relative_error(logits, expected) <= bound
    error = (logits - expected).square().mean() / own_part(expected).square().mean()
    assert 1e-4 < float(error.sqrt()) <= bound


# ----------------------------------------------------------------------- copies


@every_member
def test_a_spec_survives_a_pickle_and_a_copy(name):
    spec = get_spec(name)
    for twin in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert twin == spec and twin is not spec


@every_member
def test_a_network_survives_a_pickle_and_a_copy(name):
    """As torch.save, other processes and averages of weights need it."""
    model = train_form(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert {key: value.shape for key, value in twin.state_dict().items()} == shapes
        assert structure(twin) == structure(model)
        assert twin.feature_info == model.feature_info


# ----------------------------------------------------------------------- TorchScript

SOURCES = sorted(Path(litezoo.models.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_nothing_is_written_for_torchscript(file):
    """It is deprecated; torch.export has taken its place."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    assert not [name for name in names if name.startswith("torch.jit")]
