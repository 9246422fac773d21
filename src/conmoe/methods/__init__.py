"""One paper per file: ``(statistics, experts, keep, *, options) -> LayerPlan``.

Methods see one layer (or a scope of layers joined into one), without protected experts and one router group at a time;
:mod:`conmoe.plan` sees to that.
"""

DEFAULT_METHOD = "conmoe"
