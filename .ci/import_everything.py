"""Import every module of one installed package: `python -I import_everything.py dpfa_core`."""

import importlib
import pkgutil
import sys


def import_everything(name: str) -> int:
    """Import the package and all its modules save `__main__`, which would run; return how many there are."""
    package = importlib.import_module(name)
    found = [module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")]
    modules = [module for module in found if not module.endswith(".__main__")]
    for module in modules:
        importlib.import_module(module)
    return 1 + len(modules)


if __name__ == "__main__":
    print(f"{sys.argv[1]}: {import_everything(sys.argv[1])} modules import")
