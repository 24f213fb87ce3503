"""How a network becomes an engine: ONNX, typed precision, one file per runtime, verified."""
