"""What is summed over calibration tokens: one pure function per statistic.

``per="expert"`` functions see one expert's tokens of a batch and return its row; ``per="batch"`` functions see the
routing of a batch. They run for every expert of every batch: reductions of the expert's output accumulate in float32
within a batch, and batches are added in float64.
"""
