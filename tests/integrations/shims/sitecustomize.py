"""Lets torchvision and mmsegmentation import where their compiled parts cannot be loaded.

Python imports a module of this name at its start, so that this folder on PYTHONPATH is enough: programs
that import those libraries run as they are. No test uses an operator that is missing.

- torchvision's wheel from PyPI is built against a torch with CUDA. Beside a CPU build of torch its library
  does not load, and its Python part fails at operators that were never registered: they get a schema.
- mmcv-lite has no compiled operators, yet mmsegmentation imports pages that look them up: they find None.
"""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

# keeps the schemas registered
libraries = []


def _loads(package: types.ModuleType | importlib.machinery.ModuleSpec) -> bool:
    """Whether torchvision's own library can be loaded."""
    import torch

    folder = Path(package.submodule_search_locations[0])
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def _define_schemas() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    libraries.append(library)


class _EmptyExtension(types.ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Finder:
    """Stands before Python's own finders and looks at two names."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and not libraries:
            package = importlib.machinery.PathFinder.find_spec(name)
            if package is not None and not _loads(package):
                _define_schemas()
        if name == "mmcv._ext" and importlib.machinery.PathFinder.find_spec(name, path) is None:
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyExtension(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, Finder())
