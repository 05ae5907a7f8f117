"""An audit of a server that has nothing of vgen: vLLM's definition of its model, built here without weights.

The definition comes from the configuration that the server names, and is built on the meta device in a process of its
own, which ends afterwards: vLLM changes the process that it runs in. See `load_audit` for what is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...engine_protocol import TensorMetadata
from ...errors import WeightSyncError, error_from_dict, error_to_dict
from ..verification.checkpoint_rows import local_folder
from .load_audit import audit_load

SECONDS = 300.0
"""For the other process. Most of its time is spent on the import of vLLM."""
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a launcher makes a process one of several ranks."""


def audit_definition(
    definition: Mapping[str, Any], metadata: TensorMetadata, ties: Mapping[str, str], receiver: str
) -> dict[str, Any]:
    """What the loader of that definition would do with such tensors: `LoadAudit.report`.

    `definition` has vLLM's arguments of the server, and as `vllm_version` the version there, which may define the model
    in another way.

    Raises:
        WeightSyncError: As `LoadAudit.require` and `audit_load` do.
    """
    name = str(definition.get("hf_config_path") or definition.get("model") or "")
    if find_spec("vllm") is None:
        return _unaudited("vLLM is not installed beside the trainer")
    if (folder := local_folder(name, definition.get("revision"))) is None:
        return _unaudited(f"the configuration of its model, {name!r}, is not on this host")
    tensors = [(name, str(dtype).removeprefix("torch."), list(shape)) for name, shape, dtype in metadata]
    task = {"definition": {**definition, "model": str(folder)}, "tensors": tensors, "ties": dict(ties)}
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    environment |= {"VLLM_PLUGINS": "", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(task | {"receiver": receiver}), env=environment, capture_output=True, text=True,
            errors="replace", timeout=SECONDS,
        )  # fmt: skip
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _unaudited(f"vLLM beside the trainer has not built its model within {SECONDS:g} s")
    except OSError as error:
        return _unaudited(f"no process for vLLM could be started beside the trainer: {error.strerror or error}")
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        return _unaudited(f"vLLM beside the trainer cannot build its model: it ended with {done.returncode}: {last[0]}")
    if "error" in answer:
        raise error_from_dict(answer["error"])
    return answer


def _unaudited(reason: str) -> dict[str, Any]:
    return {"unaudited": f"the server does not run vgen's plugin, and {reason}", "narrowed": []}


def _audit(task: Mapping[str, Any]) -> dict[str, Any]:
    """In the other process: an answer to `audit_definition`."""
    import vllm

    definition, ties, receiver = task["definition"], task["ties"], task["receiver"]
    version, here = (str(each).partition("+")[0] for each in (definition.get("vllm_version"), vllm.__version__))
    if version not in ("None", here):
        return _unaudited(f"it runs vLLM {version}, where {here} is installed beside the trainer")
    metadata = [(name, tuple(shape), getattr(torch, dtype)) for name, dtype, shape in task["tensors"]]
    with TemporaryDirectory(prefix="vgen-audit-") as folder:
        try:
            config, model = _meta_model(definition, Path(folder))
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            return _unaudited(f"vLLM beside the trainer cannot build its model: {type(error).__name__}: {said}")
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            audit = audit_load(model, metadata, ties, receiver)
    audit.require(ties, receiver)
    return audit.report()


def _meta_model(definition: Mapping[str, Any], folder: Path) -> tuple[Any, torch.nn.Module]:
    """vLLM's configuration and model, without data. `folder` is for the process group of this one process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # `model` is the folder of the configuration here.
    others = {"vllm_version", "revision", "hf_config_path"}
    fields = {name: value for name, value in definition.items() if value and name not in others}
    fields["dtype"] = str(fields.get("dtype", "auto")).removeprefix("torch.")
    config = EngineArgs(**fields, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True)
    config = config.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'group'}", 0, "gloo")
        initialize_model_parallel()
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return config, initialize_model(config)


def main() -> None:
    """Read a task as JSON from standard input, and write the answer to standard output."""
    answer_to = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to standard output
    try:
        answer = _audit(json.load(sys.stdin))
    except WeightSyncError as error:
        answer = {"error": error_to_dict(error)}
    except Exception as error:
        answer = _unaudited(f"its loader cannot be observed beside the trainer: {type(error).__name__}")
    with os.fdopen(answer_to, "w") as out:
        json.dump(answer, out)


if __name__ == "__main__":
    main()
