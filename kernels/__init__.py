"""GPU operations of diffaccel."""

if __name__ == "kernels":  # a repository root is on sys.path, where this folder hides the hub's package `kernels`
    import sys
    from importlib.machinery import ModuleSpec, PathFinder
    from importlib.util import module_from_spec
    from linecache import getline
    from os.path import abspath, join

    others = [path for path in sys.path if "of diffaccel" not in getline(abspath(join(path, "kernels/__init__.py")), 1)]
    spec = PathFinder.find_spec("kernels", others) or ModuleSpec("kernels", None)  # empty: an error breaks transformers
    sys.modules["kernels"] = module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(sys.modules["kernels"])
