"""Scale rules, worked by hand on a pair of rank 1 and checked against dense products on larger ones."""

from math import sqrt

import numpy as np
import pytest

from moerge.compression import scales
from moerge.compression.scales import Kept, Product

# B·A of A = [2 1], B = [3 1]ᵀ is [[6 3] [2 1]], its image by A = [2 0], B = [3 0]ᵀ is [[6 0] [0 0]].
WORKED = Product(oo=50.0, x=36.0, hh=36.0)


def f32(values):
    return np.array(values, np.float32)


def test_inner_products_of_a_pair_of_rank_one():
    found = scales.product(f32([[2, 1]]), f32([[3], [1]]), f32([[2, 0]]), f32([[3], [0]]))
    assert found == WORKED


@pytest.mark.parametrize(("rank", "width", "height"), [(1, 5, 4), (3, 7, 2), (16, 400, 90)])
def test_inner_products_equal_those_of_dense_products(rank, width, height):
    rng = np.random.default_rng(rank)
    A, B, A_image, B_image = (
        rng.normal(size=shape).astype(np.float32) for shape in ((rank, width), (height, rank)) * 2
    )  # fmt: skip
    found = scales.product(A, B, A_image, B_image)
    dense, image = B.astype(np.float64) @ A, B_image.astype(np.float64) @ A_image
    assert found.oo == pytest.approx((dense * dense).sum(), rel=1e-6)
    assert found.x == pytest.approx((dense * image).sum(), rel=1e-5)
    assert found.hh == pytest.approx((image * image).sum(), rel=1e-6)


def test_inner_products_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(4, 50)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    whole = scales.product(A, B, A / 2, B * 3)
    monkeypatch.setattr(scales, "_BLOCK_VALUES", 28)
    parts = scales.product(A, B, A / 2, B * 3)
    assert (parts.oo, parts.x, parts.hh) == pytest.approx((whole.oo, whole.x, whole.hh), rel=1e-12)
    assert whole.x == pytest.approx(1.5 * whole.oo, rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("unbiased", 50 / 36), ("norm", sqrt(50 / 36)), ("proj", 1.0), ("geo", (50 / 36) ** 0.75), ("mse", 1.0)],
)
def test_each_rule_on_the_worked_pair(rule, expected):
    assert scales.factor(WORKED, rule) == pytest.approx(expected)


def test_the_projection_shrinks_where_the_image_is_too_long():
    assert scales.factor(Product(oo=8, x=6, hh=9), "proj") == pytest.approx(6 / 9)


def test_the_unbiased_factor_is_at_most_four_norms():
    # The cosine is 0.2, so the unbiased factor would be 5 norms.
    weak = Product(oo=1.0, x=0.2 * 3, hh=9.0)
    assert scales.factor(weak, "norm") == pytest.approx(1 / 3)
    assert scales.factor(weak, "unbiased") == pytest.approx(4 / 3)
    assert scales.factor(weak, "geo") == pytest.approx(2 / 3)
    at_the_edge = Product(oo=1.0, x=0.26 * 3, hh=9.0)
    assert scales.factor(at_the_edge, "unbiased") == pytest.approx(1 / 0.78)


@pytest.mark.parametrize("rule", ["unbiased", "norm", "proj", "geo"])
@pytest.mark.parametrize("x", [0.0, -2.0])
def test_a_product_that_lost_its_direction_keeps_its_norm(rule, x):
    assert scales.factor(Product(oo=4.0, x=x, hh=1.0), rule) == pytest.approx(2.0)


@pytest.mark.parametrize("rule", ["unbiased", "norm", "proj", "geo"])
def test_a_product_of_zero_has_scale_zero(rule):
    assert scales.factor(Product(oo=0.0, x=0.0, hh=0.0), rule) == 0
    assert scales.factor(Product(oo=1.0, x=0.0, hh=0.0), rule) == 1


def test_cosine_and_error_of_a_product():
    assert WORKED.cosine() == pytest.approx(36 / sqrt(50 * 36))
    assert WORKED.relative_error(1) == pytest.approx(sqrt(14 / 50))
    assert WORKED.relative_error(2) == pytest.approx(sqrt((50 - 144 + 144) / 50))
    assert Product(0, 0, 0).cosine() is None
    assert Product(0, 0, 0).relative_error(1) is None


def test_kept_values_are_measured_by_magnitude():
    values = f32([[3, -4, 1], [0, 2, -1]])
    assert scales.measure(values, np.array([0, 1])) == Kept(count=2, mean=3.5, squared_norm=31.0)
    assert scales.image(values, np.array([0, 1]), 3.5).tolist() == [[3.5, -3.5, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("unbiased", 31 / 7), ("norm", sqrt(31 / 2)), ("mse", 3.5), ("proj", 3.5), ("geo", sqrt(31 / 7 * sqrt(31 / 2)))],
)
def test_each_rule_on_a_tensor_alone(rule, expected):
    assert scales.lone(Kept(count=2, mean=3.5, squared_norm=31.0), rule) == pytest.approx(expected)
    assert scales.lone(Kept(count=0, mean=0.0, squared_norm=31.0), rule) == 0
