"""What TensorRT's ONNX parser takes, as far as a file shows it; TensorRT itself is not run.

Source: operators.md of onnx/onnx-tensorrt for TensorRT 10.15: opset 9 to 24, and these operators out of those that an
exporter may write for a transformer.
"""

from pathlib import Path

import onnx

OPSETS = range(9, 25)

OPERATORS = set(
    "Add And ArgMax ArgMin BatchNormalization Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum "
    "Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater "
    "GreaterOrEqual Identity If IsInf IsNaN LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or "
    "Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Reshape Resize "
    "RMSNormalization Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Split Sqrt Squeeze Sub "
    "Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where".split()
)


def why_not_tensorrt(path: Path) -> list[str]:
    """Return what TensorRT's parser would refuse in a file with static shapes, a sentence each."""
    model = onnx.load(path)
    found = [
        f"opset {entry.version} must be 9 to 24"
        for entry in model.opset_import
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS
    ]
    functions = [node for function in model.functions for node in function.node]
    for node in [*model.graph.node, *functions]:
        if node.domain in ("", "ai.onnx") and node.op_type not in OPERATORS:
            found.append(f"{node.op_type} has no form there")
        # "reduction other than none is not supported", said of ScatterND
        if node.op_type == "ScatterND" and any(a.name == "reduction" and a.s != b"none" for a in node.attribute):
            found.append("ScatterND must not reduce")
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            found.append(f"{node.op_type} must have zero points of 0")
    for value in [*model.graph.input, *model.graph.output]:
        if not all(side.HasField("dim_value") for side in value.type.tensor_type.shape.dim):
            found.append(f"{value.name} must have a static shape")
    return sorted(set(found))
