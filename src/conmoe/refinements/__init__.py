"""Refinements: fit what a plan answers to what the layer's own experts added. One a file.

A refinement is one decorated function, ``(answers, held_n, frozen, *, options) -> LayerPlan``. It looks at one layer
(or scope) on its token sample, fits to the tokens that are not held out, and leaves ``frozen`` prototypes as they are.
Whether the result is taken is decided around it, by :func:`conmoe.refine.refine`.
"""
