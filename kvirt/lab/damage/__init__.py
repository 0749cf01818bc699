# SPDX-License-Identifier: GPL-2.0-only
"""Damage for every invariant, laid over a dump: shows that a check finds what it is there to find.

Each way to break an invariant is one function of a module here, registered with ``@damage``.
"""

import importlib
import pkgutil

from kvirt.lab.damage.scene import DAMAGES, Damaged, Scene

__all__ = ["DAMAGES", "Damaged", "Scene"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
