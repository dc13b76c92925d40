"""The ops over lists of tensors under hypothesis."""

from __future__ import annotations

import loss_cases as cases
from budget import share
from hypothesis import given
from oracle import check


@share(4)
@given(cases.patch_cases())
def test_patch_loss(case: cases.PatchCase) -> None:
    check(case)


@share(4)
@given(cases.matching_cases())
def test_feature_matching_loss(case: cases.MatchingCase) -> None:
    check(case)


@share(3.2)
@given(cases.sigma_cases())
def test_spectral_sigma(case: cases.SigmaCase) -> None:
    check(case)
