"""Normalisation in the graph: the same logits from bytes as from normalised floats."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.parser import parse_model
from test_models import small

from litezoo.export.embed import EMBEDDED, IMAGES, embed_preprocess
from litezoo.export.to_half import HALVES, to_half
from litezoo.export.to_int8 import quantize
from litezoo.export.to_onnx import export_onnx, load_onnx
from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse

SIZE = 32
PREPROCESS = Preprocess(input_size=(3, SIZE, SIZE))
BYTES = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


def normalised(images, preprocess=PREPROCESS):
    """By the definition, in float64: (x / 255 - mean) / std, channels first."""
    scaled = (images / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)).astype(np.float32)


@cache
def float_file():
    module = fuse(small("repvgg_a0")).eval()
    return export_onnx(module, normalised(BYTES[:2]), metadata={"litezoo.model": "repvgg_a0"})


@cache
def file(form):
    if form == "fp32":
        return float_file()
    if form.endswith(HALVES):
        return to_half(file("int8" if form.startswith("int8") else "fp32"), form[-4:])
    return quantize(float_file(), normalised(BYTES), form=form)


def largest_difference(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def run_openvino(proto, images):
    pytest.importorskip("openvino")
    from litezoo.export.runtime_openvino import one_core

    model = one_core().read_model(proto.SerializeToString())
    compiled = one_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(images)[0]


RUN = {"ort": lambda proto, images: load_onnx(proto)(images), "openvino": run_openvino}
every_form = pytest.mark.parametrize(
    "form", ["fp32", "fp16", "bf16", "int8", "int8-u8s8", "int8-fp16"]
)
#: The input is the same to its last bit but one (below), of which 22 layers make more;
#: 16-bit and 8-bit files may round to another step.
BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@every_form
def test_an_embedded_file_gives_from_bytes_what_the_plain_file_gives_normalised(form, runtime):
    run = RUN[runtime]
    plain, embedded = file(form), embed_preprocess(file(form), PREPROCESS)
    got, want = run(embedded, BYTES), run(plain, normalised(BYTES))
    assert largest_difference(got, want) <= BOUNDS.get(form, 5e-2)
    assert largest_difference(run(plain, normalised(BYTES)[:, ::-1].copy()), want) > 5e-2


@settings(deadline=None, max_examples=40)
@given(data=st.data(), channels=st.sampled_from([1, 3, 4]))
def test_the_normalisation_is_that_of_the_definition(data, channels):
    size = (channels, 3, 5)  # not square: height and width must not be swapped
    numbers = st.floats(0.1, 0.9)
    mean, std = (tuple(data.draw(numbers) for _ in range(channels)) for _ in range(2))
    preprocess = Preprocess(input_size=size, mean=mean, std=std)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 5, channels), dtype=np.uint8)
    plain = parse_model(
        f"""<ir_version: 8, opset_import: ["" : 20]>
        g (float[batch,{channels},3,5] input) => (float[batch,{channels},3,5] logits)
        {{ logits = Identity(input) }}"""
    )
    got = load_onnx(embed_preprocess(plain, preprocess))(images)
    assert largest_difference(got, normalised(images, preprocess)) <= 1e-6


def test_the_input_is_uint8_with_channels_last_and_an_open_batch():
    embedded = embed_preprocess(file("fp32"), PREPROCESS)
    (entry,) = onnxruntime.InferenceSession(
        embedded.SerializeToString(), providers=["CPUExecutionProvider"]
    ).get_inputs()
    assert (entry.name, entry.type) == (IMAGES, "tensor(uint8)")
    assert entry.shape[1:] == [SIZE, SIZE, 3] and isinstance(entry.shape[0], str)


def test_properties_stay_and_say_that_preprocessing_is_embedded():
    plain = file("fp32")
    before = plain.SerializeToString()
    properties = {e.key: e.value for e in embed_preprocess(plain, PREPROCESS).metadata_props}
    assert properties == {"litezoo.model": "repvgg_a0", EMBEDDED: "true"}
    assert plain.SerializeToString() == before


def test_embedding_twice_is_refused():
    with pytest.raises(UsageError, match="normalises its images already"):
        embed_preprocess(embed_preprocess(file("fp32"), PREPROCESS), PREPROCESS)


def test_preprocessing_of_another_size_is_refused():
    with pytest.raises(UsageError, match=r"makes \(N, 3, 224, 224\)"):
        embed_preprocess(file("fp32"), Preprocess())


def test_a_file_whose_input_is_not_float32_is_refused():
    proto = onnx.ModelProto()
    proto.CopyFrom(file("fp32"))
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(UsageError, match="one input of float32"):
        embed_preprocess(proto, PREPROCESS)


def test_a_tensor_of_the_new_inputs_name_is_refused():
    proto = onnx.ModelProto()
    proto.CopyFrom(file("fp32"))
    proto.graph.node.append(helper.make_node("Identity", ["input"], [IMAGES], "clash"))
    with pytest.raises(UsageError, match="already has a tensor images"):
        embed_preprocess(proto, PREPROCESS)


def test_a_fixed_batch_stays_fixed():
    proto = onnx.ModelProto()
    proto.CopyFrom(file("fp32"))
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 1
    embedded = embed_preprocess(proto, PREPROCESS)
    dims = embedded.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [1, SIZE, SIZE, 3]


def test_folding_into_a_padded_convolution_would_be_wrong_along_the_border():
    """Why it is not done: padding is of zeros behind the normalisation, not of the mean colour."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(normalised(BYTES[:1]))
    raw = torch.from_numpy(BYTES[:1].transpose(0, 3, 1, 2).astype(np.float32))
    weight = torch.randn(4, 3, 3, 3)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in (PREPROCESS.mean, PREPROCESS.std))
    folded = F.conv2d(raw, weight / std, -(weight * mean / std).sum((1, 2, 3)), padding=1)
    wrong = (folded - F.conv2d(x, weight, padding=1)).abs().amax((0, 1))
    assert wrong[1:-1, 1:-1].max() < 1e-3 < wrong[0].max()
