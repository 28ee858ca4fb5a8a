"""What `hq` does to a LoRA pair while it becomes ternary: balanced factors, and a B that answers for A's loss.

Of all factor pairs with the product B·A, the balanced ones carry each singular value in equal parts, so that neither
factor is hit harder by losing its values. Once A is ternary, B is solved again so that their product comes as near to
the old one as the lost A allows. The basis changes: factors of different experts no longer line up.
"""

import numpy as np

from moerge.tensors.files import Float32


def balanced(A: Float32, B: Float32) -> tuple[Float32, Float32]:
    """(rank, in), (out, rank) -> A' = √S·Vᵀ·Qaᵀ and B' = Qb·U·√S with the same product, by the r x r core alone.

    Where rank exceeds a side, the factors are padded with zeros to the shapes they came in.
    """
    rank = A.shape[0]
    q_a, r_a = np.linalg.qr(A.T.astype(np.float64))
    q_b, r_b = np.linalg.qr(B.astype(np.float64))
    left, strengths, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(strengths)
    first = root[:, None] * (right @ q_a.T)
    second = (q_b @ left) * root
    missing = rank - strengths.size
    first = np.pad(first, ((0, missing), (0, 0)))
    second = np.pad(second, ((0, 0), (0, missing)))
    return first.astype(np.float32), second.astype(np.float32)


def compensated(A: Float32, B: Float32, A_image: Float32) -> Float32:
    """(rank, in), (out, rank), the ternary image of A -> the B'' for which B''·image is nearest to B·A.

    B'' = B·(A·imageᵀ)·(image·imageᵀ)⁻¹, with the pseudo-inverse where rows of the image depend on each other.
    """
    image = A_image.astype(np.float64)
    solved = np.linalg.pinv(image @ image.T, hermitian=True)
    made: Float32 = (B.astype(np.float64) @ ((A.astype(np.float64) @ image.T) @ solved)).astype(np.float32)
    return made
