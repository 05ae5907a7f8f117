"""Server processes whose linear layers keep the layout they are loaded with, as on a GPU."""

from __future__ import annotations

from pathlib import Path

SITE_CUSTOMIZE = '''
import importlib.abc, importlib.util, sys

class Keeping(importlib.abc.MetaPathFinder):
    """As on a GPU, linear layers keep the layout they are loaded with."""

    def find_spec(self, name, path, target=None):
        if name != "vllm._custom_ops":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module._supports_onednn = False
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Keeping())
'''


def plain_layout_environment(folder: Path) -> dict[str, str]:
    """Write into `folder`, which is created, what switches oneDNN's packing off. Returns the variables for it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    return {"PYTHONPATH": str(folder)}
