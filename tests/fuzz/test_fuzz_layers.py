"""The other ops of layers under hypothesis."""

from __future__ import annotations

import dense_cases
import layer_cases as cases
from budget import share
from hypothesis import given
from oracle import check


@share(4)
@given(cases.modulated_cases())
def test_modulated_conv2d(case: cases.ModulatedCase) -> None:
    check(case)


@share(4.8)
@given(cases.filter_cases())
def test_upfirdn2d(case: cases.FilterCase) -> None:
    check(case)


@share(5.6)
@given(cases.norm_cases())
def test_norm_act(case: cases.NormCase) -> None:
    check(case)


@share(3.2)
@given(cases.bias_cases())
def test_bias_act(case: cases.BiasCase) -> None:
    check(case)


@share(2.4)
@given(cases.pixel_cases())
def test_pixel_norm(case: cases.PixelCase) -> None:
    check(case)


@share(2.4)
@given(cases.stddev_cases())
def test_minibatch_stddev(case: cases.StddevCase) -> None:
    check(case)


@share(2.4)
@given(dense_cases.dense_cases())
def test_dense_block(case: dense_cases.DenseCase) -> None:
    check(case)
