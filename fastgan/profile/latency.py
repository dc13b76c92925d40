"""The one harness that measures time: candidates interleaved in one process, medians with spread, beside measured limits.

A shared machine changes speed from second to second. So every round runs each candidate once, in rotating order, and ratios are
medians of the ratios of a round: what slows a whole round cancels.
"""
