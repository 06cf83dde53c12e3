"""Run a model in the common runtimes, each checked against eager PyTorch."""

from vitrim.deploy.runtimes.peak import peak_bytes
from vitrim.deploy.runtimes.ready import READS_ONNX, RUNTIMES, Ready, check_runtimes, ready, weights_bytes

__all__ = ["READS_ONNX", "RUNTIMES", "Ready", "check_runtimes", "peak_bytes", "ready", "weights_bytes"]
