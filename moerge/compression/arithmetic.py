"""The two steps of compression that touch every value: numpy does them here, a GPU may do them elsewhere."""

from typing import Protocol

from moerge.compression import scales, selection
from moerge.compression.planes import Positions
from moerge.compression.scales import Product
from moerge.tensors.files import Float32


class Arithmetic(Protocol):
    """Top-k and the inner products of a LoRA pair, on whatever device.

    `keep_largest` must agree with `selection.keep_largest` to the last index; the sums of `product` may differ in
    their last digits, so equal bytes are promised for one kind of device.
    """

    def keep_largest(self, values: Float32, density: float) -> Positions: ...

    def product(self, A: Float32, B: Float32, A_image: Float32, B_image: Float32) -> Product: ...


class Numpy:
    """The processor."""

    def keep_largest(self, values: Float32, density: float) -> Positions:
        return selection.keep_largest(values, density)

    def product(self, A: Float32, B: Float32, A_image: Float32, B_image: Float32) -> Product:
        return scales.product(A, B, A_image, B_image)


NUMPY = Numpy()
